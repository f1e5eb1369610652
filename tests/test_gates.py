"""Every gate with every option against the dense reference: outputs, selections, gradients, in float64 and float32."""

from __future__ import annotations

import math

import pytest
import torch
from builders import OUT, assert_near, bank_of, experts_of, recorded
from gate_cases import CASES, COUNT, TOKENS, Case, build, dense, inputs
from reference import Expert

from radargate_pl.gates import RadarGate, RotationGate, StretchGate, UniformGate


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_selections_and_gradients_equal_the_dense_reference_in_float64(case: Case) -> None:
    experts = experts_of(COUNT)
    layer, x = build(case, experts), inputs().requires_grad_()
    y, record = recorded(layer, x, angles=False)
    expected = dense(case, layer, experts, x)
    assert_near(y, expected.output, 1e-12, "output")
    weights = torch.zeros_like(expected.weights)
    indices = (
        torch.arange(record.weights.shape[-1]).expand(record.weights.shape)
        if record.indices is None
        else record.indices
    )
    weights.scatter_(1, indices, record.weights.detach())
    assert_near(weights, expected.weights, 1e-12, "weights")
    if expected.chosen is not None and record.indices is not None:
        assert [tuple(row) for row in record.indices.tolist()] == expected.chosen
    if expected.logits is not None:
        assert_near(record.logits, expected.logits, 1e-12, "logits")
    parameters = dict(layer.gate.named_parameters())
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    leaves = (x, *parameters.values())
    ours = torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad((expected.output * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    for name, got, want in zip(["x", *parameters], ours, wanted, strict=True):
        assert_near(got, want, 1e-11, f"gradient of {name}")


@pytest.mark.parametrize("case", [c for c in CASES if c.options.get("temperature", 1.0) in (1.0, 0.6)], ids=str)
def test_outputs_and_gradients_in_float32(case: Case) -> None:
    """The reference runs in float64 on the same numbers; inputs keep a margin between kept and other experts."""
    experts = experts_of(COUNT, dtype=torch.float32)
    layer, x = build(case, experts), inputs(dtype=torch.float32).requires_grad_()
    wide = {n: Expert(e.lora_A.double(), e.lora_B.double(), e.scaling) for n, e in experts.items()}
    wide_layer, wide_x = build(case, wide), x.detach().double().requires_grad_()
    wide_layer.load_state_dict(layer.state_dict())
    y, expected = layer(x), dense(case, wide_layer, wide, wide_x).output
    assert y.dtype == torch.float32
    assert_near(y.double(), expected, 2e-5, "output")
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    leaves = (x, *layer.gate.parameters()), (wide_x, *wide_layer.gate.parameters())
    options = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad((y * direction).sum(), leaves[0], **options)
    wanted = torch.autograd.grad((expected * direction.double()).sum(), leaves[1], **options)
    for got, want in zip(ours, wanted, strict=True):
        assert_near(got.double(), want, 2e-4, "gradient")


@pytest.mark.parametrize("gate", [RadarGate, RotationGate])
@pytest.mark.parametrize("angle_norm", ["none", "rms"])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
@pytest.mark.parametrize("out_features", [8, 9, 1])
def test_recorded_angles_equal_the_reference(gate: type, angle_norm: str, top_k: int, out_features: int) -> None:
    case = Case(gate, {"angle_norm": angle_norm, "top_k": top_k})
    experts = experts_of(COUNT, out_features=out_features)
    layer, x = build(case, experts), inputs()
    y, record = recorded(layer, x)
    expected = dense(case, layer, experts, x)
    assert_near(y, expected.output, 1e-12, "output")
    assert record.angles.shape == (TOKENS, top_k, out_features // 2)
    indices = torch.arange(COUNT).expand(TOKENS, COUNT) if record.indices is None else record.indices
    wanted = torch.stack([expected.angles[t, indices[t]] for t in range(TOKENS)])
    if out_features > 1:
        assert_near(record.angles, wanted, 1e-11, "angles")


@pytest.mark.parametrize("scalings", [(2.0,), (4.0, 0.5, 13.06, 1.0)], ids=["equal scaling", "mixed scaling"])
@pytest.mark.parametrize("ranks", [(2,), (1, 4, 2, 3)], ids=["equal rank", "mixed rank"])
@pytest.mark.parametrize("gate", [StretchGate, RadarGate, RotationGate])
def test_mixed_ranks_and_scalings(gate: type, ranks: tuple, scalings: tuple) -> None:
    case, experts = Case(gate, {}), experts_of(COUNT, ranks=ranks, scalings=scalings, out_features=8)
    layer, x = build(case, experts), inputs()
    assert_near(layer(x), dense(case, layer, experts, x).output, 1e-12, "output")


@pytest.mark.parametrize("gate", [StretchGate, RadarGate, RotationGate, UniformGate])
@pytest.mark.parametrize("present", [["e1"], ["e3", "e0"], ["e0", "e2", "e3"]], ids=len)
def test_experts_absent_at_a_layer_count_nowhere(gate: type, present: list[str]) -> None:
    """A layer without some experts is the layer of a library of the others: logits, selection, S and LayerNorm."""
    options = {} if gate is UniformGate else {"top_k": 2}
    everyone = experts_of(COUNT)
    experts = {name: everyone[name] for name in everyone if name in present}  # library order
    fixed = (1 / len(experts),) * len(experts) if gate is UniformGate else None
    case = Case(gate, options, fixed)
    layer, x = build(case, {n: everyone[n] for n in present}, library=tuple(everyone)), inputs()
    assert layer.bank.names == tuple(experts)
    reference = Case(gate, {**options, **({"top_k": min(2, len(experts))} if options else {})}, fixed)
    assert_near(layer(x), dense(reference, layer, experts, x).output, 1e-12, "output")


def test_identical_experts_follow_list_semantics() -> None:
    """S - v_i is a sum over the other list entries: two equal experts do not collapse into one."""
    first = experts_of(1)["e0"]
    experts = {f"e{i}": first for i in range(3)}
    case = Case(RadarGate, {"angle_norm": "none", "top_k": 2})
    layer, x = build(case, experts), inputs()
    assert_near(layer(x), dense(case, layer, experts, x).output, 1e-12, "output")
    assert recorded(layer, x)[1].angles.abs().max() > 1e-3


def test_banks_of_the_tests_hold_an_odd_width_and_mixed_ranks() -> None:
    bank = bank_of(experts_of(COUNT))
    assert OUT % 2 == 1
    assert len(set(bank.ranks)) > 1
    assert len(set(bank.scaling)) > 1


def test_two_experts_by_hand() -> None:
    """By hand: v_1 = (1, 2), v_2 = (3, 1), U_1 = U_2 = (3, 2), a = 0.1 * (3 + 2) = 0.5 rad, g = 1/2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    B = {
        "e0": torch.tensor([[0.5], [1.0]], dtype=torch.float64),
        "e1": torch.tensor([[3.0], [1.0]], dtype=torch.float64),
    }
    experts = {"e0": Expert(one, B["e0"], 2.0), "e1": Expert(one, B["e1"], 1.0)}
    case = Case(RadarGate, {"top_k": 2, "angle_norm": "none"})
    layer = build(case, experts, bias=False)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.gate.scorer.weight.zero_()
        layer.gate.rotation.P.zero_()[:, 0] = 0.1
        layer.gate.rotation.Q.zero_()[0] = 1.0
    cosine, sine = math.cos(0.5), math.sin(0.5)
    first, second = (cosine - 2 * sine, sine + 2 * cosine), (3 * cosine - sine, 3 * sine + cosine)
    expected = [(first[m] + second[m]) / 2 for m in range(2)]
    assert layer(one).tolist()[0] == pytest.approx(expected, rel=1e-14)
    assert dense(case, layer, experts, one).output.tolist()[0] == pytest.approx(expected, rel=1e-14)
