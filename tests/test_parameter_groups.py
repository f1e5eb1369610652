"""Learning rates of their own for parts of what trains: groups, schedules, resuming, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import RecordingLogger, adapters, expert_lm, fit, gated_lm

from radargate_pl.callbacks import RunCheckpoint
from radargate_pl.module import AdaptedLM
from radargate_pl.parameter_groups import optimizer_and_schedule

SCHEDULES = torch.optim.lr_scheduler
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


def lm_of(library, multipliers, *, optimizer=SGD, schedule=None, gate=None):
    base = gated_lm(library, gate, optimizer=optimizer)
    return AdaptedLM(base.network_factory, base.optimizer_factory, schedule, lr_multipliers=multipliers)


def parameters(*names):
    return {name: torch.nn.Parameter(torch.ones(2)) for name in names}


NAMES = ("layers.0.gate.scorer.weight", "layers.0.gate.rotation.P", "layers.0.gate.rotation.Q", "layers.0.gate.scale")


class Rates(Callback):
    """The learning rate of every group after each step and its schedule."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_the_unmatched_come_first_and_each_part_has_its_rate():
    named = parameters(*NAMES)
    optimizer = optimizer_and_schedule(named, SGD, None, {"rotation": 5.0, "scale": 0.5})
    groups = [([id(p) for p in group["params"]], group["lr"]) for group in optimizer.param_groups]
    ids = {name.rpartition("gate.")[2]: id(p) for name, p in named.items()}
    expected = [
        ([ids["scorer.weight"]], 0.1),
        ([ids["rotation.P"], ids["rotation.Q"]], 0.5),
        ([ids["scale"]], 0.05),
    ]
    assert [(members, pytest.approx(rate)) for members, rate in expected] == groups


def test_a_part_is_whole_words_between_dots():
    named = parameters("a.gate.rotation.P", "a.gate.rotation_extra.P", "a.gate.scorer.P")
    optimizer = optimizer_and_schedule(named, SGD, None, {"rotation.P": 3.0})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert optimizer.param_groups[1]["params"][0] is named["a.gate.rotation.P"]


def test_without_multipliers_the_optimiser_is_what_it_was():
    optimizer = optimizer_and_schedule(parameters(*NAMES), SGD, None, {})
    (group,) = optimizer.param_groups
    assert (len(group["params"]), group["lr"]) == (4, 0.1)


def test_all_parameters_may_be_matched():
    named = parameters(*NAMES)
    optimizer = optimizer_and_schedule(named, partial(torch.optim.AdamW, lr=0.1), None, {"gate": 2.0})
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 4]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    for parameter in named.values():
        parameter.grad = torch.ones(2)
    optimizer.step()


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ({"rotations": 2.0}, r"\['rotations'\] are in none; there are: P, Q, gate, layers, rotation, scale, scorer"),
        ({"rotation": 2.0, "Q": 3.0}, r"\['rotation', 'Q'\] both name layers.0.gate.rotation.Q"),
        ({"rotation": 0.0}, r"lr_multipliers\['rotation'\] to be positive and finite, but got 0"),
        ({"rotation": -1.0}, r"lr_multipliers\['rotation'\] to be positive and finite, but got -1"),
        ({"rotation": float("inf")}, r"lr_multipliers\['rotation'\] to be positive and finite, but got inf"),
        ({"scor": 2.0}, r"\['scor'\] are in none"),
    ],
)
def test_bad_keys_and_values_are_named(multipliers, message):
    with pytest.raises(ValueError, match=message):
        optimizer_and_schedule(parameters(*NAMES), SGD, None, multipliers)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_schedule_that_sets_rates_itself_is_refused(name):
    options = {"OneCycleLR": {"max_lr": 0.1, "total_steps": 5}, "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0}}[name]
    schedule = partial(getattr(SCHEDULES, name), **options)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=rf"keep the ratio.*'rotation': 5.0.*{name} sets the learning rates itself"):
        optimizer_and_schedule(parameters(*NAMES), optimizer, schedule, {"rotation": 5.0})


def test_an_optimiser_without_a_rate_is_refused():
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match="Rateless has none"):
        optimizer_and_schedule(parameters(*NAMES), Rateless, None, {"rotation": 5.0})


