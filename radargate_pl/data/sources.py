"""Turns the argument `tasks` into sources: folders, files, hub data sets, reasoning-gym tasks, in any mixture."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl

from radargate_pl.data.files import IN_FOLDERS, FileSource, is_found_in_folders, is_record_file, task_and_split
from radargate_pl.data.hub import HubSource
from radargate_pl.data.procedural import PREFIX, ProceduralSource
from radargate_pl.data.records import Line, Split
from radargate_pl.data.task_names import clean_name
from radargate_pl.near_paths import lies_here, nearest_paths

HUB_PREFIX = "hub:"
HUB_ID = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")

Tasks = str | list[str | dict[str, str]] | dict[str, str]


class Source(Protocol):
    """Something that yields lines: what is known of them before they are read, and the lines."""

    @property
    def place(self) -> str:
        """What messages call it: a path, a hub id, a generator."""

    @property
    def task(self) -> str:
        """Name of the task for lines that name none."""

    @property
    def fixed_task(self) -> bool:
        """Whether `task` wins over what the lines say."""

    @property
    def category(self) -> str | None:
        """Category for lines that name none."""

    @property
    def split(self) -> Split | None:
        """Split that holds for all lines, or None."""

    def lines(self) -> Iterator[Line]:
        """Yield the lines in order."""


def expand(tasks: Tasks, sizes: Mapping[Split, int]) -> list[Source]:
    """List the sources that `tasks` names, in order; nothing is read or downloaded yet.

    Args:
        tasks: A folder, file, hub id or `reasoning_gym:<name>`; a list of them; `{name: one of them}`.
        sizes: Examples of each split of a task that is made on the spot.

    Raises:
        ValueError: If an entry names nothing, or one file is listed twice.
    """
    sources: list[Source] = []
    entries = list(_entries(tasks))
    names = [name for name, _ in entries if name is not None]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Expected the names in tasks to be unique, also where other characters became _: got {names}."
        )
    for name, place in entries:
        sources += _sources(name, place, sizes)
    if not sources:
        raise ValueError("Expected tasks to name at least one task, but got none.")
    paths = [source.path.resolve() for source in sources if isinstance(source, FileSource)]
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"Expected each file once in tasks, but these are listed twice: {', '.join(twice)}.")
    return sources


def _entries(tasks: Tasks) -> Iterator[tuple[str | None, str]]:
    """Pairs (name given by the user or None, place)."""
    if isinstance(tasks, str | Path):
        yield None, str(tasks)
    elif isinstance(tasks, Mapping):
        for name, place in tasks.items():
            yield clean_name(name), str(place)
    elif isinstance(tasks, Sequence):
        for entry in tasks:
            yield from _entries(entry)
    else:
        raise ValueError(f"Expected tasks to be text, a list or a mapping, but got {type(tasks).__name__}.")


def _sources(name: str | None, place: str, sizes: Mapping[Split, int]) -> list[Source]:
    fixed = name is not None
    if place.startswith(PREFIX):
        generator, options = _options(place.removeprefix(PREFIX))
        return [ProceduralSource(generator, name or clean_name(generator), sizes, options=options)]
    if not place.startswith(HUB_PREFIX):
        whole = Path(place).expanduser()
        front, options = (place, {}) if whole.exists() else _options(place)
        path = Path(front).expanduser()
        if path.is_dir():
            return list(_folder(path, name, options))
        if path.is_file():
            task, split = task_and_split(path)
            return [FileSource(path, name or clean_name(task), fixed, split=split, options=options)]
        _check_is_hub_id(place)
    dataset, options = _options(place.removeprefix(HUB_PREFIX))
    return [HubSource(dataset, name or clean_name(Path(dataset).name), fixed, options=options)]


def _folder(folder: Path, name: str | None, options: Mapping[str, str]) -> Iterator[Source]:
    """Every file of records below `folder`, by path; the folder that a file lies in, if not `folder`, is its category.

    With `name` given, all files belong to that one task.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and is_found_in_folders(path))
    if not paths:
        raise ValueError(f"Expected files ending in {', '.join(IN_FOLDERS)} in the folder {folder}, but found none.")
    for path in paths:
        task, split = task_and_split(path)
        category = path.parent.name if path.parent != folder else None
        yield FileSource(path, name or clean_name(task), name is not None, category, split, options)


def _options(text: str) -> tuple[str, dict[str, str]]:
    """Split `place?option=value&option=value`.

    Raises:
        ValueError: If an option has no value.
    """
    place, _, query = text.partition("?")
    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise ValueError(f"Expected options as name=value&name=value after '?', but got {text!r}.") from error
    return place, options


def _check_is_hub_id(place: str) -> None:
    """Refuse what is neither a path that exists nor a hub id, before the hub is asked for a misspelt file."""
    front = place.partition("?")[0]
    looks_like_file = place.startswith((".", "/", "~")) or is_record_file(Path(front))
    if looks_like_file or not HUB_ID.fullmatch(front) or lies_here(front):
        raise ValueError(
            f"Expected an entry of tasks to be a folder, a file, a hub id (owner/name) or {PREFIX}<name>, "
            f"but {place!r} is no such file or folder (working directory {Path.cwd()}).{nearest_paths(front)}"
        )
