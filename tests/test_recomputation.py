"""Activation checkpointing, unused experts and double backward: gradients are what they must be."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from builders import IN, assert_near, batch, experts_of, gated_llama, layer_of, randomise, recorded
from gate_cases import COUNT, Case, build, dense, inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from radargate_pl.gates import (
    ALL_GATES,
    ArrowGate,
    Context,
    RadarGate,
    RotationGate,
    StretchGate,
    TaskGate,
)
from radargate_pl.gates.fixed import ConstantGate
from radargate_pl.losses import example_mean_cross_entropy
from radargate_pl.moe import moe_layers
from radargate_pl.records import record_gates


@pytest.mark.parametrize(
    ("gate", "trainable"),
    [case for case in itertools.product(ALL_GATES, (False, True)) if case != (ArrowGate, True)],  # refused
)
def test_checkpointing_gives_the_same_gradients_with_a_masked_loss(gate: type, trainable: bool) -> None:
    """Non-reentrant, with dropout; ids and masks are replaced only by the next forward, so recomputation sees them."""
    ids, real = batch()
    gradients = []
    for checkpointed in (False, True):
        model, context = gated_llama(gate, trainable=trainable, dropout=0.25)
        model.train()
        if checkpointed:
            for block in model.model.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        context.replace(expert=torch.tensor([2, 0, 1]), tokens={"decoder": real})
        torch.manual_seed(4)
        with record_gates(model) as recorded:
            logits = model(ids, use_cache=False).logits[:, :-1]
        kept = real[:, 1:]
        loss = example_mean_cross_entropy(logits[kept], ids[:, 1:][kept], kept.nonzero()[:, 0], 3)
        if gate is not TaskGate and not issubclass(gate, ConstantGate):  # a loss on what was recorded flows through too
            loss = loss + sum(output.entropy() for output in recorded.values())
        assert set(recorded) == set(moe_layers(model))
        if loss.requires_grad:
            loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert (gradient is None) == (checkpointed[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
    assert trainable is any(".bank." in name for name in plain)


@pytest.mark.parametrize("gate", [RadarGate, TaskGate])
def test_one_checkpointed_layer_equals_the_plain_one_in_float64(gate: type) -> None:
    context = Context()
    layer = layer_of(experts_of(4), gate, context=context, trainable=gate is TaskGate)
    randomise(layer.gate.double())
    context.replace(expert=torch.tensor([1, 3]))
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for run in (layer, lambda z: checkpoint(layer, z, use_reentrant=False)):
        results.append(torch.autograd.grad(run(x).sin().sum(), leaves, allow_unused=True))
    for plain, again in zip(*results, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)


def test_under_task_gate_only_the_experts_of_the_batch_get_gradients() -> None:
    context = Context()
    layer = layer_of(experts_of(4), TaskGate, context=context, trainable=True)
    x = torch.randn(3, 2, IN, dtype=torch.float64)
    for ids, touched in (([1, 3, 1], {"e1", "e3"}), ([0, -1, -1], {"e0"}), ([2, 2, 2], {"e2"})):
        layer.zero_grad(set_to_none=True)
        context.replace(expert=torch.tensor(ids))
        layer(x).sum().backward()
        for name in layer.bank.names:
            assert all((p.grad is not None) == (name in touched) for p in layer.bank.expert_weights(name))


@pytest.mark.parametrize("gate", [StretchGate, RadarGate, RotationGate])
def test_gradients_agree_with_finite_differences(gate: type) -> None:
    layer = layer_of(experts_of(3), gate)
    randomise(layer.gate.double(), scale=0.5)
    x = torch.randn(2, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("gate", [StretchGate, RadarGate, RotationGate])
@pytest.mark.parametrize("linear", [True, False], ids=["sum", "sin"])
def test_second_order_gradients_are_right_or_refused(gate: type, linear: bool) -> None:
    """A penalty on gradients: never silently without the terms of the rotation."""
    case, experts = Case(gate, {}), experts_of(COUNT)
    layer, x = build(case, experts), inputs().requires_grad_()

    def of_penalty(y: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((y if linear else y.sin()).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = of_penalty(dense(case, layer, experts, x).output)
    try:
        ours = of_penalty(layer(x))
    except RuntimeError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert_near(ours, expected, 1e-10, "gradient of the penalty")
    assert not refusal or (gate is not StretchGate and "twice" in refusal)


def test_gradients_are_reproducible_under_deterministic_algorithms() -> None:
    layer, x = layer_of(experts_of(5, dtype=torch.float32), partial(RadarGate, scorer="experts")), torch.randn(3, 7, IN)
    randomise(layer.gate)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            loss = recorded(layer, x)[0].sin().sum()
            results.append(torch.autograd.grad(loss, list(layer.gate.parameters())))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
