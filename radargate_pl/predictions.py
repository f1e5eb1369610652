"""Files of predictions: reading what models wrote and what it is held against, with every mistake named (layer 6)."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MISTAKES_SHOWN = 5
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
        found: What was found in the output when it was written, where the line says so: texts for an answer, () for
            none; None where it says nothing.
    """

    id: str
    where: str
    output: str | None
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    task: str | None
    found: tuple[str, ...] | None = None


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


def first_object(path: Path) -> Mapping[str, Any]:
    """The first JSON object of a file, by which to tell its layout.

    Args:
        path: The file, plain or gzip.

    Returns:
        Its fields; none if the file has no such line.

    Raises:
        ValueError: If the file is missing or cannot be read.
    """
    ignored = Mistakes("")
    return next((fields for _, fields in _objects(path, ignored)), {})


def _objects(path: Path, mistakes: Mistakes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a file with their places; lines count from 1, blank ones too, as editors do."""
    if not path.is_file():
        what = "it is a folder; name a file in it" if path.is_dir() else "there is none; check the path"
        raise ValueError(f"Expected {path} to be a file of JSON lines, but {what}.")
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
                except (ValueError, RecursionError) as error:  # thousands of digits, brackets in brackets
                    mistakes.add(where, f"JSON that Python does not read: {str(error)[:80]}")
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
    task = fields.get("task")
    return Prediction(
        id=str(id),
        where=where,
        output=None if output is None else whole(output),
        answers=_answers(fields),
        choices=tuple(_texts(fields, "choices")),
        task=task if isinstance(task, str) else None,
        found=tuple(_texts(fields, "extracted")) if "extracted" in fields else None,
    )


def _answers(fields: Mapping[str, Any]) -> tuple[str, ...]:
    answers = {name: _texts(fields, name) for name in ANSWER_FIELDS}
    if empty := [name for name, texts in answers.items() if any(not text.strip() for text in texts)]:
        raise ValueError(f"{empty[0]} is empty; nothing but an empty output would equal it")
    for text in answers["answer"]:
        if answers["targets"] and text not in answers["targets"]:
            raise ValueError(f"answer {text!r} is none of its targets; give one of the two, or make them agree")
    return tuple(dict.fromkeys(text for texts in answers.values() for text in texts))


def whole(text: str) -> str:
    """A text whose characters are whole: half of a cut emoji, which JSON can hold and UTF-8 cannot, becomes U+FFFD.

    Args:
        text: Any text.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    """A field that holds a text or a list of texts; numbers are written out, a missing field is an empty list."""
    value = fields.get(name)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ValueError(f"{name} is {type(one).__name__}, expected a string")
    return [whole(str(one)) for one in values]
