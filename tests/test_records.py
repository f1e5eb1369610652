"""What gates did is recorded exactly, with padding left out, and without a trace."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from builders import IN, OUT, OneLayer, OneLinear, bank_of, batch, experts_of, gated_llama, layer_of, randomise
from reference import expert_outputs, rotate_rows

from radargate_pl.combines import COMBINES
from radargate_pl.gates import Context, RadarGate, RotationGate, Routing, StretchGate
from radargate_pl.moe import attach, moe_layers
from radargate_pl.records import AngleStatistics, record_gates


@pytest.mark.parametrize("fails", [False, True])
def test_recording_leaves_no_trace(fails: bool) -> None:
    model, _context = gated_llama(RadarGate)
    ids, _ = batch()
    before = {p: dict(m.__dict__) for p, m in model.named_modules()}
    hooks = {
        p: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for p, m in model.named_modules()
    }
    plain = model(ids).logits
    expected_error = pytest.raises(RuntimeError, match="in the middle") if fails else nullcontext()
    with expected_error, record_gates(model) as recorded:
        inside = model(ids).logits
        if fails:
            raise RuntimeError("in the middle")
    assert torch.equal(inside, plain)
    assert len(recorded) == 4
    for path, module in model.named_modules():
        assert {k: id(v) for k, v in module.__dict__.items()} == {k: id(v) for k, v in before[path].items()}
        assert (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)) == hooks[path]
    recorded.clear()
    model(ids)
    assert not recorded


def test_records_nest_and_name_wrong_paths() -> None:
    model, _context = gated_llama(StretchGate)
    ids, _ = batch()
    with record_gates(model) as outer:
        with record_gates(model) as inner:
            model(ids)
        assert len(inner) == 4
        model(ids)
    assert len(outer) == 4
    with (
        pytest.raises(ValueError, match=r"angles to name mixture layers, but \['layer'\] are none"),
        record_gates(model, ["layer"]),
    ):
        pass


def test_angles_are_kept_only_for_the_layers_asked() -> None:
    model, _ = gated_llama(RadarGate)
    path = next(iter(moe_layers(model)))
    with record_gates(model, angles=[path]) as recorded:
        model(batch()[0])
    assert [p for p, output in recorded.items() if output.angles is not None] == [path]
    assert recorded[path].angles.shape == (3, 7, 2, 16)
    assert all(output.angle_stats is not None for output in recorded.values())


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gate", [RadarGate, RotationGate])
def test_angle_statistics_equal_hand_computation_with_padding_left_out(gate: type, top_k: int, padded: bool) -> None:
    context = Context()
    layer = layer_of(experts_of(4), partial(gate, top_k=top_k), context=context)
    randomise(layer.gate.double())
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    context.replace(tokens={"decoder": real} if padded else {})
    with record_gates(OneLayer(layer), angles=["layer"]) as recorded:
        layer(x)
    output = recorded["layer"]
    stats, pairs = output.angle_stats, OUT // 2
    expected = {
        n: torch.zeros(4, dtype=torch.float64) for n in ("count", "mean_sum", "abs_sum", "square_sum", "beyond_sum")
    }
    cosines = {n: torch.zeros(4, 4, dtype=torch.float64) for n in ("cosine_before", "cosine_after", "cosine_count")}
    indices = torch.arange(4).expand(2, 6, 4) if output.indices is None else output.indices
    outputs = torch.stack(expert_outputs(x.flatten(0, 1), list(experts_of(4).values())), 1).view(2, 6, 4, OUT)
    for row, position in itertools.product(range(2), range(6)):
        if padded and not real[row, position]:
            continue
        before, after = {}, {}
        for slot, expert in enumerate(indices[row, position].tolist()):
            angles = output.angles[row, position, slot]
            expected["count"][expert] += 1
            expected["mean_sum"][expert] += angles.sum()
            expected["abs_sum"][expert] += angles.abs().sum()
            expected["square_sum"][expert] += (angles**2).sum()
            expected["beyond_sum"][expert] += (angles.abs() > math.pi / 4).sum()
            before[expert] = outputs[row, position, expert]
            after[expert] = rotate_rows(before[expert][None], angles[None])[0]
        for a, b in itertools.permutations(before, 2):
            cosines["cosine_before"][a, b] += before[a] @ before[b] / before[a].norm() / before[b].norm()
            cosines["cosine_after"][a, b] += after[a] @ after[b] / after[a].norm() / after[b].norm()
            cosines["cosine_count"][a, b] += 1
    assert stats.pairs == (pairs,) * 4
    for name, value in (expected | cosines).items():
        got = getattr(stats, name)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-12, msg=name)
    assert expected["beyond_sum"].sum() > 0


@pytest.mark.parametrize("top_k", [2, 3])
def test_angles_stay_with_their_experts_under_a_combination_that_reorders_them(top_k: int) -> None:
    layer, x = layer_of(experts_of(4), partial(RadarGate, top_k=top_k)), torch.randn(6, IN, dtype=torch.float64)
    randomise(layer.gate.double())
    layer.combine = COMBINES["gram_schmidt"]
    with record_gates(OneLayer(layer), angles=["layer"]) as recorded:
        layer(x)
    output = recorded["layer"]
    assert (output.indices.diff(dim=-1) < 0).any()  # by weight, not by expert
    for expert in range(4):
        own = output.angles[output.indices == expert]
        assert output.angle_stats.count[expert] == own.shape[0]
        torch.testing.assert_close(output.angle_stats.abs_sum[expert], own.abs().sum(), rtol=1e-12, atol=1e-14)


class FirstOnly(RadarGate):
    """All experts in order, and weight 0 for all but the first."""

    def forward(self, x, latents, bank, context):
        weights = torch.zeros(*latents.shape[:-1], dtype=latents.dtype)
        weights[..., 0] = 1
        return Routing(weights, None, None)


def test_experts_of_weight_zero_are_not_counted() -> None:
    layer = layer_of(experts_of(3), FirstOnly)
    randomise(layer.gate.double())
    with record_gates(OneLayer(layer)) as recorded:
        layer(torch.randn(5, IN, dtype=torch.float64))
    stats = recorded["layer"].angle_stats
    assert stats.count.tolist() == [5, 0, 0]
    assert stats.abs_sum[0] > 0
    assert stats.abs_sum[1:].tolist() == [0, 0]
    assert not stats.cosine_count.any()


def test_angle_statistics_add_up() -> None:
    first, second = AngleStatistics.zeros((3, 3)), AngleStatistics.zeros((3, 3))
    first.count += torch.tensor([1.0, 2.0])
    second.count += torch.tensor([3.0, 4.0])
    second.cosine_after += 1
    total = first + second
    assert total.count.tolist() == [4, 6]
    assert total.cosine_after.tolist() == [[1, 1], [1, 1]]
    assert total.pairs == (3, 3)
    assert first.count.tolist() == [1, 2]


def test_load_and_entropy_equal_hand_computation_with_padding_left_out() -> None:
    context = Context()
    layer = layer_of(experts_of(4), partial(RadarGate, top_k=2), context=context)
    randomise(layer.gate.double())
    real = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    context.replace(tokens={"decoder": real})
    with record_gates(OneLayer(layer)) as recorded:
        layer(torch.randn(2, 3, IN, dtype=torch.float64))
    output = recorded["layer"].detach()
    assert not output.weights.requires_grad
    load, entropy = [0.0] * 4, 0.0
    for row, position in real.nonzero().tolist():
        for weight, expert in zip(
            output.weights[row, position].tolist(), output.indices[row, position].tolist(), strict=True
        ):
            load[expert] += weight / 4
            entropy -= weight * math.log(weight) / 4
    torch.testing.assert_close(output.load(), torch.tensor(load, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert output.entropy().item() == pytest.approx(entropy, rel=1e-10)
    assert output.experts == ("e0", "e1", "e2", "e3")
    assert torch.equal(output.tokens, real)


def test_the_encoder_stream_has_its_own_mask() -> None:
    model, context = OneLinear(IN, OUT, torch.float32), Context()
    bank = bank_of(experts_of(2, dtype=torch.float32))
    attach(model, {"layer": bank}, StretchGate, context=context, streams={"layer": "encoder"})
    encoder, decoder = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    context.replace(tokens={"encoder": encoder, "decoder": decoder})
    with record_gates(model) as recorded:
        model(torch.randn(1, 3, IN))
    assert torch.equal(recorded["layer"].tokens, encoder)
