"""Two runs are the same run: every tensor of their last checkpoints bit for bit, every logged number as text."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_OF_THE_MACHINE = re.compile(r"second|time|memory|throughput")
_COMPARED = ("state_dict", "optimizer_states", "global_step", "epoch")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")
    else:
        yield path, value


def leaves_of(folder: Path) -> dict[str, Any]:
    """Parameters, moments and counts of a run's last checkpoint by their path."""
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return dict(_leaves({name: checkpoint[name] for name in _COMPARED}))


def metrics_of(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without empty cells and without what depends on the machine."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not _OF_THE_MACHINE.search(k)} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


def differences(first: Path, second: Path) -> list[str]:
    """What differs between two run folders; empty if nothing does."""
    one, other = leaves_of(first), leaves_of(second)
    found = [f"only one has {path}" for path in sorted(one.keys() ^ other.keys())]
    for path in one.keys() & other.keys():
        same = torch.equal(one[path], other[path]) if isinstance(one[path], torch.Tensor) else one[path] == other[path]
        if not same:
            found.append(f"{path} differs")
    rows, other_rows = metrics_of(first), metrics_of(second)
    if len(rows) != len(other_rows):
        found.append(f"{len(rows)} and {len(other_rows)} rows of metrics")
    found += [f"{row} and {other}" for row, other in zip(rows, other_rows, strict=False) if row != other]
    return found
