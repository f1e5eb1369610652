"""What a training step, a decoding step and their memory cost, beside PEFT's and beside the bare backbone.

    python benchmarks/step_cost.py --runs runs/step_cost            # everything, about an hour on two cores
    python benchmarks/step_cost.py --runs runs/step_cost --quick    # what the ratios need, five minutes on two cores
    python benchmarks/step_cost.py --rows step/qv/4x128,layer --rounds 3
    python benchmarks/step_cost.py --list
    python benchmarks/step_cost.py --summary runs/step_cost/step_cost.json      # the README's table, of several files

Rows of a table take turns, in an order drawn anew for every round; memory is measured in a process for each row. Writes
step_cost.json and step_cost.md into the run folder after every table. On a GPU: CUDA events and allocated memory.
"""

import argparse
import dataclasses
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from costs.backbones import SharedWeights
from costs.case import Setting, UnavailableError
from costs.cases import case_of
from costs.machine import machine
from costs.memory import measure_apart, measure_here
from costs.ratios import ratios_of
from costs.rows import Row, all_rows, quick_rows
from costs.summary import summary
from costs.tables import markdown
from costs.timing import Stopwatch, take_turns, warm_up

from radargate_pl.callbacks import ExpertLoadMonitor

FORMAT = 1
QUICK = {"rounds": 2, "new_tokens": 12, "minutes": 4.5}
OPTIONS = {"rounds": 7, "new_tokens": 64, "minutes": None}
TOO_LATE = "the time was up, see --minutes"


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs/step_cost", help="folder for the results")
    parser.add_argument("--backbone", default="smollm2-135m-q4")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own choice by default")
    parser.add_argument(
        "--rounds", type=int, default=None, help=f"{OPTIONS['rounds']}, or {QUICK['rounds']} with --quick"
    )
    parser.add_argument("--new_tokens", type=int, default=None, help="tokens generated when decoding")
    parser.add_argument("--minutes", type=float, default=None, help="no row is begun later; 4.5 with --quick")
    parser.add_argument("--rows", default="", help="beginnings of row names, separated by commas")
    parser.add_argument("--quick", action="store_true", help="only the rows that the ratios need")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--summary", nargs="+", default=(), help="print the README's table of these results and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory_row", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    defaults = QUICK if options.quick else OPTIONS
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def setting_of(options: argparse.Namespace) -> Setting:
    """What all rows have in common."""
    backbone = "".join(letter if letter.isalnum() else "-" for letter in options.backbone)
    experts = Path(options.runs).resolve() / "experts" / backbone
    device = torch.device(options.device)
    common = {"seed": options.seed, "new_tokens": options.new_tokens, "experts": experts}
    return Setting(backbone=options.backbone, dtype=options.dtype, device=device, **common)


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """The rows asked for."""
    rows = quick_rows() if options.quick else all_rows()
    beginnings = tuple(part for part in options.rows.split(",") if part)
    found = [row for row in rows if row.name.startswith(beginnings)] if beginnings else rows
    if not found:
        raise SystemExit(f"Expected --rows to begin names of rows, but got {options.rows!r}; see --list.")
    return found


def measure_group(rows: list[Row], setting: Setting, rounds: int, end: float = math.inf) -> dict[str, dict[str, Any]]:
    """Build and warm up the rows of one group, then let them take turns.

    Args:
        rows: of one group.
        setting: what all have in common.
        rounds: how often each takes its turn.
        end: no row is begun after this time of `time.perf_counter`.
    """
    cases, found = {}, {row: described(row) for row in rows}
    watch = Stopwatch(setting.device)
    weights = SharedWeights(setting) if time.perf_counter() < end else None
    for row in rows:
        begun = time.perf_counter()
        try:
            if weights is None or begun > end:
                raise UnavailableError(TOO_LATE)
            case = case_of(row, setting, weights)
            found[row] |= warm_up(case, watch) | case.describe()
            cases[row] = case
        except UnavailableError as error:
            found[row]["unavailable"] = str(error)
        said = found[row].get("unavailable", "ready")
        print(f"{row.name}: {said} after {time.perf_counter() - begun:.1f} s", flush=True)
    seconds, failed = take_turns(cases, rounds, setting.seed, watch)
    for row in cases:
        found[row]["seconds"] = seconds[row]
        if row in failed:
            found[row]["unavailable"] = failed[row]
        if row.table == "decode":
            found[row]["tokens"] = row.batch * setting.new_tokens
    return {row.name: values for row, values in found.items()}


