"""Gates whose latents a layer with many experts leaves out: those that say so themselves, and never by mistake."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from builders import IN, assert_near, experts_of, layer_of, randomise
from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.fast_mixture import reads_input
from radargate_pl.gates import Context, Gate, RadarGate, Routing, Site, StretchGate, TutelGate
from radargate_pl.gates.scorers import InputScorer
from radargate_pl.moe import MoELinear
from radargate_pl.ops import dense_weights

MANY = 40


def layer_with(gate: Callable[[Site], Gate]) -> MoELinear:
    layer = layer_of(experts_of(MANY, dtype=torch.float32), gate)
    randomise(layer.gate)
    return layer


def tokens() -> Tensor:
    return torch.randn(32, IN, generator=torch.Generator().manual_seed(1))


def is_left_without(layer: MoELinear) -> bool:
    return reads_input(tokens(), layer.gate, layer.bank, layer.combine, None)


class Loud:
    """A `forward` that reads latents, to be put before any gate's own."""

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        weights, indices, logits = super().forward(x, latents, bank, context)
        return Routing(weights * (1 + latents.detach().norm(dim=-1).gather(-1, indices)), indices, logits)


class SaysSo(Loud, StretchGate):
    reads_latents = True


class SaysSoLater(Loud, StretchGate):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.reads_latents = True


class SaysNothing(Loud, RadarGate):
    pass


class AlsoSaysNothing(Loud, TutelGate):
    pass


class LoudScorer(InputScorer):
    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank) -> Tensor:
        return super().forward(x, latents, bank) + latents.norm(dim=-1)


class HasALoudScorer(RadarGate):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.scorer = LoudScorer(site)


class Dense(StretchGate):
    """Ignores latents, and says nothing of the indices it keeps."""

    reads_latents = False

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        weights, indices, logits = super().forward(x, latents, bank, context)
        return Routing(dense_weights(weights, indices, bank.num_experts), None, logits)


class DenseRotation(Dense, RadarGate):
    reads_latents = False


def assert_equal_forms(layer: MoELinear) -> None:
    x = tokens().requires_grad_()
    found = []
    for mixture in ("auto", "plain"):
        layer.mixture = mixture
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.gate.parameters()])])
    for ours, plain in zip(*found, strict=True):
        assert_near(ours, plain, 2e-5, f"{tuple(plain.shape)}")


@pytest.mark.parametrize("gate", [SaysSo, SaysSoLater, SaysNothing, AlsoSaysNothing, HasALoudScorer])
def test_a_gate_that_reads_latents_gets_them(gate: type[Gate]) -> None:
    assert_equal_forms(layer_with(gate))


@pytest.mark.parametrize("gate", [Dense, DenseRotation])
def test_a_gate_that_ignores_them_may_weigh_all_experts(gate: type[Gate]) -> None:
    layer = layer_with(gate)
    assert is_left_without(layer)
    assert_equal_forms(layer)


class Renamed(RadarGate):
    """Another name and nothing else."""


@pytest.mark.parametrize("gate", [StretchGate, RadarGate, Renamed, TutelGate, partial(TutelGate, kind="cosine")])
def test_gates_that_ignore_them_do_without(gate: Callable[[Site], Gate]) -> None:
    assert is_left_without(layer_with(gate))
    assert not is_left_without(layer_with(partial(RadarGate, scorer="experts")))


@pytest.mark.parametrize("part", ["gate", "gate.scorer"])
def test_hooks_see_latents(part: str) -> None:
    layer, seen = layer_with(RadarGate), []
    layer.get_submodule(part).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].shape[-1]))
    layer(tokens().requires_grad_())
    assert seen == [layer.bank.rank]
