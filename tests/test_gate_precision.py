"""Half precision and autocast: what trains stays float32, gate algebra too, selections are those of float32."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from builders import IN, OneLayer, assert_near, batch, experts_of, gated_llama, layer_of, randomise, recorded
from reference import Expert, plane_angles, rotate_rows

from radargate_pl.gates import RadarGate, RotationGate, StretchGate
from radargate_pl.records import record_gates


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()], ids=["to", "half", "bfloat16"]
)
@pytest.mark.parametrize("gate", [RadarGate, StretchGate, RotationGate])
@pytest.mark.parametrize("trainable", [False, True])
def test_casting_a_model_leaves_what_trains_in_float32_bit_for_bit(cast: object, gate: type, trainable: bool) -> None:
    model, _ = gated_llama(gate, trainable=trainable)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert before
    (sum((p.sum() for n, p in model.named_parameters() if n in before), torch.zeros(()))).backward()
    cast(model)
    after = dict(model.named_parameters())
    for name, value in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], value)
        assert after[name].grad.dtype == torch.float32
    narrow = {n for n, p in after.items() if p.dtype != torch.float32}
    assert narrow == {n for n, p in after.items() if not p.requires_grad}
    model(batch()[0])


@pytest.mark.parametrize("gate", [RadarGate, StretchGate])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_select_what_the_float32_gate_would(gate: type, dtype: torch.dtype) -> None:
    experts = experts_of(20, dtype=dtype)
    layer = layer_of(experts, gate)
    randomise(layer.gate)
    x = torch.randn(400, IN).to(dtype)
    with record_gates(OneLayer(layer)) as recorded:
        y = layer(x)
    logits = x.double() @ layer.gate.scorer.weight.double().T
    order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(recorded["layer"].indices, order.indices[:, :2])
    weights = torch.softmax(order.values[:, :2], dim=-1)
    torch.testing.assert_close(recorded["layer"].weights.double(), weights, rtol=1e-5, atol=1e-7)
    assert recorded["layer"].weights.dtype == recorded["layer"].logits.dtype == torch.float32
    assert y.dtype == dtype


@pytest.mark.parametrize(
    ("gate", "options"), [(RotationGate, {}), (StretchGate, {"scorer": "experts"}), (RadarGate, {"scorer": "experts"})]
)
def test_half_precision_scores_of_experts_are_float32_from_the_same_latents(gate: type, options: dict) -> None:
    experts = experts_of(20, dtype=torch.bfloat16)
    layer = layer_of(experts, partial(gate, **options))
    randomise(layer.gate)
    x = torch.randn(300, IN).bfloat16()
    with record_gates(OneLayer(layer)) as recorded:
        layer(x)
    wide_bank, latents = copy.deepcopy(layer.bank).double(), layer.bank.project(x).double()
    if gate is RotationGate:
        scores = wide_bank.norms(latents)
    else:
        scores = wide_bank.layer_norm_logits(latents, layer.gate.scorer.weight.double())
    top = scores.sort(dim=-1, descending=True, stable=True)
    clear = (top.values[:, 1] - top.values[:, 2] > 1e-4) & (top.values[:, 0] - top.values[:, 1] > 1e-4)
    assert clear.float().mean() > 0.98
    assert torch.equal(recorded["layer"].indices[clear], top.indices[clear][:, :2])


@pytest.mark.parametrize("gate", [RadarGate, StretchGate, RotationGate])
def test_autocast_leaves_the_gate_algebra_in_float32(gate: type) -> None:
    """Same experts, and weights and angles equal to those of a bfloat16 model without autocast on the same latents."""
    narrow = experts_of(20, dtype=torch.bfloat16)
    layer = layer_of({n: Expert(e.lora_A.float(), e.lora_B.float(), e.scaling) for n, e in narrow.items()}, gate)
    randomise(layer.gate)
    x = torch.randn(300, IN).bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16), record_gates(OneLayer(layer), angles=["layer"]) as recorded:
        y = layer(x)
    output = recorded["layer"]
    assert y.dtype == torch.bfloat16
    assert output.weights.dtype == torch.float32
    if gate is not RotationGate:
        logits = x.double() @ layer.gate.scorer.weight.double().T
        torch.testing.assert_close(output.logits.double(), logits, rtol=1e-5, atol=1e-5)
        order = logits.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(output.indices, order.indices[:, :2])
    if gate is not StretchGate:
        narrow = copy.deepcopy(layer).bfloat16()
        with record_gates(OneLayer(narrow), angles=["layer"]) as expected:
            narrow(x.bfloat16())
        assert torch.equal(expected["layer"].indices, output.indices)
        torch.testing.assert_close(output.angles, expected["layer"].angles, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", [RadarGate, StretchGate, RotationGate])
def test_autocast_gradients_are_those_of_float32_gate_algebra(gate: type) -> None:
    """In autocast, recomputation in the backward included, as in a bfloat16 model without it (same rounded latents)."""
    narrow = experts_of(6, dtype=torch.bfloat16)
    layer = layer_of({n: Expert(e.lora_A.float(), e.lora_B.float(), e.scaling) for n, e in narrow.items()}, gate)
    randomise(layer.gate)
    twin = copy.deepcopy(layer).bfloat16()
    x = torch.randn(50, IN).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x.float())
    mixed.float().sin().sum().backward()
    twin(x).float().sin().sum().backward()
    for ours, expected in zip(layer.gate.parameters(), twin.gate.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert ours.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("others", [1.0, 0.1])
def test_bfloat16_angles_are_those_of_float64_on_the_same_latents(others: float) -> None:
    """Rounding S and v_i to bfloat16 before subtracting them would cost 4 % of the angle where the others are small."""
    experts = experts_of(2, dtype=torch.bfloat16, in_features=32, out_features=24, ranks=(4,), scalings=(1.3, 1.7))
    experts["e1"] = experts["e1"]._replace(lora_B=(others * experts["e1"].lora_B).bfloat16())
    layer = layer_of(experts, partial(RadarGate, top_k=2))
    randomise(layer.gate)
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    y, record = recorded(layer, x)
    angles = record.angles[:, 0].double()
    wide, latents = copy.deepcopy(layer.bank).double(), layer.bank.project(x).double()
    v, w = wide.lift_expert(latents, 0), wide.lift_expert(latents, 1)
    exact = plane_angles(v, w, layer.gate.rotation.P.double(), layer.gate.rotation.Q.double(), "rms")
    assert (angles - exact).square().mean().sqrt() <= 0.01 * exact.square().mean().sqrt()
    other = plane_angles(w, v, layer.gate.rotation.P.double(), layer.gate.rotation.Q.double(), "rms")
    weights = record.weights.double()
    mixed = weights[:, :1] * rotate_rows(v, exact) + weights[:, 1:] * rotate_rows(w, other)
    # The forward itself: one rounding to bfloat16 of the mixture and one of the sum.
    assert_near(y.double(), layer.base_layer(x).double() + mixed, 2**-6, "output")
