"""Scores of a task over its judged examples, each with a 95 % interval."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from radargate_pl.scoring.classification import f1, matthews
from radargate_pl.scoring.intervals import bootstrap, wilson
from radargate_pl.scoring.rouge import rouge_l
from radargate_pl.scoring.translations import corpus_statistics


class Row(NamedTuple):
    """One judged example.

    Attributes:
        correct: whether the answer found is accepted.
        extracted: the answer found; None without any. Of a choice: the option, word for word.
        answer: the reference; of a choice: the option, word for word.
        output: what the model wrote.
        value: the sentence-level value of its format, see ``Judgement``.
        others: further accepted answers of an open question.
    """

    correct: bool
    extracted: str | None
    answer: str
    output: str
    value: float | None
    others: tuple[str, ...] = ()


class Measure(NamedTuple):
    """A score with its 95 % interval.

    Attributes:
        value: in [0, 1]; bleu and chrf in [0, 100], matthews in [-1, 1].
        low: lower end of the interval; ``None`` where the examples do not tell one, see ``bootstrap``.
        high: upper end; ``None`` as well.
        n: number of examples.
    """

    value: float
    low: float | None
    high: float | None
    n: int


def measure(name: str, rows: Sequence[Row], labels: Sequence[str] = ()) -> Measure:
    """Score a task.

    ====================== ==================================================================== ==========
    name                   score                                                                interval
    ====================== ==================================================================== ==========
    accuracy, exact_match  share of right answers                                               Wilson
    sentence_chrf_accuracy share of translations whose sentence chrF reaches ``CHRF_THRESHOLD`` Wilson
    matthews               Matthews' correlation; no answer is a class of its own               bootstrap
    f1                     F1 of ``labels[1]``; no answer counts as the other label             bootstrap
    bleu, chrf             corpus scores by sacrebleu, against all accepted answers             bootstrap
    rouge_l                mean ROUGE-L; where all are alike, at most as many examples would    bootstrap
                           differ as Wilson's interval allows of none in n
    ====================== ==================================================================== ==========

    Args:
        name: one of these.
        rows: every example of the task once, at least one.
        labels: the labels of the task in label order; for f1.

    Returns:
        The score and its interval.

    Raises:
        ValueError: if there is no such score, there are no rows, or what the score needs is missing.
    """
    if not rows:
        raise ValueError(f"Expected at least one judged example for {name}, but got none.")
    match name:
        case "accuracy" | "exact_match" | "sentence_chrf_accuracy":
            right = sum(row.correct for row in rows)
            return Measure(right / len(rows), *wilson(right, len(rows)), len(rows))
        case "matthews":
            return _resampled(*_confusion(rows))
        case "f1":
            return _resampled(*_positives(rows, labels))
        case "bleu" | "chrf":
            return _corpus(name, rows)
        case "rouge_l":
            return _mean([_rouge_of(row) for row in rows])
    raise ValueError(
        f"Expected a score to be one of accuracy, exact_match, sentence_chrf_accuracy, matthews, f1, bleu, chrf and "
        f"rouge_l, but got {name!r}."
    )


def majority_level(answers: Sequence[str]) -> float:
    """The share of the most frequent answer: what always giving it would score.

    Args:
        answers: the reference of each example, at least one.

    Example:
        >>> majority_level(["yes", "no", "yes"])
        0.6666666666666666
    """
    return Counter(answers).most_common(1)[0][1] / len(answers)


def chance_level(numbers_of_choices: Sequence[float]) -> float:
    """The expected accuracy of guessing: the mean of 1 / number of choices.

    Args:
        numbers_of_choices: of each example, at least one; 2.5 where two of five are the right answer.

    Example:
        >>> chance_level([4, 4, 2])
        0.3333333333333333
    """
    return math.fsum(1 / number for number in numbers_of_choices) / len(numbers_of_choices)


def levels(score: str, questions: Sequence[tuple[Sequence[str], str]]) -> tuple[float | None, float | None]:
    """What whoever always takes the most frequent choice gets, and whoever draws lots.

    Args:
        score: name of the score that they are held against.
        questions: the choices of each example and the right one of them, word for word; at least one.

    Returns:
        Majority and chance level, both ``None`` where a question is open; 0 of Matthews' correlation, which is that of
        any guess. The most frequent choice is one of position: texts differ from question to question.

    Example:
        >>> levels("accuracy", [(["a", "b"], "a"), (["c", "d"], "c"), (["e", "f"], "f")])
        (0.6666666666666666, 0.5)
    """
    if not all(choices for choices, _ in questions):
        return None, None
    if score == "matthews":
        return 0.0, 0.0
    positions = [str(choices.index(answer)) for choices, answer in questions]
    # Equal choices are right together.
    return majority_level(positions), chance_level([len(c) / c.count(answer) for c, answer in questions])


def _resampled(statistics: Sequence[Sequence[float]], score: Callable[[Any], float]) -> Measure:
    sums = [sum(column) for column in zip(*statistics, strict=True)]
    low, high = bootstrap(statistics, score)
    return Measure(score(sums), low, high, len(statistics))


def _mean(values: Sequence[float]) -> Measure:
    """The mean of values in [0, 1]. Equal ones leave nothing to draw, but bound how many others can be unlike them."""
    found = _resampled([(value, 1.0) for value in values], lambda sums: sums[0] / sums[1])
    if found.low is not None:
        return found
    _, unlike = wilson(0, found.n)
    low = found.value * (1 - unlike)
    return found._replace(low=low, high=low + unlike)


def _confusion(rows: Sequence[Row]) -> tuple[list[list[float]], Callable[[Any], float]]:
    """One-hot cells of the confusion matrix a row; an answer that was not found is a class that no reference has."""
    classes = sorted({row.answer for row in rows} | {row.extracted for row in rows if row.extracted is not None})
    index = {name: position for position, name in enumerate(classes)}
    size = len(classes) + 1
    table = []
    for row in rows:
        cells = [0.0] * size**2
        column = len(classes) if row.extracted is None else index[row.extracted]
        cells[index[row.answer] * size + column] = 1.0
        table.append(cells)
    return table, lambda sums: matthews([list(sums[start : start + size]) for start in range(0, size**2, size)])


def _rouge_of(row: Row) -> float:
    """What ``judge`` found; formats without a value are held against the accepted answers here."""
    return rouge_l(row.output, [row.answer, *row.others]) if row.value is None else row.value


def _positives(rows: Sequence[Row], labels: Sequence[str]) -> tuple[list[list[float]], Callable[[Any], float]]:
    if len(labels) != 2:
        raise ValueError(f"Expected labels to be two for f1, which is that of the second, but got {list(labels)}.")
    positive = labels[1]
    table = []
    for row in rows:
        predicted, true = row.extracted == positive, row.answer == positive
        table.append([float(predicted and true), float(predicted), float(true)])
    return table, lambda sums: f1(*sums)


def _corpus(name: Literal["bleu", "chrf"], rows: Sequence[Row]) -> Measure:
    outputs, references = [row.output.strip() for row in rows], [(row.answer, *row.others) for row in rows]
    return _resampled(*corpus_statistics(name, outputs, references))
