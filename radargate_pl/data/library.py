"""Reads sources into tasks: which records belong to which task and split."""

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from radargate_pl.data.record_fields import check_choices_shown
from radargate_pl.data.records import SPLITS, BadRecords, Placement, Record, Split, parse_record
from radargate_pl.data.sources import Source
from radargate_pl.data.task_names import TaskNames, check_lengths
from radargate_pl.data.unread_fields import UnreadFields

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


class _Train:
    """Train records of one file: those in front that may be used, and the last ones that may become validation.

    Args:
        limits: What is used; the rest is counted and not kept.
    """

    def __init__(self, limits: Limits) -> None:
        self.count = 0
        self._front: list[Record] = []
        self._limit = limits.train
        self._back: deque[Record] = deque(maxlen=max(limits.validation, 1))

    def add(self, record: Record) -> None:
        self.count += 1
        (self._front if self._limit is None or len(self._front) < self._limit else self._back).append(record)

    def divided(self, held_out: int) -> tuple[list[Record], list[Record]]:
        """The records in front of the last `held_out`, as far as they are kept, and these."""
        kept = [*self._front, *self._back]
        return self._front[: self.count - held_out], kept[len(kept) - held_out :] if held_out else []


class _Gathering:
    """Records of one task while sources are read."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.train: dict[str, _Train] = {}
        self.others: dict[Split, list[Record]] = {"validation": [], "test": []}
        self.categories: dict[str, None] = {}

    def add(self, origin: str, split: Split, category: str | None, record: Record) -> None:
        if split == "train":
            self.train.setdefault(origin, _Train(self.limits)).add(record)
        else:
            limit = self.limits.validation if split == "validation" else self.limits.test
            if limit is None or len(self.others[split]) < max(limit, 1):
                self.others[split].append(record)
        if category is not None:
            self.categories[category] = None

    def task(self, name: str) -> Task:
        """Split validation off, apply the limits."""
        task, limits = Task(name, self._category(name)), self.limits
        task.records["test"] = self.others["test"][: limits.test]
        task.records["validation"] = self.others["validation"][: limits.validation]
        for origin, records in self.train.items():
            held_out = 0 if self.others["validation"] else limits.validation
            if records.count and records.count <= held_out:
                raise ValueError(
                    f"Expected more than validation_examples={held_out} train records of task {name!r} in {origin}, "
                    f"but found {records.count}. Lower validation_examples."
                )
            train, validation = records.divided(held_out)
            task.records["train"] += train
            task.records["validation"] += validation
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
    names = TaskNames()
    empty, usable = [], 0
    for source in sources:
        used, unread = 0, UnreadFields(source.place)
        for number, line in enumerate(source.lines()):
            try:
                record, placement = parse_record(line, f"{source.task}-{number}", needs_rationale)
                split = _split(source, placement)
                check_choices_shown(record.source, record.targets[0], record.choices)
            except ValueError as error:
                bad_records.add(source.task, line.where, str(error))
                continue
            unread.note(line.fields, record)
            is_named = source.fixed_task or placement.task is None
            name = source.task if is_named else names.clean(str(placement.task), line.where)
            origin = _claim(owners, name, split, source)
            gathering = gathered.setdefault(name, _Gathering(limits))
            gathering.add(origin, split, placement.category or source.category, record)
            used += 1
        unread.say()
        usable += used
        empty += [] if used else [source.place]
    bad_records.raise_if_any(usable)
    if empty:
        raise ValueError(f"Expected at least one usable record in every entry of tasks, but none are in {empty}.")
    check_lengths(gathered)
    tasks = [gathering.task(name) for name, gathering in gathered.items()]
    for task in tasks:
        task.skipped = bad_records.skipped.get(task.name, 0)
        _say_repeated(task)
    return tasks


def _say_repeated(task: Task) -> None:
    """Tell how many validation examples are trained on, word for word."""
    trained = {(record.source, record.targets[0]) for record in task.records["train"]}
    repeated = sum((record.source, record.targets[0]) in trained for record in task.records["validation"])
    if repeated:
        count = len(task.records["validation"])
        logger.warning("task %s: %d of %d validation examples are among the train examples", task.name, repeated, count)


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
