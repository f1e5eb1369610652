"""Answers of a test that is under way, on disk after every batch, so that a killed test goes on (layer 5)."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

FORMAT_VERSION = 2


class AnsweredBatch(NamedTuple):
    """One line of the file: a batch is answered as a whole or not at all.

    Attributes:
        rows: a row for each item.
        seconds: how long it took.
        tokens: tokens behind the answers.
    """

    rows: list[dict[str, Any]]
    seconds: float
    tokens: int


class PartialAnswers:
    """The files ``answers.<key>.rank<R>.jsonl`` of one task, one for each process that ever took part.

    Name and first line of a file tell the key of the test: answers of another model or of other settings are never
    mixed in, and stay where they are.

    Args:
        folder: ``test/<task>`` of the run folder, seen by all processes.
        key: of this test; see `answers_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def paths(self) -> list[Path]:
        """The files that are there, by rank."""
        found = self.folder.glob(f"answers.{short_key(self.key)}.rank*.jsonl")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def append(self, rank: int, batch: AnsweredBatch) -> None:
        """Write one batch and wait until it lies on the disk.

        Args:
            rank: number of this process, which alone writes its file.
            batch: its answers.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"answers.{short_key(self.key)}.rank{rank}.jsonl"
        header = [] if path.exists() else [{"format_version": FORMAT_VERSION, "key": self.key}]
        with path.open("ab") as file:
            file.write(b"".join(_line(value) for value in [*header, batch._asdict()]))
            file.flush()
            os.fsync(file.fileno())

    def repair(self) -> None:
        """Before anyone reads or appends: drop what a kill tore. For one process alone.

        Raises:
            ValueError: a line before the last one is damaged.
        """
        for path in self.paths():
            content = path.read_bytes()
            whole = _without_torn_line(content)
            if len(whole) < len(content):
                rank_zero_warn(f"{path}: the last line was not written to its end; its examples are answered again.")
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            if not list(_parsed(path)):
                path.unlink()

    def batches(self) -> dict[Path, list[AnsweredBatch]]:
        """Everything answered so far, by file.

        Raises:
            ValueError: naming file and line, if a line is damaged or the file belongs to another test.
        """
        found = {}
        for path in self.paths():
            header, *lines = _parsed(path)
            if header.get("key") != self.key:
                raise ValueError(
                    f"Expected {path} to hold answers of this test, but it belongs to another one. Move it out of "
                    "the folder, or give each test its own trainer.default_root_dir"
                )
            found[path] = [AnsweredBatch(line["rows"], line["seconds"], line["tokens"]) for line in lines]
        return found

    def finished_ids(self) -> list[str]:
        """Ids of the examples that are answered."""
        return [row["id"] for batches in self.batches().values() for batch in batches for row in batch.rows]

    def remove(self) -> None:
        """Delete the files."""
        for path in self.paths():
            path.unlink()


def short_key(key: str) -> str:
    """The first eight digits of a key, for names of files.

    Example:
        >>> short_key("sha256:0123456789abcdef")
        '01234567'
    """
    return key.rpartition(":")[2][:8]


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _without_torn_line(content: bytes) -> bytes:
    """The file up to its last whole line; after a crash the end may be cut off or filled with zeros."""
    whole = content[: content.rfind(b"\n") + 1]
    last = whole[whole[:-1].rfind(b"\n") + 1 :]
    return whole if not last or _is_line(last) else whole[: -len(last)]


def _is_line(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _parsed(path: Path) -> Iterable[dict[str, Any]]:
    values = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        wanted = {"key"} if number == 1 else {"rows", "seconds", "tokens"}
        if not _is_line(line) or not wanted <= json.loads(line).keys():
            raise ValueError(
                f"Expected {path}:{number} to be a line that `radargate test` wrote, but it is damaged. Delete the "
                "file: its examples are then answered again"
            )
        values.append(json.loads(line))
    return values
