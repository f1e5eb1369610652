"""Auxiliary losses of a network: right values and gradients, padding and checkpointing change nothing, refusals.

What they do to a training is shown in test_auxiliary_training.py.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import ClassVar

import pytest
import reference_losses
import torch
from tiny_models import assert_same_gradients, batch_of, left_padded, network_of
from tiny_runs import FixedBatches, adapters, gated_lm, rows_of, trainer
from tiny_runs import batch_of as run_batch

from radargate_pl.auxiliary_terms import NAMES, AuxiliaryTerms
from radargate_pl.gates import FixedGate, RadarGate, Routing, StretchGate, TaskGate, UniformGate
from radargate_pl.losses import IGNORE_INDEX
from radargate_pl.module import AdaptedLM
from radargate_pl.records import record_gates

ONE = partial(RadarGate, top_k=1, rotation_rank=4)  # no layer of the tiny models has three experts
SGD = partial(torch.optim.SGD, lr=0.5)


def gate_for(name):
    return ONE if name == "load_balancing" else "radar"


def values_of(network, batch, names=NAMES):
    terms = AuxiliaryTerms(dict.fromkeys(names, 1.0))
    with terms.recording(network, is_wanted=False) as outputs:
        loss = network(**batch)
    return terms.values(network, outputs), loss


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


def lm_with(library, losses, gate=None, **options):
    base = gated_lm(library, gate, **options)
    return AdaptedLM(base.network_factory, base.optimizer_factory, auxiliary_losses=losses)


def fitted(lm, folder, batches, **options):
    torch.manual_seed(0)
    size = options.pop("batch_size", None)
    run = trainer(folder, **{"max_epochs": 1, "limit_val_batches": 0, **options})
    run.fit(lm, datamodule=FixedBatches(batches, batches[:1], batch_size=size))
    return {name: value.clone() for name, value in lm.network.trainable_state().items()}


# ---- values ----


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_values_are_means_over_layers_of_real_tokens(kind):
    network, batch = network_of(kind, ONE), batch_of(kind)
    found, _ = values_of(network, batch)
    with record_gates(network.backbone) as outputs:
        network(**batch)
    layers = []
    for output in outputs.values():
        real = output.tokens.flatten()
        assert not real.all()  # padding of both streams is in play
        chosen = (output.logits.argmax(-1, keepdim=True) if output.indices is None else output.indices).flatten(0, 1)
        dense = output.weights
        if output.indices is not None:
            dense = torch.zeros_like(output.logits).scatter(-1, output.indices, output.weights)
        layers.append([
            output.logits.flatten(0, 1)[real].double(), chosen[real].tolist(), output.experts,
            dense.flatten(0, 1)[real].double(),
        ])  # fmt: skip
    mean = lambda values: sum(values) / len(layers)  # noqa: E731
    expected = {
        "load_balancing": mean(reference_losses.load_balancing(logits, chosen) for logits, chosen, *_ in layers),
        "gshard": mean(reference_losses.gshard(logits, chosen) for logits, chosen, *_ in layers),
        "z": mean(reference_losses.z_loss(logits) for logits, *_ in layers),
        "variance_tokens": mean(reference_losses.variance_over_tokens(dense) for *_, dense in layers),
        "orthogonality": torch.zeros(()),
        "mole_balance": reference_losses.mole_balance(
            [(logits, [network.experts.index(name) for name in experts]) for logits, _, experts, _ in layers], 3
        ),
    }
    assert expected["mole_balance"] > reference_losses.smallest_mole_balance(3)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_padding_changes_nothing(kind):
    network, batch = network_of(kind), batch_of(kind)
    expected, _ = values_of(network, batch)
    longer = {
        name: torch.nn.functional.pad(batch[name], (0, 4), value=filler)
        for name, filler in (("input_ids", 3), ("attention_mask", 0), ("labels", IGNORE_INDEX))
    }
    for other in ({**batch, **longer}, left_padded(batch) if kind == "llama" else batch):
        found, _ = values_of(network, other)
        for name in NAMES:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_autocast_changes_neither_dtype_nor_value():
    network, batch = network_of("llama"), batch_of("llama")
    terms = AuxiliaryTerms(dict.fromkeys(NAMES, 1.0))
    with terms.recording(network, is_wanted=False) as outputs:
        network(**batch)
    expected = terms.values(network, outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = terms.values(network, outputs)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


# ---- gradients ----


def auxiliary_gradients(network, batch, name, seed=0):
    network.zero_grad()
    torch.manual_seed(seed)
    values, labelled = values_of(network, batch, [name])
    loss = labelled.logits.square().mean() + 3 * values[name]
    loss.backward()
    return {key: None if p.grad is None else p.grad.clone() for key, p in network.named_parameters() if p.requires_grad}


@functools.cache
def plain_and_checkpointed(kind, gate):
    return tuple(network_of(kind, gate, gradient_checkpointing=flag).train() for flag in (False, True))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_with_gradient_checkpointing(kind, name):
    plain, checkpointed = plain_and_checkpointed(kind, gate_for(name))
    batch = batch_of(kind)
    expected = auxiliary_gradients(plain, batch, name)
    assert_same_gradients(auxiliary_gradients(checkpointed, batch, name), expected, 1e-5)
    plain.zero_grad()
    plain(**batch).logits.square().mean().backward()
    task = dict(plain.named_parameters())
    assert any(not torch.allclose(gradient, task[key].grad, rtol=1e-3) for key, gradient in expected.items())


@pytest.mark.parametrize("gate", ["radar", "stretch"])
def test_orthogonality_of_training_experts_is_the_same_with_checkpointing_and_dropout(gate):
    options = {"train": "both", "dropout": 0.3}
    plain, checkpointed = (
        network_of("llama", gate, gradient_checkpointing=flag, **options).train() for flag in (False, True)
    )
    batch = batch_of("llama")
    expected = auxiliary_gradients(plain, batch, "orthogonality", seed=4)
    assert_same_gradients(auxiliary_gradients(checkpointed, batch, "orthogonality", seed=4), expected, 1e-5)
    assert any(".bank.lora_B" in key for key in expected)


# ---- refusals, at start ----


def test_unknown_names_and_bad_factors_are_refused():
    with pytest.raises(ValueError, match=r"auxiliary_losses to name some of .*'z'\], but got \['balance'\]"):
        AdaptedLM(lambda tasks: None, auxiliary_losses={"balance": 1.0})
    for factor in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"auxiliary_losses\['z'\] to be a factor of 0 or more, but got {factor}"):
            AdaptedLM(lambda tasks: None, auxiliary_losses={"z": factor})


@pytest.mark.parametrize(
    ("gate", "options", "name", "message"),
    [
        (UniformGate, {}, "z", r"UniformGate\(\) can give, but got z: the gate has no logits"),
        (TaskGate, {}, "mole_balance", "mole_balance: the gate has no logits"),
        (TaskGate, {}, "orthogonality", "orthogonality: the gate keeps one expert per token"),
        (partial(StretchGate, top_k=1), {}, "orthogonality", "orthogonality: the gate keeps one expert per token"),
        (partial(StretchGate, top_k=3), {}, "load_balancing", "load_balancing: the gate keeps no fixed number"),
        (StretchGate, {"combine": "gram_schmidt"}, "orthogonality", "orthogonality: combine is not sum"),
        (UniformGate, {}, "variance_tokens", "variance_tokens: the gate's weights are constant"),
        (UniformGate, {"experts": []}, "z", "z: the network has no layers with a gate"),
    ],
    ids=str,
)
def test_what_the_gate_cannot_give_is_refused_before_the_first_step(library, tmp_path, gate, options, name, message):
    lm = lm_with(options.pop("experts", library), {name: 0.1}, gate, **options)
    with pytest.raises(ValueError, match=message):
        fitted(lm, tmp_path, [run_batch(rows_of(2))])
    lm.trainer.strategy.teardown()
    run = trainer(tmp_path)  # evaluation needs none of them
    run.validate(
        lm_with(library, {name: 0.1}, gate), datamodule=FixedBatches([], [run_batch(rows_of(2))]), verbose=False
    )


def test_what_a_layer_cannot_give_is_enough_from_another():
    """FixedGate over two of three experts, one of which is absent from most layers."""
    AuxiliaryTerms({"orthogonality": 1.0}).check(
        network_of("llama", partial(FixedGate, weights={"e0": 1.0, "e1": 1.0}))
    )


def test_asking_leaves_gate_and_random_numbers_alone():
    network = network_of("llama", partial(Restless))
    before, seen = torch.get_rng_state(), len(Restless.calls)
    AuxiliaryTerms({"z": 1.0}).check(network)
    assert len(Restless.calls) == seen + 1
    assert torch.equal(torch.get_rng_state(), before)
    assert all(layer.gate.steps == 0 and layer.gate.training == network.training for layer in network.layers.values())


class Restless(StretchGate):
    """Counts its steps and draws noise while it trains."""

    calls: ClassVar[list[int]] = []

    def __init__(self, site):
        super().__init__(site, top_k=1)
        self.steps = 0

    def forward(self, x, latents, bank, context):
        self.steps += self.training
        self.calls.append(1)
        routing = super().forward(x, latents, bank, context)
        return Routing(routing.weights, routing.indices, routing.logits + torch.randn_like(routing.logits))


def test_a_gate_that_stops_giving_logits_is_named():
    network, batch = network_of("llama", "uniform"), batch_of("llama")
    with pytest.raises(ValueError, match="Expected a gate with logits"):
        values_of(network, batch, ["z"])
