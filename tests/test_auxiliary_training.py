"""Auxiliary losses in a fit: they train what they should, are logged apart, and add up as the task loss does."""

from __future__ import annotations

from functools import partial

import pytest
import reference_losses
import torch
from test_auxiliary_terms import fitted, lm_with, values_of
from tiny_models import loss_of
from tiny_runs import RecordingLogger, adapters, rows_of
from tiny_runs import batch_of as run_batch

from radargate_pl.auxiliary_terms import NAMES
from radargate_pl.gates import StretchGate
from radargate_pl.records import record_gates

SGD = partial(torch.optim.SGD, lr=0.5)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("sizes", [[3, 1], [4]], ids=str)
def test_a_step_is_the_mean_over_examples_of_loss_and_auxiliary(library, tmp_path, sizes):
    """Plain SGD shows the gradient: (3 (loss_1 + c aux_1) + 1 (loss_2 + c aux_2)) / 4, and what is logged."""
    losses, rows, logger = {"mole_balance": 0.3, "z": 0.1, "gshard": 0.0}, rows_of(4), RecordingLogger()
    batches = [run_batch(rows[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    lm = lm_with(library, losses, optimizer=SGD)
    start = fitted(lm, tmp_path, batches, max_steps=0)
    total, means = 0.0, dict.fromkeys(losses, 0.0)
    for batch, count in zip(batches, sizes, strict=True):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        values, _ = values_of(lm.network, inputs, losses)
        weighted = sum(factor * values[name] for name, factor in losses.items())
        total = total + count / 4 * (loss_of(lm.network, inputs) + weighted)
        means = {name: mean + count / 4 * float(values[name].detach()) for name, mean in means.items()}
    total.backward()
    parameters = dict(lm.network.backbone.named_parameters())
    expected = {name: value - 0.5 * parameters[name].grad for name, value in start.items()}
    lm = lm_with(library, losses, optimizer=SGD)
    options = {"accumulate_grad_batches": len(sizes), "batch_size": 3, "logger": logger}
    for name, value in fitted(lm, tmp_path, batches, **options).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in losses:
        assert logger.values(f"train/aux/{name}") == [(0, pytest.approx(means[name], rel=1e-5))]


# ---- training ----


# The factors make each loss count about as much as the task's, or more.
FACTORS = {"orthogonality": 1.0, "variance_tokens": 20.0, "variance_experts": 20.0, "z": 1.0}
SMALLEST = {"mole_balance": reference_losses.smallest_mole_balance(3)}


def logged(library, folder, losses):
    logger = RecordingLogger()
    fitted(lm_with(library, losses, lr=2e-2), folder, [run_batch(rows_of(6))] * 8, logger=logger)
    return {name: [value for _, value in logger.values(f"train/aux/{name}")] for name in losses}


@pytest.fixture(scope="module")
def only_measured(library, tmp_path_factory):
    return logged(library, tmp_path_factory.mktemp("run"), dict.fromkeys(NAMES, 0.0))


@pytest.mark.parametrize("name", NAMES)
def test_each_lowers_its_own_value_and_a_factor_of_0_only_measures(library, only_measured, tmp_path, name):
    values = logged(library, tmp_path, {name: FACTORS.get(name, 3.0)})[name]
    assert len(values) == len(only_measured[name]) == 8
    assert values[0] == only_measured[name][0]
    if name in SMALLEST:
        assert SMALLEST[name] < values[-1]
        assert values[-1] - SMALLEST[name] < 0.8 * (only_measured[name][-1] - SMALLEST[name])
    else:
        assert values[-1] < only_measured[name][-1] - 0.04


def test_load_balancing_evens_out_the_load(library, tmp_path):
    loads = {}
    for factor in (0.0, 5.0):
        batch = run_batch(rows_of(6))
        lm = lm_with(library, {"load_balancing": factor}, partial(StretchGate, top_k=1), lr=2e-2)
        fitted(lm, tmp_path, [batch] * 12)
        with torch.no_grad(), record_gates(lm.network.backbone) as outputs:
            lm.network(batch["input_ids"], batch["attention_mask"], batch["labels"])
        shares = []
        for output in outputs.values():
            counts = output.indices[output.tokens].flatten().bincount(minlength=3).double()
            shares.append(float((counts / counts.sum()).max()))
        loads[factor] = sum(shares) / len(shares)
    assert loads[5.0] < loads[0.0] - 0.05, loads


def test_every_other_loss_stays_the_tasks(library, tmp_path):
    """At a learning rate of 0: train/loss, the summary's, validation, and the names that are logged."""
    found = []
    for losses in ({}, dict.fromkeys(NAMES, 7.0)):
        logger, lm = RecordingLogger(), lm_with(library, losses, lr=0.0)
        fitted(lm, tmp_path, [run_batch(rows_of(3))], logger=logger, limit_val_batches=1)
        names = {name for _, values in logger.calls for name in values}
        assert {name for name in names if "aux" in name} == {f"train/aux/{name}" for name in losses}
        found.append([logger.values("train/loss"), logger.values("val/loss"), float(lm.completed_step.loss)])
        assert all(found[-1])
    assert found[0] == found[1]


def test_callbacks_still_get_angles_without_graph(library, tmp_path):
    lm = lm_with(library, {"orthogonality": 1.0})
    lm.request_gates(lambda stage, step: stage == "train")
    fitted(lm, tmp_path, [run_batch(rows_of(2))], max_steps=0)
    step = lm.model_step(run_batch(rows_of(2)), "train")
    assert all(gate.angle_stats is not None and not gate.weights.requires_grad for gate in step.gates.values())
    assert step.auxiliary["orthogonality"].requires_grad
    assert lm.model_step(run_batch(rows_of(2)), "val").auxiliary == {}
