"""Scoring: finding the answer in what a model wrote, judging it, and scoring a task with an interval."""

from radargate_pl.scoring.answer_formats import AnswerFormat, Judgement, Reference, judge
from radargate_pl.scoring.task_score import Measure, Row, chance_level, levels, majority_level, measure
from radargate_pl.scoring.translations import CHRF_THRESHOLD

__all__ = [
    "CHRF_THRESHOLD",
    "AnswerFormat",
    "Judgement",
    "Measure",
    "Reference",
    "Row",
    "chance_level",
    "judge",
    "levels",
    "majority_level",
    "measure",
]
