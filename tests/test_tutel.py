"""TutelGate: its rule of normalising, cosine scorer and noise, against the dense oracle and Tutel's own formulas."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from builders import IN, OUT, experts_of, layer_of, randomise, recorded, site_of
from dense_comparison import assert_equals_dense, assert_finite, layer_in_float64
from gate_cases import COUNT, inputs
from reference import Expert
from reference_gates import tutel_weights
from torch.nn import functional as F

from radargate_pl.gates import StretchGate, TutelGate
from radargate_pl.rotations import RadarRotation

OPTIONS = [
    {"kind": kind, "top_k": top_k, "normalize": normalize, "projection": 7}
    for kind, top_k, normalize in itertools.product(("linear", "cosine"), (1, 2, COUNT), (True, False))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rotates", [False, True], ids=["plain", "rotated"])
def test_it_equals_the_dense_reference(options: dict, rotates: bool) -> None:
    experts = experts_of(COUNT)
    rotation = {"rotation": RadarRotation} if rotates else {}
    layer = layer_in_float64(TutelGate, experts, **options, **rotation)
    assert_equals_dense(layer, experts, inputs(), tutel_weights, **options)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_noise_of_training_is_on_the_logits_and_divided_by_the_experts(kind: str) -> None:
    experts, x = experts_of(COUNT), inputs()
    layer = layer_in_float64(TutelGate, experts, kind=kind, noise=3.0).train()
    torch.manual_seed(17)  # as the comparison does
    drawn = torch.randn(len(x), COUNT, dtype=torch.float64)
    assert_equals_dense(layer, experts, x, tutel_weights, kind=kind, noise=3.0, drawn=drawn)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert_equals_dense(layer, experts, x, tutel_weights, kind=kind, noise=3.0)
    assert torch.equal(layer(x), layer(x))


def test_without_noise_no_random_number_is_drawn() -> None:
    layer = layer_in_float64(TutelGate, experts_of(COUNT)).train()
    before = torch.get_rng_state()
    layer(inputs())
    assert torch.equal(torch.get_rng_state(), before)


def test_cosine_logits_are_those_of_tutels_code() -> None:
    """`logit_scale * F.normalize(projector(x), dim=1) @ F.normalize(sim_matrix, dim=0)` with its clamp."""
    layer = layer_in_float64(TutelGate, experts_of(COUNT), kind="cosine", projection=5)
    x, scorer = inputs(), layer.gate.scorer
    for scale in (-1.0, 0.3, math.log(100.0) + 2):
        with torch.no_grad():
            scorer.scale.fill_(scale)
        projected = F.linear(x, scorer.weight, scorer.bias)
        directions = F.normalize(projected, dim=1) @ F.normalize(scorer.similarity.T, dim=0)
        expected = torch.clamp(scorer.scale, max=math.log(100.0)).exp() * directions
        torch.testing.assert_close(recorded(layer, x)[1].logits, expected, rtol=1e-9, atol=0)


def test_a_scale_beyond_its_limit_gets_no_gradient_and_one_below_does() -> None:
    layer = layer_in_float64(TutelGate, experts_of(COUNT), kind="cosine", top_k=1)
    for scale, learns in ((1.0, True), (5.0, False)):
        with torch.no_grad():
            layer.gate.scorer.scale.fill_(scale)
        layer.zero_grad()
        layer(inputs()).sum().backward()
        assert bool(layer.gate.scorer.scale.grad != 0) is learns


def test_starts() -> None:
    torch.manual_seed(0)
    site = site_of(48)
    linear, cosine = TutelGate(site).scorer, TutelGate(site, kind="cosine").scorer
    assert torch.equal(linear.weight, StretchGate(site).scorer.weight)  # a comparison of the two is paired
    assert cosine.weight.shape == (256, site.in_features)
    assert cosine.weight.abs().max() <= site.in_features**-0.5
    assert cosine.bias.abs().max() <= site.in_features**-0.5
    assert cosine.similarity.shape == (len(site.experts), 256)
    assert cosine.similarity.std().item() == pytest.approx(0.01, rel=0.15)
    assert cosine.scale.item() == pytest.approx(math.log(2.0))
    assert {p.dtype for p in (*linear.parameters(), *cosine.parameters())} == {torch.float32}
    again = TutelGate(site, kind="cosine").scorer
    assert all(torch.equal(a, b) for a, b in zip(cosine.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_parameter_learns_from_the_start(kind: str, top_k: int) -> None:
    torch.manual_seed(0)
    layer = layer_of(experts_of(3, dtype=torch.float32), partial(TutelGate, kind=kind, top_k=top_k, noise=0.1))
    layer.train()
    (layer(torch.randn(20, IN)) * torch.randn(20, OUT)).sum().backward()
    assert all((p.grad != 0).any() for p in layer.gate.parameters())


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_edge_cases_give_no_nan(kind: str, top_k: int) -> None:
    experts = experts_of(3)
    zero = {n: Expert(e.lora_A, torch.zeros_like(e.lora_B), e.scaling) for n, e in experts.items()}
    same = dict.fromkeys(experts, experts["e0"])
    for case in (experts_of(1), zero, same):
        layer = layer_in_float64(TutelGate, case, kind=kind, top_k=min(top_k, len(case)))
        assert_finite(layer, inputs())
        assert_finite(layer, torch.zeros(3, IN, dtype=torch.float64))
    with torch.no_grad():
        for parameter in layer.gate.parameters():
            parameter.zero_()
    x = inputs().requires_grad_()
    assert_finite(layer, x)
    if kind == "cosine":  # everything is zero: finite, and far from F.normalize's 1e12
        (gradient,) = torch.autograd.grad(layer.gate.scorer(x, None, layer.bank).sum(), layer.gate.scorer.bias)
        assert gradient.abs().max() < 1e7


def test_ties_go_to_the_first_experts() -> None:
    layer = layer_in_float64(TutelGate, experts_of(COUNT), top_k=2)
    with torch.no_grad():
        layer.gate.scorer.weight.zero_()
    assert recorded(layer, inputs())[1].indices.tolist() == [[0, 1]] * len(inputs())


def test_the_scorer_stays_in_float32() -> None:
    layer = layer_of(experts_of(3, dtype=torch.bfloat16), partial(TutelGate, kind="cosine"))
    randomise(layer.gate)
    layer.to(torch.bfloat16)
    assert {p.dtype for p in layer.gate.parameters()} == {torch.float32}
    _, record = recorded(layer, inputs(dtype=torch.bfloat16))
    assert record.logits.dtype == record.weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k to be at least 1, but got 0"),
        ({"top_k": 4}, "top_k to be at most the number of experts, 3"),
        ({"kind": "dot"}, "kind to be 'linear' or 'cosine', but got 'dot'"),
        ({"projection": 0}, "projection to be at least 1, but got 0"),
        ({"noise": -1.0}, "noise to be at least 0 and finite, but got -1.0"),
        ({"noise": math.nan}, "noise to be at least 0 and finite, but got nan"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(experts_of(3), partial(TutelGate, **options))
