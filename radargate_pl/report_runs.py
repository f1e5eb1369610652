"""What finished runs left behind, read from their folders (JSON and CSV only, no torch)."""

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# Where the scores of a split stand, the newest first: a fit outdates what was written before it.
COMMANDS_OF_SPLIT = {"validation": ("validate", "fit"), "test": ("test",)}


@dataclass(frozen=True)
class Scores:
    """Scores of one task, or their mean over tasks.

    Attributes:
        loss: in nats per answer token.
        exact_match: share of examples, in [0, 1].
        n: number of examples.
    """

    loss: float
    exact_match: float
    n: int


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        tasks: scores by task.
        mean: their plain mean over tasks.
        rms_angle: RMS angle of the rotations in radians, if any.
        steps: optimiser steps behind the weights.
        facts: what must be equal for runs to be comparable (fingerprints, versions, ...).
    """

    folder: Path
    tasks: dict[str, Scores]
    mean: Scores
    rms_angle: float | None
    steps: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, or a single run.

    Attributes:
        name: shown in tables and plots.
        runs: at least one.
    """

    name: str
    runs: tuple[Run, ...]

    def values(self, task: str | None, field: str) -> list[float]:
        """One number per run that has it.

        Args:
            task: its name; ``None`` is the mean over tasks.
            field: ``loss`` or ``exact_match``.
        """
        scores = [run.mean if task is None else run.tasks.get(task) for run in self.runs]
        return [getattr(score, field) for score in scores if score is not None]

    @property
    def angles(self) -> list[float]:
        """RMS angle of each run that rotates, in radians."""
        return [run.rms_angle for run in self.runs if run.rms_angle is not None]


def read_group(folder: Path, name: str | None = None, split: str = "validation") -> Group:
    """Read a run folder, or a folder of run folders that are its seeds.

    Args:
        folder: holds ``summary.json``, or folders that do.
        name: shown name; that of the folder if not given.
        split: ``validation`` or ``test``.

    Raises:
        ValueError: if there is no run, or one without scores.
    """
    if (folder / "summary.json").exists():
        folders = [folder]
    else:
        folders = sorted(path.parent for path in folder.glob("*/summary.json"))
    if not folders:
        raise ValueError(
            f"Expected {folder} to be a run folder (with summary.json) or a folder of such, but found neither; "
            "give trainer.default_root_dir of a finished run"
        )
    return Group(name or folder.name, tuple(read_run(path, split) for path in folders))


def read_run(folder: Path, split: str = "validation") -> Run:
    """Read one run folder.

    Args:
        folder: holds ``summary.json``.
        split: ``validation`` or ``test``.

    Raises:
        ValueError: if the file cannot be read or has no scores of that split.
    """
    path = folder / "summary.json"
    try:
        summaries = _summaries(json.loads(path.read_text(encoding="utf-8")))
        for command in COMMANDS_OF_SPLIT[split]:
            summary = summaries.get(command)
            if summary and summary["tasks"] and _has_losses(summary):
                return _run(folder, summary)
        newest = next(iter(summaries.values()))["status"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, StopIteration) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"Expected {path} to be a run's summary, but could not read it: {what}") from error
    raise ValueError(
        f"Expected {path} to hold {split} scores, but found none (commands: {', '.join(summaries)}; the last one's "
        f"status: {newest}); run `radargate {COMMANDS_OF_SPLIT[split][0]} --config {folder}/config.yaml`. "
        "Scores of benchmarks have no loss: they are in test/<task>/results.json"
    )


def _summaries(newest: Any) -> dict[str, Any]:
    """Command to its summary, the newest first; a failed newest one gives way."""
    if not isinstance(newest, dict):
        raise TypeError(f"expected a JSON object, found {type(newest).__name__}")
    return {newest["command"]: newest, **newest.get("earlier", {})}


