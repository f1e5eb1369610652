"""Reads files of records: JSON lines or arrays, tables, Parquet; knows task and split from a file's name."""

import codecs
import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from radargate_pl.data.records import SPLIT_WORDS, Line, Split

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
IN_FOLDERS = (".jsonl", ".jsonl.gz", ".parquet")  # a folder may hold settings as .json, and results as .csv, too


def is_record_file(path: Path) -> bool:
    """Whether the name of `path` ends like a file of records."""
    return path.name.endswith(SUFFIXES)


def is_found_in_folders(path: Path) -> bool:
    """Whether a file is taken for records where a folder is named rather than the file."""
    return path.name.endswith(IN_FOLDERS)


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
        options: A record field and the field of the file to take it from (`source=problem`).
    """

    path: Path
    task: str
    fixed_task: bool = False
    category: str | None = None
    split: Split | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The path."""
        return str(self.path)

    def lines(self) -> Iterator[Line]:
        """Yield the lines in file order; a line that is no JSON object comes with its reason.

        Raises:
            ValueError: If the file itself cannot be read, or an option names no field of it.
        """
        try:
            lines = _rows(self.path)
            yield from _renamed(lines, self.options, self.place) if self.options else lines
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
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw.strip():
            yield _json_line(f"{place}:{number}", raw)


def _rows(path: Path) -> Iterator[Line]:
    if path.name.endswith(".parquet"):
        yield from _parquet(path)
        return
    with _open(path) as stream:
        if path.name.removesuffix(".gz").endswith((".csv", ".tsv")):
            yield from _table(path, stream)
        elif _is_one_value(path, stream):
            yield from _json_array(path, stream)
        else:
            yield from json_lines(str(path), stream)


def _is_one_value(path: Path, stream: BinaryIO | gzip.GzipFile) -> bool:
    """Whether a file is one JSON value, over several lines or an array, rather than a line for each record."""
    lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in stream)
    first = next(filter(None, lines), b"")
    is_array = first[:1] == b"["
    is_alone = is_array and next(filter(None, lines), None) is None
    stream.seek(0)
    if is_alone or not (is_array or path.name.removesuffix(".gz").endswith(".json")):
        return is_alone
    return _json_line("", first, any_value=True).fields is None  # a whole value, though no record, is one line of many


def _json_array(path: Path, stream: BinaryIO | gzip.GzipFile) -> Iterator[Line]:
    """Records of one JSON array; an object that holds one under `data` counts as that."""
    found = _json_line(str(path), stream.read().removeprefix(codecs.BOM_UTF8), any_value=True)
    records = found.fields.get("value") if found.fields else None
    if isinstance(records, dict) and isinstance(records.get("data"), list):
        records = records["data"]
    if isinstance(records, dict):
        yield Line(str(path), records)
        return
    if not isinstance(records, list):
        yield Line(str(path), None, found.problem or "neither JSON lines nor an array of records")
        return
    for number, record in enumerate(records, start=1):
        is_object = isinstance(record, dict)
        problem = "" if is_object else f"expected a JSON object, found {type(record).__name__}"
        yield Line(f"{path}, record {number}", record if is_object else None, problem)


def _table(path: Path, stream: BinaryIO | gzip.GzipFile) -> Iterator[Line]:
    """Rows of a table with a line of names; everything is text, an empty cell is missing."""
    delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter)
        try:
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if None in fields or None in fields.values():
                    names = len(reader.fieldnames or ())
                    yield Line(where, None, f"the row has another number of cells than the {names} names in line 1")
                else:
                    yield Line(where, {name: value or None for name, value in fields.items()})
        except (UnicodeDecodeError, csv.Error) as error:
            yield Line(f"{path}:{reader.line_num + 1}", None, f"no row of a table: {error}")


def _renamed(lines: Iterable[Line], options: Mapping[str, str], place: str) -> Iterator[Line]:
    """Lines whose fields are taken from others: `source=problem` reads `problem` as `source`."""
    for line in lines:
        if line.fields is None:
            yield line
            continue
        missing = sorted(set(options.values()) - set(line.fields))
        if missing:
            raise ValueError(f"Expected fields {missing} in {place}, but {line.where} has {', '.join(line.fields)}.")
        taken = set(options.values())
        kept = {name: value for name, value in line.fields.items() if name not in taken}
        yield Line(line.where, {**kept, **{name: line.fields[other] for name, other in options.items()}})


def _json_line(where: str, raw: bytes, any_value: bool = False) -> Line:
    try:
        fields = json.loads(raw)
    except json.JSONDecodeError as error:
        return Line(where, None, f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return Line(where, None, f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets in brackets
        return Line(where, None, f"JSON that Python does not read: {str(error)[:80]}")
    if any_value:
        return Line(where, {"value": fields})
    if not isinstance(fields, dict):
        return Line(where, None, f"expected a JSON object, found {type(fields).__name__}")
    return Line(where, fields)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    """The content, also of a packed file without the name of one, and the other way round."""
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_packed else path.open("rb")


def _parquet(path: Path) -> Iterator[Line]:
    """Rows count from 1 like lines; read batch by batch so that a large file is not held twice."""
    with pyarrow.parquet.ParquetFile(path) as table:
        whole = _whole_numbers(table)
        number = 0
        for batch in table.iter_batches(batch_size=4096):
            for fields in batch.to_pylist():
                number += 1
                for name in whole:
                    if fields[name] is not None and math.isfinite(fields[name]):
                        fields[name] = int(fields[name])
                yield Line(f"{path}:{number}", fields)


def _whole_numbers(table: pyarrow.parquet.ParquetFile) -> list[str]:
    """Columns of whole numbers that pandas made floating-point because some are missing: 1.0 was written as 1."""
    found = []
    for one in table.schema_arrow:
        if pyarrow.types.is_floating(one.type):
            column = table.read(columns=[one.name])[one.name].cast(pyarrow.float64())  # no floor for 16 bits
            finite = column.filter(pyarrow.compute.is_finite(column))
            is_whole = pyarrow.compute.equal(finite, pyarrow.compute.floor(finite))
            if 0 < len(finite) < len(column) and pyarrow.compute.all(is_whole).as_py():
                found.append(one.name)
    return found
