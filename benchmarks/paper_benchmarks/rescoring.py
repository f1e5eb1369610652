"""Scores of tests that were made by an earlier version, from the answers they kept."""

import json
from pathlib import Path

from radargate_pl.atomic_files import write_json
from radargate_pl.benchmark_results import scores_of
from radargate_pl.benchmarks import Benchmark


def rescore(run: Path, benchmark: Benchmark) -> bool:
    """Score the answers of a finished test by this version's rules; what was found right stays as it was judged.

    Args:
        run: the run folder.
        benchmark: the task.

    Returns:
        Whether a score or an interval came out otherwise; `results.json` is written anew then.
    """
    folder = run / "test" / benchmark.name
    path = folder / "results.json"
    if not path.exists():
        return False
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = scores_of(benchmark, results["protocol"], rows)
    if all(results[name] == value for name, value in scores.items()):
        return False
    write_json(path, results | scores)
    return True
