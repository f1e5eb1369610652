"""Numbers and classes that cannot work are answered with their key, before the first step."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from test_lightning_features import attempt  # noqa: F401 - a fixture
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from radargate_pl.config_places import ConfigError
from radargate_pl.new_experts import NewExperts
from radargate_pl.parameter_groups import optimizer_and_schedule
from radargate_pl.rotations import RadarRotation
from radargate_pl.schedule_trial import check_schedule
from radargate_pl.site import Site
from radargate_pl.trainer_config import check_trainer_config


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("accumulate_grad_batches", 0, "expected at least 1, found 0"),
        ("accumulate_grad_batches", -1, "expected at least 1, found -1"),
        ("log_every_n_steps", -1, "expected at least 0, found -1"),
        ("num_sanity_val_steps", -2, "expected at least -1, found -2"),
        ("val_check_interval", 0, "set limit_val_batches: 0"),
        ("min_steps", 7, "expected at most max_steps, which is 6, found 7"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_key(key: str, value: int, said: str) -> None:
    fine = {"barebones": False, "devices": 1, "strategy": "auto", "max_steps": 6}
    check_trainer_config(Namespace(**fine, min_steps=6, accumulate_grad_batches=1, val_check_interval=None))
    with pytest.raises(ConfigError) as error:
        check_trainer_config(Namespace(**{**fine, key: value}))
    assert f"configuration: trainer.{key}: " in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (partial(AdamW, lr=-1.0), r"^model\.optimizer: Invalid learning rate: -1\.0"),
        (partial(AdamW, betas=(2.0, 3.0)), r"^model\.optimizer: Invalid beta"),
        (partial(AdamW, foo=1), r"^model\.optimizer: .*unexpected keyword argument 'foo'"),
        (partial(AdamW, lr=math.inf), r"model\.optimizer\.lr to be a finite number, but got inf"),
        (partial(AdamW, weight_decay=math.inf), r"model\.optimizer\.weight_decay to be a finite number"),
        (partial(SGD, lr=0.1, momentum=math.inf), r"model\.optimizer\.momentum to be a finite number"),
    ],
)
def test_what_an_optimiser_refuses_has_its_key(optimizer: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        optimizer_and_schedule({"weight": nn.Parameter(torch.zeros(2))}, optimizer, None, {})


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (partial(OneCycleLR, max_lr=0.1), "You must define either total_steps"),
        (partial(LinearLR, start_factor=0), "factor expected to be greater than 0"),
    ],
)
def test_what_a_schedule_refuses_has_its_key(schedule: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.lr_scheduler: .*{said}"):
        optimizer_and_schedule({"weight": nn.Parameter(torch.zeros(2))}, AdamW, schedule, {})


def nested(optimizer: SGD, last: Any) -> SequentialLR:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=3), last(optimizer)], milestones=[3])


@pytest.mark.parametrize(
    ("schedule", "steps", "said"),
    [
        (partial(StepLR, step_size=0), 6, "it fails in step 1: integer modulo by zero"),
        (partial(CosineAnnealingLR, T_max=0), 6, "it fails in step 1: "),
        (partial(ExponentialLR, gamma=1e200), 6, "its rate is inf after step 2"),
        (partial(LambdaLR, lr_lambda=lambda step: math.nan if step == 5 else 1.0), 6, "its rate is nan after step 5"),
        (partial(nested, last=partial(OneCycleLR, max_lr=0.1, total_steps=4)), math.inf, "it fails in step 8: Tried"),
    ],
)
def test_a_schedule_that_would_fail_later_is_refused(schedule: Any, steps: float, said: str) -> None:
    made = schedule(SGD([torch.zeros(2)], lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match=f"model.lr_scheduler to give a rate for every step, but {said}"):
        check_schedule(made, steps)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=6),
        lambda o: CyclicLR(o, base_lr=0.1, max_lr=0.2, step_size_up=2),
        lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=3), ExponentialLR(o, 0.9)]),
        partial(nested, last=partial(CosineAnnealingLR, T_max=3)),
    ],
)
def test_a_trial_leaves_the_schedule_as_it_is(schedule: Any) -> None:
    def rates(try_first: bool) -> list[float]:
        optimizer = SGD([torch.zeros(2, requires_grad=True)], lr=0.1, momentum=0.9)
        made, found = schedule(optimizer), []
        if try_first:
            check_schedule(made, 6)
        for _ in range(6):
            optimizer.step()
            made.step()
            found.append(
                (
                    optimizer.param_groups[0]["lr"],
                    optimizer.param_groups[0]["momentum"],
                    getattr(made, "last_epoch", None),
                )
            )
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rates(True) == rates(False)


def test_ranks_beyond_the_layer_are_refused() -> None:
    layer = nn.Linear(6, 4)
    NewExperts(rank=6).initial_weights(("a",), "layer", layer)
    with pytest.raises(ValueError, match=r"new_experts\.rank to be at most 6, the wider side of layer, but got 7"):
        NewExperts(rank=7).initial_weights(("a",), "layer", layer)
    site = Site("layer", 6, 32, 2, ("a", "b"))
    RadarRotation(site, 32)
    with pytest.raises(ValueError, match="rotation_rank to be at most 32, the width of layer, but got 33"):
        RadarRotation(site, 33)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.accumulate_grad_batches=0"], "configuration: trainer.accumulate_grad_batches: expected at least"),
        (["--model.optimizer.dict_kwargs={foo: 1}"], "radargate: error: model.optimizer: AdamW"),
        (["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=0"], "model.lr_scheduler to give a rate"),
    ],
)
def test_the_command_line_says_it_in_one_sentence(attempt, tmp_path, words: list[str], said: str) -> None:  # noqa: F811
    code, err = attempt(*words)
    assert code != 0
    assert said in err
    assert "the traceback: /" not in err, "a foreseen mistake"
    assert not list(tmp_path.glob("runs/*/checkpoints/*.ckpt"))
