"""Inner products of kept outputs equal those of outputs that are really made, rotated ones too, and stay narrow."""

from __future__ import annotations

from functools import partial

import pytest
import reference_losses
import torch
from builders import IN, OneLayer, assert_near, experts_of, layer_of, randomise
from reference import Expert, dense_layer, expert_outputs, rotate_rows
from test_memory_bound import IN as WIDE_IN
from test_memory_bound import TOKENS, WIDEST, TensorCounter, build

from radargate_pl.auxiliary_losses import ORTHOGONALITY_EPS, orthogonality
from radargate_pl.gates import (
    Context,
    ExpertChoiceGate,
    FixedGate,
    RadarGate,
    RotationGate,
    RotMoLEGate,
    Routing,
    StretchGate,
)
from radargate_pl.kept_grams import kept_gram
from radargate_pl.records import record_gates


def recorded(layer, x, **options):
    with record_gates(OneLayer(layer), latents=True, statistics=False, **options) as outputs:
        y = layer(x)
    return y, outputs["layer"]


def built(gate, count=4, **options):
    layer = layer_of(experts_of(count), gate, **options).double()
    randomise(layer.gate)
    return layer, torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)


GATES = {
    "stretch": StretchGate,
    "radar": RadarGate,
    "radar raw": partial(RadarGate, angle_norm="none"),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_gram_and_its_loss_are_those_of_outputs_made_one_by_one(gate, top_k, trainable):
    layer, x = built(partial(GATES[gate], top_k=top_k), trainable=trainable)
    _, record = recorded(layer, x)
    state = dict(layer.named_parameters())
    experts = list(experts_of(4).values())
    options = {"angle_norm": "none"} if gate == "radar raw" else {}
    flat = x.flatten(0, 1)
    name = "StretchGate" if gate == "stretch" else "RadarGate"
    angles = dense_layer(flat, experts, state, gate=name, top_k=top_k, **options).angles
    outputs = expert_outputs(flat, experts)
    if angles is not None:
        outputs = [rotate_rows(v, angles[:, i]) for i, v in enumerate(outputs)]
    every = torch.stack(outputs, 1)
    if record.indices is not None:
        every = every.gather(1, record.indices.flatten(0, 1).unsqueeze(-1).expand(-1, -1, every.shape[-1]))
    found = kept_gram(layer, record)
    assert_near(found, every @ every.mT, 1e-12, "gram")
    if top_k == 1:
        return
    loss = orthogonality(found, torch.ones(6))
    expected = reference_losses.orthogonality(every, ORTHOGONALITY_EPS)
    assert_near(loss, expected, 1e-12, "loss")
    wanted = [x, *(state[f"gate.rotation.{name}"] for name in ("P", "Q") if angles is not None)]
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert_near(ours, theirs, 1e-10, "gradient")


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize(
    ("gate", "combine"),
    [
        (partial(RadarGate, rotation_sharing="per_expert", rotation_rank=2), "sum"),
        (partial(RadarGate, output_scale="learned", angle_bound=1.0), "sum"),
        (RotationGate, "sum"),
        (RotMoLEGate, "sum"),
        (partial(RotMoLEGate, trunk_rank=2), "sum"),
        (RadarGate, "gram_schmidt"),
        (RadarGate, "gram_schmidt_unit"),
    ],
    ids=str,
)
def test_its_quadratic_form_is_the_length_of_the_update(gate, combine, top_k):
    """``g K g^T = |sum_i g_i vt_i|^2``: the outputs are those that the layer itself adds up."""
    layer, x = built(partial(gate, top_k=top_k), combine=combine)
    y, record = recorded(layer, x)
    update = (y - layer.base_layer(x)).flatten(0, 1)
    gram = kept_gram(layer, record)
    indices = None if record.indices is None else record.indices.flatten(0, 1)
    routing = layer.combine.arrange(Routing(record.weights.flatten(0, 1), indices, None))
    g = routing.weights.unsqueeze(-1)
    assert_near((g.mT @ gram @ g).flatten(), update.square().sum(-1), 1e-11, str(gate))
    gram.square().sum().backward()
    rotation = list(layer.gate.rotation.parameters())
    assert rotation
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in rotation)


def test_an_expert_that_was_not_chosen_counts_as_zero():
    layer, x = built(partial(FixedGate, weights={"e0": 0.5, "e3": -2.0}))
    _, record = recorded(layer, x)
    outputs = expert_outputs(x.flatten(0, 1), list(experts_of(4).values()))
    every = torch.stack([outputs[0], outputs[3]], 1)  # the others are not even evaluated
    assert_near(kept_gram(layer, record), every @ every.mT, 1e-12, "fixed")
    layer, x = built(ExpertChoiceGate)
    _, record = recorded(layer.train(), x)
    missed = (record.weights == 0).flatten(0, 1)
    assert missed.any()
    assert not missed.all()
    gram = kept_gram(layer, record)
    assert gram[missed].abs().sum() == gram.mT[missed].abs().sum() == 0
    assert (gram.diagonal(dim1=1, dim2=2)[~missed] > 0).all()


def test_a_record_without_latents_is_refused():
    layer, x = built(StretchGate)
    with record_gates(OneLayer(layer)) as outputs:
        layer(x)
    with pytest.raises(ValueError, match="record with latents, but it has none"):
        kept_gram(layer, outputs["layer"])


@pytest.mark.parametrize("gate", [StretchGate, RadarGate, RotMoLEGate], ids=lambda gate: gate.__name__)
def test_nothing_is_wider_than_a_layer_and_only_latents_are_kept(gate):
    layer = build(partial(gate, top_k=3))
    x = torch.randn(TOKENS, WIDE_IN, requires_grad=True)
    _, record = recorded(layer, x)
    with TensorCounter() as counter:
        gram = kept_gram(layer, record)
        counted = counter.alive(gram, record.latents, record.indices, *layer.parameters())
        gram.sum().backward()
    assert counter.widest <= TOKENS * WIDEST, counter.operation
    assert counted <= 4 * TOKENS * 3, "only numbers per pair may live until the backward pass"
    assert x.grad.isfinite().all()


def test_angles_are_summed_up_only_when_somebody_wants_them():
    layer, x = built(RadarGate)
    _, record = recorded(layer, x)
    assert record.angle_stats is None
    assert record.inputs is None
    _, record = recorded(layer, x, angles=["layer"])
    assert record.angles is not None
    assert record.latents.requires_grad
    assert not record.detach().latents.requires_grad
    with record_gates(OneLayer(layer)) as outputs:
        layer(x)
    assert outputs["layer"].latents is None
    assert outputs["layer"].angle_stats is not None
    layer, x = built(RotMoLEGate, context=Context())
    assert recorded(layer, x)[1].inputs is x


def test_experts_of_a_shared_a_learn_to_keep_apart():
    """HydraLoRA: one A, several B that train."""
    first, *others = experts_of(3, ranks=(2,)).values()
    experts = {f"e{i}": Expert(first.lora_A, e.lora_B, e.scaling) for i, e in enumerate((first, *others))}
    layer = layer_of(experts, StretchGate, trainable=True).double()
    x = torch.randn(5, IN, dtype=torch.float64)
    _, record = recorded(layer, x)
    every = torch.stack(expert_outputs(x, list(experts.values())), 1)
    every = every.gather(1, record.indices.unsqueeze(-1).expand(-1, -1, every.shape[-1]))
    gram = kept_gram(layer, record)
    assert_near(gram, every @ every.mT, 1e-12, "gram")
    orthogonality(gram, torch.ones(5)).backward()
    assert all(weight.grad.abs().max() > 0 for weight in layer.bank.parameters())
