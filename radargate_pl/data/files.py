"""Reads files of records: JSON lines (plain or gzip) and Parquet; knows task and split from a file's name."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from radargate_pl.data.records import SPLIT_WORDS, Line, Split

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def is_record_file(path: Path) -> bool:
    """Whether the name of `path` ends like a file of records."""
    return path.name.endswith(SUFFIXES)


def task_and_split(path: Path) -> tuple[str, Split | None]:
    """Task and split from a file's name: `aqua.train.jsonl.gz` is (`aqua`, `train`), `rte.jsonl` is (`rte`, None)."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)
    stem = path.name.removesuffix(suffix)
    front, dot, last = stem.rpartition(".")
    if dot and front and last in SPLIT_WORDS:
        return front, SPLIT_WORDS[last]
    return stem, None


@dataclass(frozen=True)
class FileSource:
    """Records of one file.

    Args:
        path: The file.
        task: Name of the task for records that name none.
        fixed_task: Whether `task` wins over what records say (the user gave it).
        category: Category for records that name none, or None.
        split: Split that the file's name states, or None.
    """

    path: Path
    task: str
    fixed_task: bool = False
    category: str | None = None
    split: Split | None = None

    @property
    def place(self) -> str:
        """The path."""
        return str(self.path)

    def lines(self) -> Iterator[Line]:
        """Yield the lines in file order; a line that is no JSON object comes with its reason.

        Raises:
            ValueError: If the file itself cannot be read.
        """
        try:
            yield from _parquet(self.path) if self.path.name.endswith(".parquet") else _json_file(self.path)
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise ValueError(
                f"Expected {self.path} to be a readable file ({', '.join(SUFFIXES)}), but reading it failed: {error}. "
                "Copy or download it again."
            ) from error


def json_lines(place: str, stream: Iterable[bytes]) -> Iterator[Line]:
    """Every line that is not blank; numbers count from 1 and blank lines too, as editors do.

    Args:
        place: What messages call it.
        stream: The lines as bytes.
    """
    for number, raw in enumerate(stream, start=1):
        if raw.strip():
            yield _json_line(f"{place}:{number}", raw)


def _json_file(path: Path) -> Iterator[Line]:
    with _open(path) as stream:
        yield from json_lines(str(path), stream)


def _json_line(where: str, raw: bytes) -> Line:
    try:
        fields = json.loads(raw)
    except json.JSONDecodeError as error:
        return Line(where, None, f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return Line(where, None, f"not UTF-8: {error.reason} at byte {error.start}")
    if not isinstance(fields, dict):
        return Line(where, None, f"expected a JSON object, found {type(fields).__name__}")
    return Line(where, fields)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def _parquet(path: Path) -> Iterator[Line]:
    """Rows count from 1 like lines; read batch by batch so that a large file is not held twice."""
    with pyarrow.parquet.ParquetFile(path) as table:
        number = 0
        for batch in table.iter_batches(batch_size=4096):
            for fields in batch.to_pylist():
                number += 1
                yield Line(f"{path}:{number}", fields)
