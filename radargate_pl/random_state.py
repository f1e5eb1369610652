"""The state of every source of random numbers of a process, as data that opens with ``weights_only=True`` (layer 5)."""

import random
from typing import Any

import numpy
import torch

CPU = torch.device("cpu")


def random_state(device: torch.device = CPU) -> dict[str, Any]:
    """Return the state of Python, NumPy, torch on the CPU and on a process's own device.

    Args:
        device: what the process computes on; its number may be another one when the state is put back.

    Returns:
        Tensors and numbers only.
    """
    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(keys.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device = CPU) -> None:
    """Put every source back into a state that `random_state` returned.

    Args:
        state: of any process.
        device: what this process computes on; left alone if the state comes from a process without a CUDA device.
    """
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    legacy = state["numpy"]
    keys = legacy["keys"].numpy().astype("uint32")
    numpy.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Give a process random numbers of its own: dropout masks of ranks must differ.

    Args:
        seed: of the run.
        rank: number of the process.
        step: optimiser steps behind it, so that a process that joins a resumed fit does not repeat old numbers.
    """
    own = (seed + 1_000_003 * rank + 7_919 * step) % 2**32
    random.seed(own)
    numpy.random.seed(own)
    torch.manual_seed(own)