def described(row: Row) -> dict[str, Any]:
    """The fields of a row, as they are written."""
    return {**dataclasses.asdict(row), "group": row.group}


@contextmanager
def own_compiler_cache() -> Iterator[None]:
    """Compile from nothing, so that compile seconds do not depend on earlier runs."""
    with tempfile.TemporaryDirectory(prefix="step-cost-") as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything asked for, writing what there is after every group."""
    setting, rows = setting_of(options), chosen_rows(options)
    names = ("backbone", "dtype", "device", "rounds", "new_tokens", "seed")
    settings = {name: getattr(options, name) for name in names}
    report: dict[str, Any] = {"format_version": FORMAT, "machine": machine(setting.device), "settings": settings}
    report["rows"] = {}
    end = time.perf_counter() + 60 * (options.minutes or math.inf)
    with own_compiler_cache():
        for group in dict.fromkeys(row.group for row in rows):
            of_group = [row for row in rows if row.group == group]
            if of_group[0].table == "memory":
                report["rows"] |= measure_memory(of_group, options, end)
            else:
                report["rows"] |= measure_group(of_group, setting, options.rounds, end)
                torch.compiler.reset()
            write(report, options)
    return report


def measure_memory(rows: list[Row], options: argparse.Namespace, end: float) -> dict[str, dict[str, Any]]:
    """Measure the memory of each row in a process of its own."""
    results = {}
    for row in rows:
        found: dict[str, Any] = {"unavailable": TOO_LATE}
        if time.perf_counter() < end:
            found = measure_apart(row, Path(__file__).resolve(), words_of(options))
        results[row.name] = described(row) | found
        print(f"{row.name}: {found.get('unavailable', 'measured')}", flush=True)
    return results


def words_of(options: argparse.Namespace) -> list[str]:
    """The options a process for one row's memory needs."""
    words = {name: getattr(options, name) for name in ("runs", "backbone", "dtype", "device", "seed", "threads")}
    return [word for name, value in words.items() if value is not None for word in (f"--{name}", str(value))]


def write(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write both files."""
    folder = Path(options.runs)
    folder.mkdir(parents=True, exist_ok=True)
    ratios = ratios_of(report["rows"], every=ExpertLoadMonitor().every_n_steps)
    report = {**report, "ratios": [ratio._asdict() for ratio in ratios]}
    (folder / "step_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "step_cost.md").write_text(markdown(report, ratios) + "\n")


def read_rows(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of several files of results; of a row that several have, the last one's."""
    return {
        name: row for path in paths for name, row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"].items()
    }


def main(words: list[str] | None = None) -> None:
    """Measure, or do one of the small things."""
    options = parsed(words)
    warnings.filterwarnings("ignore", message=".*Online softmax is disabled.*")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.summary:
        print(summary(read_rows(options.summary)), end="")
    elif options.list:
        print(*(row.name for row in chosen_rows(options)), sep="\n")
    elif options.memory_row:
        row = next(row for row in all_rows() if row.name == options.memory_row)
        with own_compiler_cache():
            try:
                print(json.dumps(measure_here(row, setting_of(options))))
            except UnavailableError as error:
                print(json.dumps({"unavailable": str(error)}))
    else:
        begun = time.perf_counter()
        measure(options)
        print((Path(options.runs) / "step_cost.md").read_text())
        print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
