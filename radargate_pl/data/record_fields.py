"""What the fields of a record mean: which make the question, which the answers; nothing is dropped or made up."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

# What stands before the question, in this order, each apart by a blank line.
BEFORE = ("system", "instruction", "context", "passage")
QUESTIONS = ("source", "question", "input")
ANSWERS = ("targets", "answers", "target", "answer", "output", "response")
# Fields that place or explain a record, or that other tools need: reading them would change nothing.
PLACING = ("id", "task", "category", "split", "rationale", "choices", "aliases", "target_index", "answer_index")
READ = frozenset((*BEFORE, *QUESTIONS, *ANSWERS, *PLACING))

_MESSAGES = "source for the user's turn and target for the assistant's"
# Layouts of other tools that have no question and answer of their own: what to write instead.
LAYOUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "chat messages": (("messages",), _MESSAGES),
    "ShareGPT conversations": (("conversations",), _MESSAGES),
    "prompt and completion": (("prompt", "completion"), "source for the prompt and target for the completion"),
    "natural instructions' own files": (
        ("Definition", "Instances"),
        "a record with instruction, source and targets for each of Instances",
    ),
    "plain text": (("text",), "source and target, since only answers are trained on and a text has no border"),
}


def question_of(fields: Mapping[str, object]) -> str:
    """The question, with what stands before it.

    Args:
        fields: Of a record.

    Raises:
        ValueError: If there is none, or there are two.
    """
    questions = {name: text for name in QUESTIONS if (text := text_of(fields, name)) is not None}
    if "input" in questions and len(questions) > 1:  # beside a question it is what the question is about
        before = [*BEFORE, "input"]
        del questions["input"]
    else:
        before = [*BEFORE]
    if len(questions) > 1 and questions["question"] not in questions["source"]:
        raise ValueError("the record has both source and question: keep one, or write the question into source")
    question = next(iter(questions.values()), None)
    parts = [text for name in before if (text := text_of(fields, name)) is not None]
    if question is None and not parts:
        raise ValueError(
            f"record without source (nor question, nor instruction); it has {_names(fields)}{_hint(fields)}"
        )
    if question is None and not text_of(fields, "instruction"):
        raise ValueError(
            f"record without source (nor question, nor instruction); it has {_names(fields)}{_hint(fields)}"
        )
    return "\n\n".join([*parts, *([] if question is None else [question])])


def answers_of(fields: Mapping[str, object]) -> tuple[str, ...]:
    """The accepted answers in order, each once: the first of ANSWERS that has any; then `aliases`.

    Args:
        fields: Of a record.

    Raises:
        ValueError: If there is none, or it is no text.
    """
    answers: list[str] = []
    for name in ANSWERS:
        if answers:
            break
        if name in ("targets", "answers"):
            answers = texts_of(fields, name)
        elif (single := text_of(fields, name)) is not None:
            answers = [single]
    if not answers:
        raise ValueError(f"record without targets (nor target, nor answer); it has {_names(fields)}{_hint(fields)}")
    return tuple(dict.fromkeys([*answers, *texts_of(fields, "aliases")]))


def check_choices_shown(question: str, answer: str, choices: Sequence[str]) -> None:
    """Refuse to train on the letter of a choice that nobody shows.

    Args:
        question: With what stands before it.
        answer: The one that is trained on.
        choices: Options, or none.

    Raises:
        ValueError: If the answer is such a letter.
    """
    is_letter = re.fullmatch(r"\(?[A-Za-z]\)?[.:]?", answer.strip()) and answer not in choices
    if choices and is_letter and not all(choice in question for choice in choices):
        raise ValueError(
            f"the answer {answer!r} is the letter of a choice, and the question does not show the choices: write them "
            "into source, or the text of the choice as target"
        )


def unread_fields(fields: Mapping[str, object]) -> set[str]:
    """Names of fields with a value that no rule reads.

    Args:
        fields: Of a record.
    """
    return {str(name) for name, value in fields.items() if name not in READ and value not in (None, "", [], {})}


def text_of(fields: Mapping[str, object], name: str) -> str | None:
    """A field as text: a number is written out, a missing or blank one is None, and so is NaN, pandas' word for it.

    Args:
        fields: Of a record.
        name: Of the field.

    Raises:
        ValueError: If it is neither text nor number, or a text that cannot be written as UTF-8.
    """
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name} is {type(value).__name__}, expected a string")
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise ValueError(f"{name} is {value}, expected a string or a finite number")
    text = str(value)
    if isinstance(value, str) and not text.isascii():
        _check_encodable(text, name)
    return text if text.strip() else None


def texts_of(fields: Mapping[str, object], name: str) -> list[str]:
    """A field that is a list of texts; one text counts as a list of one, a missing field as none.

    Objects that hold their texts under `text` (ARC's choices, SQuAD's answers) count as that list.

    Args:
        fields: Of a record.
        name: Of the field.

    Raises:
        ValueError: If it is an object of another kind, or holds something else than texts and numbers.
    """
    value = fields.get(name)
    if value is None:
        return []
    if isinstance(value, Mapping):
        if not isinstance(value.get("text"), list | tuple):
            raise ValueError(f"{name} is an object ({_names(value)}), expected a text or a list of texts")
        value = value["text"]
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        value = [value]
    texts = [text_of({name: item}, name) for item in value]
    return [text for text in texts if text is not None]


def _check_encodable(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half of a character (a lone surrogate, \\u{ord(text[error.start]):04x}) at position "
            f"{error.start}: a text was cut in the middle of it"
        ) from error


def _hint(fields: Mapping[str, object]) -> str:
    for layout, (names, instead) in LAYOUTS.items():
        if all(name in fields for name in names):
            return f"; this looks like {layout}: write {instead}"
    return ""


def _names(fields: Mapping[str, object]) -> str:
    names = ", ".join(map(str, fields)) or "no fields"
    return names if len(names) < 300 else names[:300] + " ..."
