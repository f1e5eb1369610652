"""Files of predictions: reading what models wrote and what it is held against, with every mistake named (layer 6)."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MISTAKES_SHOWN = 10
ANSWER_FIELDS = ("answer", "target", "targets", "aliases")


@dataclass(frozen=True)
class Prediction:
    """One line of a file of predictions or references.

    Args:
        id: Id of the example.
        where: File and line, for messages.
        output: What the model wrote; None in a file of references.
        answers: Accepted answers, the first is the reference; empty if the line has none.
        choices: Options of a multiple-choice question; empty if the line has none.
        task: Task that the line names, or None.
    """

    id: str
    where: str
    output: str | None
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    task: str | None


class Mistakes:
    """Collects what is wrong with a file, so that one error names it all.

    Args:
        what: What the file should be, for the message.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.found: list[str] = []

    def add(self, where: str, reason: str) -> None:
        """Note a mistake.

        Args:
            where: File and line.
            reason: What is wrong.
        """
        self.found.append(f"{where}: {reason}" if where else reason)

    def raise_if_any(self) -> None:
        """Raise one error for all mistakes so far.

        Raises:
            ValueError: If there are any.
        """
        if not self.found:
            return
        more = len(self.found) - MISTAKES_SHOWN
        shown = self.found[:MISTAKES_SHOWN] + ([f"... and {more} more"] if more > 0 else [])
        count = f"{len(self.found)} mistake" + ("s" if len(self.found) > 1 else "")
        raise ValueError(f"Expected {self.what}, but found {count}:\n  " + "\n  ".join(shown))


def read_predictions(path: Path, with_output: bool) -> dict[str, Prediction]:
    """Read a file of JSON lines with `id`, `output`, `answer` or `targets`, and maybe `choices` and `task`.

    Args:
        path: The file, plain or gzip (`.gz`).
        with_output: Whether every line must have `output`; else it is not read.

    Returns:
        The lines by id, in file order.

    Raises:
        ValueError: If the file is missing, empty or has bad lines, all of them named.
    """
    field = "id and output" if with_output else "id"
    mistakes = Mistakes(f"every line of {path} to be a JSON object with {field}")
    found: dict[str, Prediction] = {}
    for where, fields in _objects(path, mistakes):
        try:
            line = _read(where, fields, with_output)
        except ValueError as error:
            mistakes.add(where, str(error))
            continue
        if line.id in found:
            mistakes.add(where, f"id {line.id!r} stands at {found[line.id].where} already; every example counts once")
        else:
            found[line.id] = line
    mistakes.raise_if_any()
    if not found:
        raise ValueError(f"Expected {path} to hold predictions, one JSON object a line, but it is empty.")
    return found


def with_references(
    predictions: Mapping[str, Prediction], references: Mapping[str, Prediction], names: tuple[Path, Path]
) -> list[Prediction]:
    """Give predictions the answers and choices of a file of references, which must name the same examples.

    Args:
        predictions: What was predicted, by id.
        references: The examples of the task, by id.
        names: Files of both, for messages.

    Returns:
        The predictions in the order of the references.

    Raises:
        ValueError: If ids are missing or surplus, or an answer of the predictions is another one.
    """
    mistakes = Mistakes(f"{names[0]} to predict exactly the examples of {names[1]}")
    for title, ids in (
        ("missing", [id for id in references if id not in predictions]),
        ("surplus", [id for id in predictions if id not in references]),
    ):
        if ids:
            more = f" and {len(ids) - MISTAKES_SHOWN} more" if len(ids) > MISTAKES_SHOWN else ""
            mistakes.add("", f"{len(ids)} {title}: {', '.join(ids[:MISTAKES_SHOWN])}{more}")
    joined = []
    for id, reference in references.items():
        prediction = predictions.get(id)
        if prediction is None:
            continue
        if prediction.answers and not set(prediction.answers) & set(reference.answers):
            stated = f"{prediction.answers[0]!r}, that of {reference.where} is {_first(reference.answers)!r}"
            mistakes.add(prediction.where, f"its answer is {stated}")
        choices = prediction.choices or reference.choices
        joined.append(Prediction(id, prediction.where, prediction.output, reference.answers, choices, prediction.task))
    mistakes.raise_if_any()
    return joined


def _objects(path: Path, mistakes: Mistakes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a file with their places; lines count from 1, blank ones too, as editors do."""
    if not path.is_file():
        raise ValueError(f"Expected {path} to be a file of JSON lines, but there is none; check the path.")
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if not raw.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    fields = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                except json.JSONDecodeError as error:
                    mistakes.add(where, f"not JSON: {error.msg} at column {error.colno}")
                    continue
                except UnicodeDecodeError as error:
                    mistakes.add(where, f"not UTF-8: {error.reason} at byte {error.start}")
                    continue
                if isinstance(fields, dict):
                    yield where, fields
                else:
                    mistakes.add(where, f"expected a JSON object, found {type(fields).__name__}")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Expected {path} to be a readable file, but reading it failed: {error}.") from error


def _read(where: str, fields: Mapping[str, Any], with_output: bool) -> Prediction:
    """Apply the rules to one object; errors say the reason alone."""
    for name in ("id", "output") if with_output else ("id",):
        if name not in fields:
            raise ValueError(f"no {name}; it has {', '.join(map(str, fields)) or 'no fields'}")
    id = fields["id"]
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise ValueError(f"id is {type(id).__name__}, expected a string or a whole number")
    output = fields["output"] if with_output else None
    if with_output and not isinstance(output, str):
        raise ValueError(f"output is {type(output).__name__}, expected a string (an empty one for no output)")
    answers = [answer for name in ANSWER_FIELDS for answer in _texts(fields, name)]
    task = fields.get("task")
    return Prediction(
        id=str(id),
        where=where,
        output=output,
        answers=tuple(dict.fromkeys(answers)),
        choices=tuple(_texts(fields, "choices")),
        task=task if isinstance(task, str) else None,
    )


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    """A field that holds a text or a list of texts; numbers are written out, a missing field is an empty list."""
    value = fields.get(name)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ValueError(f"{name} is {type(one).__name__}, expected a string")
    return [str(one) for one in values]


def _first(answers: Sequence[str]) -> str:
    return answers[0] if answers else ""
