"""From the answers of a task to its scores: `results.json`, and the table over all tasks (layer 5)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from radargate_pl.benchmarks import Benchmark, Protocol
from radargate_pl.scoring import Measure, Row, levels, measure

FORMAT_VERSION = 2


def scores_of(benchmark: Benchmark, protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score the answers of one task.

    Args:
        benchmark: its declaration; the first of its metrics is the score.
        protocol: how the answers came about; ranking adds ``accuracy_bytes``.
        rows: lines of ``predictions.jsonl``, at least one.

    Returns:
        ``score`` and ``metrics`` with their 95 % intervals (``None`` where the examples tell none), ``n``, ``majority``
        and ``chance``, what the score is for the most frequent position of the right choice and for a choice by lot
        (``None`` for open questions), and ``truncated`` (prompts that lost their middle).
    """
    labels = [str(label) for label in benchmark.labels]
    metrics = {
        name: measure(name, [_scored(row, row["correct"]) for row in rows], labels) for name in benchmark.metrics
    }
    if protocol == "ranking":
        by_bytes = [_scored(row, row["choices"][row["chosen_bytes"]] == row["answer"]) for row in rows]
        metrics["accuracy_bytes"] = measure("accuracy", by_bytes)
    first = benchmark.metrics[0]
    majority, chance = levels(first, [(row.get("choices") or (), row["answer"]) for row in rows])
    return {
        "score": {"name": first, **_numbers(metrics[first])},
        "metrics": {name: {**_numbers(found), "n": found.n} for name, found in metrics.items()},
        "n": len(rows),
        "majority": majority,
        "chance": chance,
        "truncated": sum(row["truncated"] for row in rows),
        "gate_summary": mean_gate_summary([row["gate"] for row in rows]),
    }


def _scored(row: Mapping[str, Any], is_correct: bool) -> Row:
    others = tuple(answer for answer in row.get("targets", ()) if answer != row["answer"])
    return Row(is_correct, row["extracted"], row["answer"], row["output"], row.get("value"), others)


def _numbers(found: Measure) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high}


def mean_gate_summary(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over examples of the share of each top expert, and the root of the mean squared RMS angle."""
    listed = list(summaries)
    names = dict.fromkeys(name for summary in listed for name in summary["top_expert_share"])
    shares = {n: sum(summary["top_expert_share"].get(n, 0.0) for summary in listed) / len(listed) for n in names}
    angles = [summary["rms_angle_rad"] for summary in listed if summary["rms_angle_rad"] is not None]
    rms = math.sqrt(sum(angle**2 for angle in angles) / len(angles)) if angles else None
    return {"top_expert_share": shares, "rms_angle_rad": rms}


def summary_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What ``summary.json`` says of a test on benchmarks.

    Args:
        results: content of ``results.json`` by task, at least one.

    Returns:
        ``tasks``; ``mean``, the plain mean of the scores where all have the same name; ``rotation``.
    """
    kept = ("n", "chance", "majority", "protocol", "prompt_version", "seconds")
    tasks = {task: {"score": found["score"], **{name: found[name] for name in kept}} for task, found in results.items()}
    scores = [found["score"] for found in results.values()]
    names = {score["name"] for score in scores}
    mean = (
        {"name": names.pop(), "value": sum(score["value"] for score in scores) / len(scores)}
        if len(names) == 1
        else None
    )
    angles = mean_gate_summary(found["gate_summary"] for found in results.values())
    return {"tasks": tasks, "mean": mean, "rotation": {"rms_angle_rad": angles["rms_angle_rad"]}}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores of all tasks as aligned text.

    Args:
        results: content of ``results.json`` by task.
    """
    rows = [("task", "n", "score", "", "95 % interval", "chance", "majority", "protocol", "seconds")]
    for task, found in results.items():
        score, levels = found["score"], [found["chance"], found["majority"]]
        interval = " - ".join(dict.fromkeys(_shown(score[end], score) for end in ("low", "high")))
        named = (score["name"], _shown(score["value"], score), interval)
        rows.append(
            (
                task,
                str(found["n"]),
                *named,
                *(_shown(v, score) for v in levels),
                found["protocol"],
                f"{found['seconds']:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_text = (0, 2, 7)
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in is_text else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _shown(value: float | None, score: Mapping[str, Any]) -> str:
    """BLEU and chrF are percentages already."""
    return "-" if value is None else f"{value:.1f}" if score["name"] in ("bleu", "chrf") else f"{value:.3f}"
