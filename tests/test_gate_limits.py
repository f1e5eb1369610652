"""Where gates must agree with simpler ones: Q = 0, one expert, all experts, ties, and experts that say nothing."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from builders import assert_near, experts_of, layer_of, randomise, recorded
from gate_cases import COUNT, TOKENS, Case, build, inputs
from reference import Expert, expert_outputs

from radargate_pl.gates import RadarGate, RotationGate, StretchGate
from radargate_pl.ops import dense_weights


@pytest.mark.parametrize("scorer", ["x", "experts"])
@pytest.mark.parametrize("renormalize", ["auto", "always", "never"])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
def test_q_zero_is_the_stretch_gate(scorer: str, renormalize: str, top_k: int) -> None:
    """4e-6 relative between the path that lifts each expert and the one GEMM of pure weighted sums."""
    options = {"scorer": scorer, "renormalize": renormalize, "top_k": top_k}
    experts = experts_of(COUNT, dtype=torch.float32)
    radar, stretch = build(Case(RadarGate, options), experts), build(Case(StretchGate, options), experts)
    torch.nn.init.zeros_(radar.gate.rotation.Q)
    radar.gate.scorer.load_state_dict(stretch.gate.scorer.state_dict())
    x = inputs(64, torch.float32)
    stretched, rotated = recorded(stretch, x), recorded(radar, x)
    assert torch.equal(stretched[1].weights, rotated[1].weights)
    assert_near(rotated[0], stretched[0], 4e-6, "output")
    # On the same path of mix, bit for bit: StretchGate sent through the lift by a rotation that returns its input.
    stretch.gate.rotation.acts_on_outputs = True
    stretch.mixture = radar.mixture = "plain"
    assert torch.equal(stretch(x), radar(x))


@pytest.mark.parametrize("angle_norm", ["none", "rms"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4])
def test_one_expert_is_never_rotated(angle_norm: str, dtype: torch.dtype, rank: int) -> None:
    experts = experts_of(1, dtype=dtype, ranks=(rank,), scalings=(13.0639,), out_features=33)
    layer = build(Case(RadarGate, {"angle_norm": angle_norm, "top_k": 1}), experts)
    randomise(layer.gate, scale=30.0)
    x = inputs(50, dtype).requires_grad_()
    y, record = recorded(layer, x)
    assert record.angles.abs().max() == 0
    stretch = build(Case(StretchGate, {"top_k": 1}), experts)
    stretch.gate.scorer.load_state_dict(layer.gate.scorer.state_dict())
    assert_near(y, stretch(x), {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-6}[dtype], "output")
    y.float().sin().sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *layer.gate.parameters()))


@pytest.mark.parametrize("gate", [RadarGate, RotationGate, StretchGate])
@pytest.mark.parametrize("angle_norm", ["none", "rms"])
@pytest.mark.parametrize("scorer", ["x", "experts"])
@pytest.mark.parametrize("kind", ["fresh", "identical", "opposite", "zero input"])
def test_degenerate_experts_give_no_nan(gate: type, angle_norm: str, scorer: str, kind: str) -> None:
    for dtype, top_k in itertools.product((torch.float32, torch.bfloat16), (1, 2, COUNT)):
        options = {"top_k": top_k} | ({"angle_norm": angle_norm} if gate is not StretchGate else {})
        options |= {"scorer": scorer} if gate is not RotationGate else {}
        first = experts_of(1, dtype=dtype, ranks=(3,), scalings=(4.0,))["e0"]
        experts = {f"e{i}": first for i in range(COUNT)}
        if kind == "fresh":
            experts = {n: e._replace(lora_B=0 * e.lora_B) for n, e in experts.items()}
        if kind == "opposite":  # S = 0, so that S - v_i = -v_i; the LayerNorm has mean zero
            experts = {n: e._replace(lora_B=e.lora_B * (-1) ** i) for i, (n, e) in enumerate(experts.items())}
        layer = build(Case(gate, options), experts)
        x = (inputs(dtype=dtype) * (0 if kind == "zero input" else 1)).requires_grad_()
        y = layer(x)
        (y.float() * torch.randn(y.shape)).sum().backward()
        assert y.isfinite().all()
        for tensor in (x, *layer.gate.parameters()):
            assert tensor.grad is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize("scorer", ["x", "experts"])
@pytest.mark.parametrize("gate", [StretchGate, RadarGate])
def test_all_experts_kept_is_the_dense_softmax(gate: type, scorer: str) -> None:
    experts = experts_of(COUNT)
    for renormalize in ("auto", "always", "never"):
        layer = build(Case(gate, {"top_k": COUNT, "scorer": scorer, "renormalize": renormalize}), experts)
        _, record = recorded(layer, inputs())
        assert record.indices is None
        torch.testing.assert_close(record.weights, torch.softmax(record.logits, -1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("gate", [StretchGate, RadarGate])
@pytest.mark.parametrize("scorer", ["x", "experts"])
@pytest.mark.parametrize(("renormalize", "learns"), [("auto", True), ("never", True), ("always", False)])
def test_top_1_has_a_scorer_gradient_unless_always_renormalised(
    gate: type, scorer: str, renormalize: str, learns: bool
) -> None:
    experts = experts_of(COUNT)
    layer = build(Case(gate, {"top_k": 1, "scorer": scorer, "renormalize": renormalize}), experts)
    layer(inputs()).sin().sum().backward()
    largest = layer.gate.scorer.weight.grad.abs().max()
    assert (largest > 1e-4) if learns else (largest == 0)


def test_ties_go_to_the_lowest_index_in_every_selecting_gate() -> None:
    first = experts_of(1)["e0"]
    experts = {f"e{i}": first for i in range(40)}
    for gate in (StretchGate, RadarGate, RotationGate):
        layer = build(Case(gate, {"top_k": 2}), experts)
        if gate is not RotationGate:
            torch.nn.init.zeros_(layer.gate.scorer.weight)
        _, record = recorded(layer, inputs())
        assert record.indices.tolist() == [[0, 1]] * TOKENS


@pytest.mark.parametrize("gate", [StretchGate, RadarGate, RotationGate])
def test_permuting_experts_permutes_weights_and_leaves_the_output(gate: type) -> None:
    experts, order = experts_of(COUNT), ["e2", "e0", "e3", "e1"]
    layer = build(Case(gate, {}), experts)
    permuted = build(Case(gate, {}), {name: experts[name] for name in order})
    state = layer.gate.state_dict()
    if "scorer.weight" in state:
        state["scorer.weight"] = state["scorer.weight"][[int(name[1]) for name in order]]
    permuted.gate.load_state_dict(state)
    assert_near(permuted(inputs()), layer(inputs()), 1e-13, "output")


def test_top_k_may_exceed_the_experts_present_at_one_layer_only() -> None:
    experts = experts_of(1)
    layer = layer_of(experts, partial(StretchGate, top_k=3), library=("e0", "b", "c"))
    layer.gate.double()
    y = layer(inputs())
    e = experts["e0"]
    torch.testing.assert_close(y - layer.base_layer(inputs()), e.scaling * (inputs() @ e.lora_A.T @ e.lora_B.T))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scalings", [(1.3,), (1.3, 1.5, 2.0)], ids=["equal scaling", "mixed scaling"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_an_expert_whose_companions_say_nothing_is_not_rotated(dtype: torch.dtype, scalings: tuple, top_k: int) -> None:
    """S - v_i is zero then; rounding of S and v_i must not leave noise that the normalisation blows up."""
    experts = experts_of(3, dtype=dtype, in_features=32, out_features=24, ranks=(4,), scalings=scalings)
    experts = {n: e if n == "e0" else e._replace(lora_B=0 * e.lora_B) for n, e in experts.items()}
    layer = build(Case(RadarGate, {"top_k": top_k}), experts)
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, record = recorded(layer, x)
    assert record.angles.abs().max() <= (1e-9 if dtype == torch.float64 else 0.02)
    wide = {n: Expert(e.lora_A.double(), e.lora_B.double(), e.scaling) for n, e in experts.items()}
    weight = dense_weights(record.weights.double(), record.indices, 3)[:, :1]
    unrotated = layer.base_layer(x).double() + weight * expert_outputs(x.double(), [wide["e0"]])[0]
    assert_near(
        y.double(), unrotated, {torch.float64: 1e-9, torch.float32: 0.02, torch.bfloat16: 0.02}[dtype], "output"
    )
