"""Lightning's own features: each works, or is refused by name before the first step."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from tiny_runs import trainer, two_row_batches

from radargate_pl.checkpoint_files import damage, second_name
from radargate_pl.cli import main
from radargate_pl.fit_checks import check_trainer
from radargate_pl.module import AdaptedLM
from radargate_pl.parameter_groups import optimizer_and_schedule

DEBUG = ("fit", "--config", "configs/debug.yaml", "--rotation_angles.warn_below", "0")


class Averages(EMAWeightAveraging):
    """Somebody's own."""


LIGHTNING = "lightning.pytorch.callbacks."


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a fit of the tiny run in an empty folder; gives the exit code and what was said."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        code = main([*DEBUG, *words])
        return code, capsys.readouterr().err

    return run


def callback(name: str, **arguments: Any) -> tuple[str, str]:
    """The words that add a callback of Lightning's."""
    return "--trainer.callbacks", json.dumps([{"class_path": LIGHTNING + name, "init_args": arguments}])


ALL_AT_ONCE = {
    "callbacks": [
        {"class_path": LIGHTNING + name, "init_args": arguments}
        for name, arguments in {
            "StochasticWeightAveraging": {"swa_lrs": 0.01},
            "EMAWeightAveraging": {"decay": 0.5},
            "BatchSizeFinder": {"max_trials": 2},
            "LearningRateFinder": {},
            "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.5},
            "BackboneFinetuning": {},
        }.items()
    ],
    "plugins": [{"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}],
    "gradient_clip_val": -1,
    "overfit_batches": 2,
}


def test_everything_that_cannot_work_is_named_at_once(attempt, tmp_path: Path) -> None:
    code, err = attempt(*(f"--trainer.{name}={json.dumps(value)}" for name, value in ALL_AT_ONCE.items()))
    assert code == 1
    for sentence in (
        "StochasticWeightAveraging: it copies the model before",
        "EMAWeightAveraging: it would average gate/",
        "BatchSizeFinder: its trial steps",
        "LearningRateFinder: this module has no lr",
        "ModelPruning: it prunes",
        "BackboneFinetuning: it freezes parts before",
        "trainer.plugins without AsyncCheckpointIO",
        "trainer.gradient_clip_val to be positive, or 0 or null for no clipping, but got -1",
        "data.init_args.max_examples",
    ):
        assert sentence in err
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"gradient_clip_val": -0.5, "gradient_clip_algorithm": "value"}, "gradient_clip_val"),
        ({"gradient_clip_val": math.nan}, "gradient_clip_val"),
        ({"accumulate_grad_batches": -2}, "accumulate_grad_batches"),
        ({"val_check_interval": 0}, "val_check_interval"),
        ({"val_check_interval": 0.0}, "val_check_interval"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch"),
        ({"overfit_batches": 0.5}, "overfit_batches"),
    ],
)
def test_a_trainer_of_ones_own_is_checked_too(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        trainer(tmp_path, max_steps=1, **options).fit(
            AdaptedLM(lambda tasks: pytest.fail("built")), datamodule=two_row_batches()
        )


@pytest.mark.parametrize("callback", [WeightAveraging(), Averages()])
def test_averages_of_ones_own_are_refused(tmp_path: Path, callback: Any) -> None:
    with pytest.raises(ValueError, match=f"without {type(callback).__name__}: it would average gate/"):
        check_trainer(trainer(tmp_path, max_steps=1, callbacks=[callback]))


@pytest.mark.parametrize("limit", [None, 0, 0.0, 1.0, math.inf])
def test_limits_that_clip_or_do_not_are_taken(tmp_path: Path, limit: float | None) -> None:
    check_trainer(
        trainer(tmp_path, max_steps=1, gradient_clip_val=limit, val_check_interval=2, check_val_every_n_epoch=None)
    )


REFUSED = {
    "no steps": (["--trainer.max_steps=0"], "trainer.max_steps: 0, with which nothing trains"),
    "no epochs": (["--trainer.max_epochs=0"], "trainer.max_epochs: 0, with which nothing trains"),
    "no batches": (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches: 0, with which nothing trains"),
    "one device of two": (["--trainer.strategy=single_device", "--trainer.devices=2"], "single_device trains on one"),
    "bare bones": (["--trainer.barebones=true"], "trainer.barebones: expected false"),
    "parallel by data": (["--trainer.strategy=dp"], "configuration: trainer: You selected an invalid strategy"),
    "shards on a CPU": (["--trainer.strategy=fsdp"], "configuration: trainer: The strategy `fsdp` requires a GPU"),
    "a precision": (["--trainer.precision=transformer-engine"], "configuration: trainer: "),
    "a rank": (["--model.network.new_experts.rank=100000"], "new_experts.rank to be at most 64, the wider side of"),
    "an address": (["--trainer.default_root_dir=s3://bucket/run"], "expected a folder of this machine"),
    "an endless rate": (["--model.optimizer.lr=1e400"], "model.optimizer.lr to be a finite number, but got inf"),
    "a short cycle": (
        ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=0.1", "--model.lr_scheduler.total_steps=4"],
        "to last for the 6 steps of the fit, but its total_steps are 4",
    ),
    "a monitor": (callback("EarlyStopping", monitor="val_loss"), "there are: val/loss"),
    "a monitor of files": (callback("ModelCheckpoint", monitor="val_exact"), "val/exact_match"),
    "a rate that nobody names": (callback("EarlyStopping", monitor="lr-AdamW"), "but got monitor: 'lr-AdamW'"),
    "no validations": (
        [*callback("EarlyStopping", monitor="val/loss"), "--trainer.limit_val_batches=0"],
        "a fit with validations for EarlyStopping on 'val/loss'",
    ),
    "our own monitor": (["--checkpoint.monitor=val/los"], "there are: val/loss"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(attempt, tmp_path: Path, name: str) -> None:
    words, said = REFUSED[name]
    code, err = attempt(*words)
    assert code != 0
    assert said in err
    assert "the traceback: /" not in err, "a foreseen mistake"
    assert not list(tmp_path.glob("runs/*/gate"))
    assert not list(tmp_path.glob("runs/*/checkpoints/*.ckpt"))
    assert not [path for path in tmp_path.glob("runs/*/metrics.csv") if "train/loss" in path.read_text()]


WORKS = {
    "a clock, a bar of one's own, the monitor of a task": [
        "--trainer.callbacks",
        json.dumps(
            [
                {"class_path": LIGHTNING + "Timer", "init_args": {"duration": "00:00:10:00"}},
                {"class_path": LIGHTNING + "TQDMProgressBar", "init_args": {"refresh_rate": 2}},
                {"class_path": LIGHTNING + "EarlyStopping", "init_args": {"monitor": "val/letter_counting/loss"}},
            ]
        ),
        "--trainer.gradient_clip_val=0",
    ],
    "a long cycle": [
        "--model.lr_scheduler=OneCycleLR",
        "--model.lr_scheduler.max_lr=0.1",
        "--model.lr_scheduler.total_steps=6",
    ],
}


@pytest.mark.parametrize("name", WORKS)
def test_what_can_work_works(attempt, tmp_path: Path, name: str) -> None:
    code, err = attempt(*WORKS[name])
    assert code == 0, err
    assert json.loads((tmp_path / "runs/debug/summary.json").read_text())["steps"] == 6


def test_time_alone_ends_a_fit(attempt, tmp_path: Path) -> None:
    code, err = attempt("--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:02")
    assert code == 0, err
    assert "step 10  loss" in err
    assert json.loads((tmp_path / "runs/debug/summary.json").read_text())["steps"] >= 10


def test_a_fit_without_a_step_is_no_success(attempt, tmp_path: Path) -> None:
    code, err = attempt("--trainer.max_time=00:00:00:00")
    assert code == 1
    assert "at least one step, but it took none" in err
    assert not (tmp_path / "runs/debug/gate").exists()
    assert json.loads((tmp_path / "runs/debug/summary.json").read_text())["status"] != "ok"


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "but got LBFGS, which evaluates the loss several times"),
        (torch.optim.SparseAdam, "but got SparseAdam, which takes sparse gradients"),
        (partial(torch.optim.AdamW, lr=math.inf), "to be a finite number, but got inf"),
    ],
)
def test_optimisers_that_no_step_serves_are_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_and_schedule({"a": torch.zeros(2, requires_grad=True)}, optimizer, None, {})


def test_a_plugin_for_checkpoints_that_writes_no_digest_serves(tmp_path: Path) -> None:
    torch.save({"global_step": 1}, tmp_path / "step=00000001.ckpt")
    second_name(tmp_path / "step=00000001.ckpt", tmp_path / "last.ckpt")
    assert damage(tmp_path / "last.ckpt") is None
    assert (tmp_path / "last.ckpt.sha256").read_text().endswith("  last.ckpt\n")
