"""Finds the files and hub data sets of benchmarks, and reads their examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from radargate_pl.benchmarks import BENCHMARKS, GROUPS, NIV2, Benchmark, natural_instruction, nearest_names
from radargate_pl.data.benchmark_fields import Fields, read_line, read_row
from radargate_pl.data.files import SUFFIXES, FileSource, task_and_split
from radargate_pl.data.hub import label_name, load
from radargate_pl.data.records import SPLIT_WORDS, BadRecords

FOLDERS = ("", "benchmarks", "flan_cot")  # below root


@dataclass(frozen=True)
class BenchmarkSource:
    """A benchmark and where its examples are.

    Args:
        benchmark: What it is.
        path: A file, or None for the hub.
        category: Category of a file of natural instructions; of a fitting task of FLAN, its own name.
    """

    benchmark: Benchmark
    path: Path | None
    category: str | None = None


def find_benchmarks(tasks: str | Sequence[str], root: str | None) -> list[BenchmarkSource]:
    """List the benchmarks that `tasks` names, each once and in order; nothing is read or downloaded yet.

    Args:
        tasks: Names of benchmarks, of groups of them, or of files of natural instructions.
        root: Folder that holds files, see `BenchmarkData`.

    Raises:
        ValueError: If a name is unknown or stands for two files, or a benchmark has neither a file nor a place on the
            hub.
    """
    folder = None if root is None else Path(root).expanduser()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"Expected root to be a folder, but {str(folder)!r} is none (working directory {Path.cwd()}).")
    instructions = _natural_instructions(folder)
    names: dict[str, None] = {}
    for name in [tasks] if isinstance(tasks, str) else tasks:
        if name == NIV2 and not instructions:
            raise ValueError(
                f"Expected files of natural instructions in {folder or 'root'}/{NIV2}/<category>/ for the group "
                f"{NIV2!r}, but found none."
            )
        if name == NIV2 and (taken := sorted(BENCHMARKS.keys() & instructions)):
            raise ValueError(
                f"Expected files of natural instructions to have names of their own, but {instructions[taken[0]][0]} "
                f"is called like the benchmark {taken[0]!r}. Rename it."
            )
        names.update(dict.fromkeys(instructions if name == NIV2 else GROUPS.get(name, (name,))))
    if not names:
        raise ValueError("Expected tasks to name at least one benchmark, but got none.")
    return [_source(name, folder, instructions) for name in names]


def _source(name: str, root: Path | None, instructions: dict[str, list[Path]]) -> BenchmarkSource:
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        path = _file_of(name, root)
        if path is None and benchmark.hub is None:
            raise ValueError(f"Expected benchmark {name!r} to have a file, for it has no hub data set.\n{_put(name)}")
        # A fitting task belongs to the expert that was trained on it, wherever that is called by the task's own name.
        return BenchmarkSource(benchmark, path, name.removeprefix("cot_") if name.startswith("cot_") else None)
    if name in instructions:
        path, *others = instructions[name]
        if others:  # of the same category too: nothing says which of a file and its packed copy is the newer one
            raise ValueError(
                f"Expected one file of natural instructions to be called {name!r}, but there are "
                f"{' and '.join(map(str, [path, *others]))}. Rename or remove all but one."
            )
        return BenchmarkSource(natural_instruction(name, path.parent.name), path, path.parent.name)
    near = nearest_names(name, BENCHMARKS, [*GROUPS, NIV2, *instructions])
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"Expected tasks to name benchmarks, but there is no {name!r}: {meant}Groups are "
        f"{', '.join([*GROUPS, NIV2])}; all names are in radargate_pl/benchmarks."
    )


def _stems(name: str) -> tuple[str, ...]:
    """What the file of a benchmark may be called, without suffix."""
    return (name, f"{name.removeprefix('cot_')}.test") if name.startswith("cot_") else (name,)


def _file_of(name: str, root: Path | None) -> Path | None:
    if root is None:
        return None
    places = [root / folder / (stem + suffix) for folder in FOLDERS for stem in _stems(name) for suffix in SUFFIXES]
    return next((path for path in places if path.is_file()), None)


def _natural_instructions(root: Path | None) -> dict[str, list[Path]]:
    """Files of natural instructions by name: below `root/niv2`, or below `root` where that is the folder itself.

    Files whose names say that they are for training or validation are left out: a test is not on them.
    """
    if root is None:
        return {}
    folder = root if root.name == NIV2 else root / NIV2
    paths = sorted(path for suffix in SUFFIXES for path in folder.glob(f"*/*{suffix}"))
    found: dict[str, list[Path]] = {}
    for path in paths:
        if task_and_split(path)[1] in (None, "test"):
            found.setdefault(path.name.split(".")[0], []).append(path)
    return found


def _put(name: str) -> str:
    """Which file to put where."""
    return (
        f"Put its examples into ROOT/{_stems(name)[-1]}.jsonl and set data.root to ROOT: one JSON object a line with "
        "id, inputs (the names in the prompt), choices, answer."
    )


def _terms(dataset: str) -> str:
    """What the hub asks for before it gives out a gated data set, which it may also call not found."""
    return (
        f"{dataset} is gated: its conditions must be accepted on https://huggingface.co/datasets/{dataset}, and "
        "HF_TOKEN set to a token of the account that accepted them.\n"
    )


def read_fields(source: BenchmarkSource, bad_records: BadRecords) -> list[Fields]:
    """Read all examples of a benchmark. The exact repeat of an example is left out: every example counts once.

    Args:
        source: The benchmark.
        bad_records: Receives what cannot be read, and ids that stand for two different examples.

    Raises:
        ValueError: If the file or data set cannot be had.
    """
    seen: dict[str, Fields] = {}
    repeats = []
    rows = _hub_fields(source.benchmark, bad_records) if source.path is None else _file_fields(source, bad_records)
    for fields in rows:
        first = seen.setdefault(fields.id, fields)
        if first is fields:
            continue
        if first._replace(where="") == fields._replace(where=""):
            repeats.append(fields.id)
        else:
            reason = f"duplicate id {fields.id!r}: {first.where} has it with another content"
            bad_records.add(source.benchmark.name, fields.where, reason)
    if repeats:
        rank_zero_info(f"task {source.benchmark.name}: left out exact repeats of {', '.join(repeats)}")
    return list(seen.values())


def _file_fields(source: BenchmarkSource, bad_records: BadRecords) -> Iterator[Fields]:
    """Examples of a file; lines that say to be of another split than the scored one are not of the benchmark."""
    assert source.path is not None
    name, hub = source.benchmark.name, source.benchmark.hub
    scored, left_out = {"test", SPLIT_WORDS.get(hub.split, "test") if hub else "test"}, 0
    for number, line in enumerate(FileSource(source.path, name).lines()):
        if SPLIT_WORDS.get(str((line.fields or {}).get("split", "test")).lower(), "test") not in scored:
            left_out += 1
            continue
        try:
            yield read_line(source.benchmark, line, f"{name}-{number}")
        except ValueError as error:
            bad_records.add(name, line.where, str(error))
    if left_out:
        rank_zero_info(f"task {name}: left out {left_out} lines of other splits than {' and '.join(sorted(scored))}")


def _hub_fields(benchmark: Benchmark, bad_records: BadRecords) -> Iterator[Fields]:
    hub = benchmark.hub
    assert hub is not None
    number = 0
    for config in hub.configs:
        # A branch without a card has no configurations, but a folder for each.
        place = {"data_dir": config} if hub.revision else {"name": config}
        try:
            rows = load(hub.dataset, hub.revision or None, split=hub.split, **place)
        except ValueError as error:
            terms = _terms(hub.dataset) if hub.is_gated else ""
            raise ValueError(f"Benchmark {benchmark.name}: {error}\n{terms}Or: {_put(benchmark.name)}") from error
        for row in rows:
            named = {column: label_name(value, rows.features[column]) for column, value in row.items()}
            where = f"{hub.dataset} {config} {hub.split}:{number}"
            try:
                yield read_row(benchmark, hub, named, where, f"{benchmark.name}-{number}")
            except ValueError as error:
                bad_records.add(benchmark.name, where, str(error))
            number += 1