def _run(folder: Path, summary: dict[str, Any]) -> Run:
    return Run(
        folder=folder,
        tasks={name: _scores(values) for name, values in summary["tasks"].items()},
        mean=_scores(summary["mean"]),
        rms_angle=summary["rotation"]["rms_angle_rad"],
        steps=summary["steps"],
        facts={"backbone": (summary["fingerprints"] or {}).get("backbone"), "precision": summary["precision"]},
    )


def _has_losses(summary: dict[str, Any]) -> bool:
    return all("loss" in values for values in summary["tasks"].values())


def task_names(groups: Iterable[Group]) -> list[str]:
    """All tasks of all runs, in the order they first appear."""
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.tasks))


def differences(groups: Sequence[Group]) -> list[str]:
    """What keeps the runs from being comparable, in words; empty if nothing does."""
    runs = [run for group in groups for run in group.runs]
    notes = []
    for fact in ("backbone", "precision"):
        values = list(dict.fromkeys(str(run.facts[fact]) for run in runs))
        if len(values) > 1:
            notes.append(f"The runs differ in {fact}: {', '.join(values)}.")
    for task in task_names(groups):
        counts = sorted({run.tasks[task].n for run in runs if task in run.tasks})
        if len(counts) > 1:
            notes.append(f"The runs differ in the number of {task} examples: {', '.join(map(str, counts))}.")
        if any(task not in run.tasks for run in runs):
            notes.append(f"Not every run has {task}.")
    return notes


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation if there are two or more.

    Example:
        >>> spread([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    return mean(values), stdev(values) if len(values) > 1 else None


def read_losses(folder: Path) -> tuple[list[int], list[float], list[float]] | None:
    """Training loss of each optimiser step.

    Args:
        folder: a run folder with ``convergence.json``, or at least ``metrics.csv``.

    Returns:
        Steps, losses in nats, and their moving average (empty when only ``metrics.csv`` is there); ``None`` without
        any.
    """
    path = folder / "convergence.json"
    if path.exists():
        try:
            curve = json.loads(path.read_text(encoding="utf-8"))
            steps = range(curve["first_step"], curve["first_step"] + len(curve["loss"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Expected {path} to be a run's loss curve, but could not read it: {error!r}") from error
        return list(steps), curve["loss"], curve["ema"]
    rows = [row for row in read_csv(folder / "metrics.csv") if row.get("train/loss")]
    if not rows:
        return None
    return [int(row["step"]) + 1 for row in rows], [float(row["train/loss"]) for row in rows], []


def read_angles(folder: Path) -> list[dict[str, str]]:
    """Rows of ``angles.csv`` of the last validation: one per layer and expert; empty without rotations."""
    rows = read_csv(folder / "angles.csv")
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def rms_by_layer(rows: Iterable[dict[str, str]]) -> dict[str, float]:
    """RMS angle of each layer over its experts, weighted by tokens, in radians.

    Args:
        rows: of `read_angles`.
    """
    sums: dict[str, tuple[float, float]] = {}
    for row in rows:
        tokens = float(row["tokens"])
        if tokens:
            squares, count = sums.get(row["layer"], (0.0, 0.0))
            sums[row["layer"]] = (squares + tokens * float(row["angle_rms"]) ** 2, count + tokens)
    return {layer: math.sqrt(squares / count) for layer, (squares, count) in sums.items()}


def split_layer(path: str) -> tuple[int | None, str]:
    """Number of the block and name of the module in a layer's path.

    Example:
        >>> split_layer("model.layers.12.self_attn.v_proj")
        (12, 'v_proj')
    """
    number = re.search(r"\.(\d+)\.", path)
    return (int(number.group(1)) if number else None), path.rpartition(".")[2]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by column name; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _scores(values: dict[str, Any]) -> Scores:
    def number(value: float | None) -> float:  # NaN is stored as null
        return math.nan if value is None else value

    return Scores(number(values["loss"]), number(values["exact_match"]), values["n"])