@pytest.mark.parametrize(
    "schedule",
    [
        partial(SCHEDULES.LinearLR, start_factor=0.25, total_iters=5),
        partial(SCHEDULES.CosineAnnealingLR, T_max=4),
        partial(SCHEDULES.LambdaLR, lr_lambda=lambda step: step / 4),  # a warm-up from 0
    ],
    ids=["linear", "cosine", "lambda"],
)
def test_schedules_keep_the_ratio_and_the_base_rate_is_logged(library, tmp_path, schedule):
    rates, logger = Rates(), RecordingLogger()
    lm = lm_of(library, {"rotation": 5.0}, schedule=schedule)
    fit(lm, tmp_path, rates, logger=logger)
    assert len(rates.seen) == 4
    assert len({base for base, _ in rates.seen}) == 4
    for base, rotation in rates.seen:
        assert rotation == pytest.approx(5 * base, rel=1e-12)
    alone = Rates()
    plain, plain_logger = lm_of(library, {}, schedule=schedule), RecordingLogger()
    fit(plain, tmp_path / "plain", alone, logger=plain_logger)
    assert [base for base, _ in rates.seen] == [base for (base,) in alone.seen]
    assert logger.values("train/lr") == plain_logger.values("train/lr")


def test_the_rotation_moves_by_its_own_rate(library, tmp_path):
    """One SGD step from the same start: Q moves three times as far, the scorer as far as before."""
    moved = {}
    for factor in (1.0, 3.0):
        lm = lm_of(library, {"rotation": factor})
        fit(lm, tmp_path / str(factor), steps=1)
        moved[factor] = {name: p.detach() for name, p in lm.network.named_parameters() if ".gate." in name}
    for name, tensor in moved[3.0].items():
        factor = 3.0 if name.endswith("rotation.Q") else 1.0  # from zero; P has no gradient in the first step
        torch.testing.assert_close(tensor, factor * moved[1.0][name], rtol=1e-5, atol=1e-9)
    assert any(tensor.abs().max() > 0 for name, tensor in moved[1.0].items() if name.endswith("rotation.Q"))


def test_parts_of_training_experts_can_be_named(library, tmp_path):
    lm = expert_lm(partial(torch.optim.AdamW, lr=1e-3))
    lm.lr_multipliers = {"lora_B": 16.0}
    fit(lm, tmp_path, steps=1)
    groups = lm.trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [1e-3, 16e-3]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for n, p in lm.named_parameters() if ".lora_B." in n}


ADAM = partial(torch.optim.AdamW, lr=1e-2)
LINEAR = partial(SCHEDULES.LinearLR, start_factor=0.1, total_iters=4)


def saved_run(library, folder, multipliers):
    fit(lm_of(library, multipliers, optimizer=ADAM, schedule=LINEAR), folder, RunCheckpoint(), steps=2)
    return folder / "checkpoints/last.ckpt"


def test_a_resumed_fit_equals_an_uninterrupted_one(library, tmp_path):
    whole, resumed = (lm_of(library, {"rotation": 5.0}, optimizer=ADAM, schedule=LINEAR) for _ in range(2))
    fit(whole, tmp_path / "whole")
    checkpoint = saved_run(library, tmp_path / "cut", {"rotation": 5.0})
    rates = Rates()
    fit(resumed, tmp_path / "cut", rates, RunCheckpoint(), resume=checkpoint)
    assert all(rotation == pytest.approx(5 * base) for base, rotation in rates.seen)
    for (name, first), (_, second) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"rotation": 5.0}, {}),
        ({}, {"rotation": 5.0}),
        ({"P": 5.0}, {"Q": 5.0}),
        ({"rotation": 5.0}, {"rotation": 2.0}),
    ],
    ids=str,
)
def test_resuming_with_other_multipliers_is_refused(library, tmp_path, before, after):
    checkpoint = saved_run(library, tmp_path, before)
    lm = lm_of(library, after, optimizer=ADAM, schedule=LINEAR)
    with pytest.raises(ValueError, match="Expected the lr_multipliers of the checkpoint"):
        fit(lm, tmp_path, RunCheckpoint(), resume=checkpoint)


def test_a_mistyped_part_of_a_network_shows_the_names_there_are(library, tmp_path):
    with pytest.raises(ValueError, match=r"\['rotaton'\] are in none; there are: .*rotation.*scorer"):
        fit(lm_of(library, {"rotaton": 5.0}), tmp_path, steps=1)
