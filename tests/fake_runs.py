"""Run folders as finished runs leave them, written by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def summary_of(
    tasks: Mapping[str, tuple[float, float, int]], command: str = "validate", **facts: Any
) -> dict[str, Any]:
    """The summary of a command with these (loss, exact match, n) per task."""
    scores = {name: {"loss": loss, "exact_match": exact, "n": n} for name, (loss, exact, n) in tasks.items()}
    mean = {key: sum(score[key] for score in scores.values()) / len(scores) for key in ("loss", "exact_match")}
    return {
        "format_version": 1,
        "command": command,
        "status": "ok",
        "fingerprints": {"backbone": "sha256:b", "experts": {}},
        "precision": "32-true",
        "steps": 120,
        "tasks": scores,
        "mean": {**mean, "n": sum(score["n"] for score in scores.values())},
        "rotation": {"rms_angle_rad": None},
        "earlier": {},
        **facts,
    }


def write_run(folder: Path, tasks: Mapping[str, tuple[float, float, int]], **facts: Any) -> Path:
    """A run folder with a summary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary_of(tasks, **facts)))
    return folder


def write_curve(folder: Path, start: float, end: float, steps: int = 120, seed: int = 0) -> None:
    """A noisy curve that comes down, with its average."""
    from radargate_pl.callbacks.loss_convergence import exponential_average

    noise = random.Random(seed)
    losses = [end + (start - end) * math.exp(-step / 25) + noise.gauss(0, 0.12) for step in range(steps)]
    curve = {"first_step": 1, "loss": losses, "ema": exponential_average(losses, 0.9)}
    (folder / "convergence.json").write_text(json.dumps(curve))


def write_angles(folder: Path, blocks: int = 2, experts: tuple[str, ...] = ("a", "b"), scale: float = 0.1) -> None:
    """Angles of two validations that grow with the block."""
    lines = [
        "step,layer,expert,tokens,angle_mean,angle_mean_abs,angle_rms,beyond_quarter_pi,cosine_before,cosine_after"
    ]
    for step, factor in ((60, 0.5), (120, 1.0)):
        for block in range(blocks):
            for module, weight in (("q_proj", 1.0), ("v_proj", 1.6)):
                for index, expert in enumerate(experts):
                    angle = factor * scale * weight * (1 + block / blocks) * (1 + 0.2 * math.sin(3 * index + block))
                    layer = f"model.layers.{block}.self_attn.{module}"
                    lines.append(f"{step},{layer},{expert},{100 + index},0.0,{0.8 * angle},{angle},0.0,0.5,0.4")
    (folder / "angles.csv").write_text("\n".join(lines) + "\n")
