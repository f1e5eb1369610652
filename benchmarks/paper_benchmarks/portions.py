"""What is asked: every benchmark with a local file, in portions of one `radargate test` each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from radargate_pl.benchmarks import BENCHMARKS, GROUPS, Benchmark, natural_instruction
from radargate_pl.data.benchmark_files import find_benchmarks


@dataclass(frozen=True)
class Portion:
    """Tasks that one command asks; each has results of its own.

    Attributes:
        name: of its run folder.
        benchmarks: the tasks, all of one protocol and one longest answer.
        limit: examples of each at most; all when None.
        max_new_tokens: longest answer in tokens; None in ranking.
        batch_size: rows a batch.
    """

    name: str
    benchmarks: tuple[Benchmark, ...]
    limit: int | None
    max_new_tokens: int | None
    batch_size: int

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return [benchmark.name for benchmark in self.benchmarks]

    def settings(self) -> dict[str, object]:
        """The arguments of `BenchmarkData` that differ from portion to portion."""
        names = ("tasks", "limit", "max_new_tokens", "batch_size")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Limits:
    """How much is asked.

    Attributes:
        ranking: examples of a ranking task at most; all when None.
        generation: examples of a generation task at most; all when None.
        max_new_tokens: answers are no longer than this, nor than the task's own limit; its own when None.
        ranking_rows: rows a batch in ranking.
        generation_rows: rows a batch in generation.
    """

    ranking: int | None = None
    generation: int | None = 100
    max_new_tokens: int | None = None
    ranking_rows: int = 16
    generation_rows: int = 50


def portions(root: str, limits: Limits, only: Sequence[str] = ()) -> list[Portion]:
    """Every task that has a file below a folder: rankings first, they are quick; natural instructions last.

    Args:
        root: folder of benchmarks/, flan_cot/ and niv2/.
        limits: how much is asked.
        only: beginnings of names of portions; all when empty.
    """
    found = [portion((name,), name, limits) for name in (*GROUPS["paper"], *GROUPS["flan_cot"]) if has_file(name, root)]
    found.sort(key=lambda one: one.benchmarks[0].protocol != "ranking")
    for folder in sorted(path for path in Path(root, "niv2").glob("*") if path.is_dir()):
        files = sorted(path.name.split(".")[0] for path in folder.glob("*.jsonl*"))
        if files:
            found.append(portion(files, f"niv2_{folder.name}", limits, folder.name))
    return [one for one in found if not only or any(one.name.startswith(begin) for begin in only)]


def portion(names: Sequence[str], called: str, limits: Limits, category: str | None = None) -> Portion:
    """These tasks as one portion.

    Args:
        names: of the tasks, which share protocol and longest answer.
        called: name of the portion.
        limits: how much is asked.
        category: folder of natural instructions.
    """
    asked = tuple(natural_instruction(name, category) if category else BENCHMARKS[name] for name in names)
    if asked[0].protocol == "ranking":
        return Portion(called, asked, limits.ranking, None, limits.ranking_rows)
    longest = min(asked[0].max_new_tokens, limits.max_new_tokens or asked[0].max_new_tokens)
    return Portion(called, asked, limits.generation, longest, limits.generation_rows)


def has_file(name: str, root: str) -> bool:
    """Whether a benchmark is read from a local file."""
    try:
        (source,) = find_benchmarks([name], root)
    except ValueError:  # neither a file nor a place on the hub
        return False
    return source.path is not None
