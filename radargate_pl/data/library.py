"""Reads sources into tasks: which records belong to which task and split."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from radargate_pl.data.records import SPLITS, BadRecords, Placement, Record, Split, parse_record
from radargate_pl.data.sources import Source, clean_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How many records of a task are used, each counted from the front.

    Args:
        train: At most so many train records, or None for all; taken after validation is split off.
        validation: The last so many train records of each file become validation.
        test: At most so many test records, or None for all.
    """

    train: int | None = None
    validation: int = 50
    test: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_examples", self.train, 1),
            ("validation_examples", self.validation, 0),
            ("test_examples", self.test, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"Expected {name} to be {least} or more, but got {value}.")


@dataclass
class Task:
    """One task and its records by split.

    Args:
        name: The task's name.
        category: The category its records agree on, or None.
        records: Records of each split, in file order.
        skipped: How many bad records were left out.
    """

    name: str
    category: str | None = None
    records: dict[Split, list[Record]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    skipped: int = 0


class _Gathering:
    """Records of one task while sources are read."""

    def __init__(self) -> None:
        self.train: dict[str, list[Record]] = {}
        self.others: dict[Split, list[Record]] = {"validation": [], "test": []}
        self.categories: dict[str, None] = {}

    def add(self, origin: str, split: Split, category: str | None, record: Record) -> None:
        chosen = self.train.setdefault(origin, []) if split == "train" else self.others[split]
        chosen.append(record)
        if category is not None:
            self.categories[category] = None

    def task(self, name: str, limits: Limits) -> Task:
        """Split validation off, apply the limits."""
        task = Task(name, self._category(name))
        task.records["test"] = self.others["test"][: limits.test]
        task.records["validation"] = self.others["validation"][: limits.validation]
        for origin, records in self.train.items():
            held_out = 0 if self.others["validation"] else limits.validation
            if records and len(records) <= held_out:
                raise ValueError(
                    f"Expected more than validation_examples={held_out} train records of task {name!r} in {origin}, "
                    f"but found {len(records)}. Lower validation_examples."
                )
            task.records["train"] += records[: len(records) - held_out]
            task.records["validation"] += records[len(records) - held_out :]
        task.records["train"] = task.records["train"][: limits.train]
        return task

    def _category(self, name: str) -> str | None:
        if len(self.categories) > 1:
            logger.warning("records of task %s name several categories (%s): none used", name, list(self.categories))
        return next(iter(self.categories)) if len(self.categories) == 1 else None


def read_tasks(
    sources: Iterable[Source], limits: Limits, bad_records: BadRecords, needs_rationale: bool = False
) -> list[Task]:
    """Read every source and group the records by task, tasks in order of their first record.

    A record's task is the name the user gave, else the record's `task`, else the file's name. Its split is that of
    the file's name, else the record's `split`, else train. Where a task brings validation records of its own, they
    are used; otherwise the last `limits.validation` train records of each file are.

    Raises:
        ValueError: For bad records (all in one message), an empty task, or the same task from two sources.
    """
    gathered: dict[str, _Gathering] = {}
    owners: dict[tuple[str, Split], str] = {}
    empty = []
    for source in sources:
        used = 0
        for number, line in enumerate(source.lines()):
            try:
                record, placement = parse_record(line, f"{source.task}-{number}", needs_rationale)
                split = _split(source, placement)
            except ValueError as error:
                bad_records.add(source.task, line.where, str(error))
                continue
            name = source.task if source.fixed_task or placement.task is None else clean_name(placement.task)
            origin = _claim(owners, name, split, source)
            gathering = gathered.setdefault(name, _Gathering())
            gathering.add(origin, split, placement.category or source.category, record)
            used += 1
        empty += [] if used else [source.place]
    bad_records.raise_if_any()
    if empty:
        raise ValueError(f"Expected at least one usable record in every entry of tasks, but none are in {empty}.")
    tasks = [gathering.task(name, limits) for name, gathering in gathered.items()]
    for task in tasks:
        task.skipped = bad_records.skipped.get(task.name, 0)
    return tasks


def set_categories(tasks: Iterable[Task], category_of: Mapping[str, str]) -> None:
    """Give tasks other categories than their records name, in place.

    Raises:
        ValueError: If a task is not there.
    """
    by_name = {task.name: task for task in tasks}
    unknown = sorted(set(category_of) - set(by_name))
    if unknown:
        raise ValueError(f"Expected category_of to name tasks of {sorted(by_name)}, but got {unknown}.")
    for name, category in category_of.items():
        by_name[name].category = category


def _split(source: Source, placement: Placement) -> Split:
    """The split of a record: of the file's name, else of the record, else train."""
    if source.split and placement.split and source.split != placement.split:
        raise ValueError(f"split is {placement.split!r} in a file whose name says {source.split!r}")
    return source.split or placement.split or "train"


def _claim(owners: dict[tuple[str, Split], str], name: str, split: Split, source: Source) -> str:
    """Note that `source` feeds this task and split; refuse a second, unrelated one.

    Returns:
        The place of the source.
    """
    owner = f"the entry named {name!r}" if source.fixed_task else source.place
    if owners.setdefault((name, split), owner) != owner:
        raise ValueError(
            f"Expected task names to be unique, but {name!r} ({split}) comes from {owners[name, split]} and from "
            f"{owner}. Give one of them another name in tasks: {{other_name: {source.place}}}."
        )
    return source.place
