"""What the configuration changes wins over a checkpoint; everything else stays as it was restored."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from test_checkpoint import last
from tiny_runs import adapters, fit, gated_lm
from torch.optim import AdamW
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR, StepLR

from radargate_pl.callbacks import ExactResume, RunCheckpoint
from radargate_pl.optimizer_settings import (
    apply_optimizer_changes,
    check_schedules,
    optimizer_settings,
    schedule_settings,
)


def made(lr: float = 0.1, total: int = 10, **options: object) -> tuple[AdamW, LinearLR]:
    optimizer = AdamW([torch.zeros(2, requires_grad=True)], lr=lr, **options)
    return optimizer, LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=total)


def resumed(before: tuple, now: tuple, steps: int = 4) -> tuple[list[str], AdamW, LinearLR]:
    """`before` takes steps; its states go into `now`, whose settings then win."""
    told = [[optimizer_settings(o)[0], schedule_settings(s)] for o, s in (before, now)]
    for _ in range(steps):
        before[0].step()
        before[1].step()
    optimizer, schedule = now
    optimizer.load_state_dict(copy.deepcopy(before[0].state_dict()))
    schedule.load_state_dict(copy.deepcopy(before[1].state_dict()))
    lines = apply_optimizer_changes([told[0][0]], [told[1][0]], optimizer, [schedule])
    check_schedules([told[0][1]], [told[1][1]])
    return lines, optimizer, schedule


def test_nothing_changes_where_nothing_was_changed() -> None:
    lines, optimizer, schedule = resumed(made(), made())
    assert lines == []
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.06)
    assert schedule.last_epoch == 4


def test_a_learning_rate_scales_the_present_one_of_the_schedule_and_the_schedule_goes_on_with_it() -> None:
    lines, optimizer, schedule = resumed(made(0.1), made(0.2, weight_decay=0.5))
    assert [line.partition(":")[0] for line in lines] == ["weight_decay", "initial_lr"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.12)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.10)


def test_another_schedule_is_refused_with_both_values() -> None:
    with pytest.raises(ValueError, match="total_iters: 10 in the checkpoint, 20 now"):
        resumed(made(total=10), made(total=20))
    linear, step = made()[1], StepLR(made()[0], 3)
    with pytest.raises(ValueError, match="class: LinearLR in the checkpoint, StepLR now"):
        check_schedules([schedule_settings(linear)], [schedule_settings(step)])
    with pytest.raises(ValueError, match=r"1 schedule\(s\) in the checkpoint, 0 now"):
        check_schedules([schedule_settings(linear)], [])


def test_schedules_inside_a_schedule_are_compared() -> None:
    def settings(length: int) -> dict:
        optimizer = made()[0]
        parts = [LinearLR(optimizer, total_iters=length), StepLR(optimizer, 3)]
        return schedule_settings(SequentialLR(optimizer, parts, milestones=[5]))

    check_schedules([settings(5)], [settings(5)])
    with pytest.raises(ValueError, match="schedulers"):
        check_schedules([settings(5)], [settings(6)])


def halving(step: int) -> float:
    return 0.5**step


def warm_then_cosine(optimizer: AdamW) -> SequentialLR:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingLR(optimizer, 20)], [5])


def warm_then_lambda(optimizer: AdamW) -> SequentialLR:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=3), LambdaLR(optimizer, halving)], [3])


def chained(optimizer: AdamW) -> ChainedScheduler:
    return ChainedScheduler([LinearLR(optimizer, 0.1, total_iters=5), StepLR(optimizer, 4)])


def nested_twice(optimizer: AdamW) -> ChainedScheduler:
    return ChainedScheduler([warm_then_lambda(optimizer), StepLR(optimizer, 4)])


@pytest.mark.parametrize("steps", [0, 3, 7])
@pytest.mark.parametrize("schedule", [warm_then_cosine, warm_then_lambda, chained, nested_twice])
def test_a_changed_rate_reaches_schedules_inside_a_schedule(schedule, steps: int) -> None:
    def pair(lr: float) -> tuple:
        optimizer = made(lr)[0]
        for group in optimizer.param_groups:
            group.pop("initial_lr")
        return optimizer, schedule(optimizer)

    def rates(optimizer: AdamW, schedule: object, count: int) -> list[float]:
        found = []
        for _ in range(count):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    whole = rates(*pair(1e-3), 14)
    _, optimizer, now = resumed(pair(1e-2), pair(1e-3), steps)
    assert rates(optimizer, now, 14 - steps) == pytest.approx(whole[steps:], rel=1e-9)


def test_a_rate_of_zero_in_the_checkpoint_is_replaced() -> None:
    _, optimizer, _ = resumed(made(0.0), made(0.2), steps=0)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_fit_goes_on_with_the_rate_it_was_given_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    experts = adapters(tmp_path / "experts")
    fit(gated_lm(experts, lr=1e-2), tmp_path, RunCheckpoint(), ExactResume(), steps=2)
    path = tmp_path / "checkpoints" / "last.ckpt"
    with caplog.at_level("INFO"):
        fit(gated_lm(experts, lr=1e-3), tmp_path, RunCheckpoint(), ExactResume(), steps=4, resume=path)
    group = last(tmp_path)["optimizer_states"][0]["param_groups"][0]
    assert group["lr"] == 1e-3
    said = caplog.text + capsys.readouterr().err
    assert re.search(r"another setting: lr: 0\.01 in the checkpoint, 0\.001 now, which is used", said)


def test_without_the_callback_the_checkpoint_says_so(tmp_path: Path) -> None:
    experts = adapters(tmp_path / "experts")
    fit(gated_lm(experts), tmp_path, RunCheckpoint(), steps=2)
    path = tmp_path / "checkpoints" / "last.ckpt"
    resume = partial(fit, gated_lm(experts), tmp_path, RunCheckpoint(), ExactResume(), steps=3, resume=path)
    with pytest.warns(UserWarning, match="holds no random state"):
        resume()
