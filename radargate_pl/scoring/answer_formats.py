"""Answer formats: how the answer is found in what a model wrote, and when it is right."""

from typing import Literal, NamedTuple

from radargate_pl.scoring.choices import choice_of, find_choice
from radargate_pl.scoring.mathematics import equal_mathematics, find_mathematics
from radargate_pl.scoring.numbers import find_number, number_of, value_of
from radargate_pl.scoring.rouge import rouge_l
from radargate_pl.scoring.short_text import find_text, matches_any
from radargate_pl.scoring.translations import CHRF_THRESHOLD, sentence_chrf

AnswerFormat = Literal["choice", "number", "number or text", "math", "translation", "text", "rouge"]


class Reference(NamedTuple):
    """What an output is held against.

    Attributes:
        answers: accepted answers, at least one; the first is the reference.
        choices: the options of a multiple-choice question in order; empty otherwise.
        source: the text to translate; BLEU and chrF do not read it.
    """

    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    source: str = ""


class Judgement(NamedTuple):
    """What became of one output.

    Attributes:
        extracted: the answer found in it (of a choice: the option, word for word); None if there is none.
        correct: whether it is accepted.
        value: sentence chrF in [0, 100] of a translation, ROUGE-L F in [0, 1] for ``rouge``; None otherwise.
    """

    extracted: str | None
    correct: bool
    value: float | None = None


def judge(answer_format: AnswerFormat, output: str, reference: Reference) -> Judgement:
    """Find the answer in an output and hold it against the reference.

    =========== ============================================= ===================================================
    format      answer found                                  right if
    =========== ============================================= ===================================================
    choice      see ``find_choice``                           it is an accepted option
    number      after ``####``, in a box, else the last one   equal to an accepted number: 3.0 = 3, 50% = 50
    number      the same; the whole output where the answer   as number; as text where that is none
    or text     is no number
    math        in the last box, what "the answer is", else   equal as mathematics, see ``equal_mathematics``
                an output that is nothing but a formula
    translation the whole output                              its sentence chrF reaches ``CHRF_THRESHOLD``
    text        what "the answer is", else the first line     equal to an accepted answer after normalisation
    rouge       the whole output                              the same, articles count; ``value`` is the score
    =========== ============================================= ===================================================

    Args:
        answer_format: one of the six.
        output: what the model wrote; may be empty.
        reference: what it is held against.

    Returns:
        The answer found and whether it is right.

    Raises:
        ValueError: if the reference does not fit the format (no choice, no number), or a package is missing.
    """
    assert reference.answers, "a reference without answers"
    match answer_format:
        case "choice":
            return _judge_choice(output, reference)
        case "number":
            return _judge_number(output, reference)
        case "number or text":
            return _judge_number(output, reference, may_be_text=True)
        case "math":
            formula = find_mathematics(output)
            return Judgement(
                formula, formula is not None and any(equal_mathematics(one, formula) for one in reference.answers)
            )
        case "text":
            answer = find_text(output)
            return Judgement(answer, answer is not None and matches_any(answer, reference.answers))
        case "translation":
            value = sentence_chrf(output.strip(), reference.answers)
            return Judgement(output.strip() or None, value >= CHRF_THRESHOLD, value)
        case "rouge":
            value = rouge_l(output, reference.answers)
            return Judgement(output.strip() or None, matches_any(output, reference.answers, drop_articles=False), value)


def _judge_choice(output: str, reference: Reference) -> Judgement:
    if len(reference.choices) < 2:
        raise ValueError(f"Expected choices to be at least two options, but got {list(reference.choices)}.")
    accepted = {reference.choices[choice_of(answer, reference.choices)] for answer in reference.answers}
    found = find_choice(output, reference.choices)
    extracted = None if found is None else reference.choices[found]
    return Judgement(extracted, extracted in accepted)


def _judge_number(output: str, reference: Reference, may_be_text: bool = False) -> Judgement:
    """By value; answers that are no number, such as ``[-10.5, 25.5]``, are held against the whole text."""
    values = {answer: number_of(answer) for answer in reference.answers}
    texts = [answer for answer, value in values.items() if value is None]
    if texts and not may_be_text:
        raise ValueError(f"Expected the answer to be a number of at most 50 digits, but got {texts[0]!r}.")
    if texts and matches_any(output, texts, drop_articles=False):
        return Judgement(output.strip(), True)
    if len(texts) == len(values):
        return Judgement(output.strip() or None, False)
    found = find_number(output)
    value = None if found is None else value_of(found)
    return Judgement(found, value is not None and value in values.values())
