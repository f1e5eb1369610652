"""Records: one example of a task, and the rules that read it from a line of a file."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from radargate_pl.data.record_fields import answers_of, question_of, text_of, texts_of

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
PROBLEMS_SHOWN = 5


class Line(NamedTuple):
    """One line of a source before the record rules: `fields`, or the reason why there are none.

    Args:
        where: What an error message cites, e.g. `data/aqua.train.jsonl:17`.
        fields: The parsed object; None for a line that could not be read.
        problem: Why it could not be read; empty otherwise.
    """

    where: str
    fields: Mapping[str, object] | None
    problem: str = ""


@dataclass(frozen=True)
class Record:
    """One example: a question, the accepted answers, and where it came from.

    Args:
        id: Name of the example in result files.
        source: The question; an instruction stands before it, separated by a blank line.
        targets: Accepted answers, at least one but in prompts of one's own; the first one is trained on.
        where: File and line, for messages.
        rationale: Chain of thought that leads to `targets[0]`, or None.
        choices: Options of a multiple-choice question; empty when there are none.
    """

    id: str
    source: str
    targets: tuple[str, ...]
    where: str
    rationale: str | None = None
    choices: tuple[str, ...] = ()


class Placement(NamedTuple):
    """What a line says about where its record belongs; None where it says nothing."""

    task: str | None
    category: str | None
    split: Split | None


class BadRecords:
    """Collects bad lines; `raise_if_any` reports them together, unless the user asked to skip them.

    Args:
        policy: `raise` refuses to start, `skip` counts and logs.
    """

    def __init__(self, policy: Literal["raise", "skip"]) -> None:
        self.policy = policy
        self.problems: list[str] = []
        self.skipped: dict[str, int] = {}

    def add(self, task: str, where: str, reason: str) -> None:
        """Note that the line at `where`, meant for `task`, was not used."""
        self.skipped[task] = self.skipped.get(task, 0) + 1
        if self.policy == "skip":
            logger.warning("skipped %s: %s", where, reason)
        else:
            self.problems.append(f"{where}: {reason}")

    def raise_if_any(self, usable: int = 1) -> None:
        """Raise one error for all bad lines so far.

        Args:
            usable: How many good lines there are; where there are none, leaving the bad ones out is no way on.

        Raises:
            ValueError: If there are bad lines and the policy is `raise`.
        """
        if not self.problems:
            return
        shown = "\n  ".join(self.problems[:PROBLEMS_SHOWN])
        more = len(self.problems) - PROBLEMS_SHOWN
        tail = f"\n  ... and {more} more" if more > 0 else ""
        found = f"{len(self.problems)} bad record" + ("s" if len(self.problems) > 1 else "")
        raise ValueError(
            f"Expected every record to be usable, but found {found}:\n  {shown}{tail}\n"
            + (
                "Correct them, or set on_bad_record: skip to leave such records out (they are counted and logged)."
                if usable
                else "No record is usable: the file has another layout. Rename its fields (FILE?source=COLUMN), or "
                "write it anew."
            )
        )


def parse_record(
    line: Line, fallback_id: str, needs_rationale: bool = False, needs_answer: bool = True
) -> tuple[Record, Placement]:
    """Apply the record rules to one line.

    Args:
        line: A line of a source.
        fallback_id: The id of a record that has none of its own.
        needs_rationale: Whether a record without `rationale` is an error.
        needs_answer: Whether answers are looked for; a record without them is an error then.

    Raises:
        ValueError: With the reason alone; the caller adds file and line.
    """
    if line.fields is None:
        raise ValueError(line.problem)
    fields = line.fields
    rationale = text_of(fields, "rationale")
    if needs_rationale and rationale is None:
        raise ValueError("target: rationale was asked for, but the record has no rationale")
    record_id = fields.get("id")
    if record_id is None or record_id != record_id:  # NaN, as pandas writes what is missing
        record_id = fallback_id
    source, targets = question_of(fields), answers_of(fields) if needs_answer else ()
    record = Record(
        id=str(record_id),
        source=source,
        targets=targets,
        where=line.where,
        rationale=rationale,
        choices=tuple(texts_of(fields, "choices")),
    )
    return record, Placement(text_of(fields, "task"), text_of(fields, "category"), _split(fields))


def _split(fields: Mapping[str, object]) -> Split | None:
    """The split that the record names, or None."""
    name = text_of(fields, "split")
    if name is None:
        return None
    if name.lower() not in SPLIT_WORDS:
        raise ValueError(f"split is {name!r}, expected one of {', '.join(SPLIT_WORDS)}")
    return SPLIT_WORDS[name.lower()]
