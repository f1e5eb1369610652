"""The gates and options whose oracle tests compare with the dense reference, and the layers they are built into."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from builders import IN, layer_of, randomise
from reference import Dense, Expert, dense_layer
from torch import Tensor

from radargate_pl.gates import Context, FixedGate, RadarGate, RotationGate, StretchGate, TaskGate, UniformGate
from radargate_pl.moe import MoELinear

TOKENS = 5
COUNT = 4


class Case(NamedTuple):
    """One gate with its options, and what the reference needs to know beyond them."""

    gate: type
    options: dict
    fixed: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return "-".join([self.gate.__name__, *(f"{k}={v}" for k, v in self.options.items() if k != "weights")])


CASES = [
    *(
        Case(RadarGate, {"scorer": s, "angle_norm": a, "renormalize": r, "temperature": t, "top_k": k})
        for s, a, (r, t), k in itertools.product(
            ("x", "experts"), ("none", "rms"), (("auto", 1.0), ("always", 0.6), ("never", 1.7)), (1, 2, COUNT)
        )
    ),
    *(
        Case(StretchGate, {"scorer": s, "renormalize": r, "temperature": t, "top_k": k})
        for s, (r, t), k in itertools.product(
            ("x", "experts"), (("auto", 0.6), ("always", 1.7), ("never", 1.0)), (1, 2, COUNT)
        )
    ),
    *(Case(RotationGate, {"angle_norm": a, "top_k": k}) for a, k in itertools.product(("none", "rms"), (1, 2, COUNT))),
    Case(UniformGate, {}, (1 / COUNT,) * COUNT),
    Case(FixedGate, {"weights": {"e0": 0.25, "e2": -1.5, "e3": 0.5}}, (0.25, 0.0, -1.5, 0.5)),
    Case(FixedGate, {"weights": {"e1": 1.0}}, (0.0, 1.0, 0.0, 0.0)),
    Case(TaskGate, {}, (0.0, 0.0, 1.0, 0.0)),
]


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float64, seed: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.4 * torch.randn(tokens, IN, generator=generator, dtype=torch.float64)).to(dtype)


def build(case: Case, experts: Mapping[str, Expert], **kwargs: object) -> MoELinear:
    """The product's layer with every gate parameter away from its start, in the experts' dtype."""
    context = Context()
    if case.gate is TaskGate:
        context.replace(expert=torch.full((1,), 2))
    layer = layer_of(experts, partial(case.gate, **case.options), context=context, **kwargs)
    if next(iter(experts.values())).lora_A.dtype == torch.float64:
        layer.gate.double()
    randomise(layer.gate)
    return layer


def dense(case: Case, layer: MoELinear, experts: Mapping[str, Expert], x: Tensor) -> Dense:
    """The reference from the layer's live parameters (same leaves, so that gradients compare)."""
    state = dict(layer.named_parameters())
    options = {k: v for k, v in case.options.items() if k != "weights"}
    if case.fixed is not None:
        options["fixed"] = case.fixed
    return dense_layer(x, list(experts.values()), state, gate=case.gate.__name__, **options)
