"""Random starts that depend on the run's seed and a name, not on what was drawn before (layer 1)."""

import hashlib
import math

import torch
from torch import nn


def generator_for(*names: str) -> torch.Generator:
    """Return a generator seeded by the run's seed and these names.

    Draws of one part then leave every other part alone: RadarGate and StretchGate of the same seed start from the same
    scorers (a comparison of the two is paired), and an expert starts the same alone and in a library.

    Args:
        names: what is drawn, e.g. a layer path and a parameter.

    Returns:
        A generator on the CPU; the global one is not touched.

    Example:
        >>> first, again, other = (torch.rand(1, generator=generator_for(name)) for name in ("a", "a", "b"))
        >>> torch.equal(first, again), torch.equal(first, other)
        (True, False)
    """
    text = "/".join((str(torch.initial_seed()), *names))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))


def uniform_parameter(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """Return a float32 parameter drawn uniformly from +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
