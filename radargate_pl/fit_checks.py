"""What is refused before a fit takes its first step: features of Lightning that would do nothing, or half (layer 5)."""

import difflib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR

from radargate_pl.metrics import TaskScore, named_scores
from radargate_pl.schedule_trial import check_schedule
from radargate_pl.search import check_search
from radargate_pl.strategy import check_strategy

if TYPE_CHECKING:
    from radargate_pl.module import AdaptedLM

# Callbacks of Lightning that cannot do here what they are for: why, and what to do instead.
REFUSED: dict[type[Callback], str] = {
    StochasticWeightAveraging: "it copies the model before the network is there, and would average nothing; lower the "
    "rate towards the end with model.lr_scheduler instead",
    WeightAveraging: "it would average gate/ and experts/ but not the checkpoints, so that one run held two models; "
    "lower the rate towards the end with model.lr_scheduler instead",
    BatchSizeFinder: "its trial steps would count as the fit's; set data.init_args.batch_size, with "
    "trainer.accumulate_grad_batches for larger steps",
    LearningRateFinder: "this module has no lr to set; set model.optimizer.init_args.lr, and compare short fits",
    ModelPruning: "it prunes before the network is there; choose new_experts.rank smaller instead",
    BaseFinetuning: "it freezes parts before the network is there, and the backbone is frozen already; "
    "model.network.init_args.train says what trains",
}


def check_trainer(trainer: Trainer) -> None:
    """Refuse what of Lightning cannot work in a fit, before anything is loaded.

    Raises:
        ValueError: naming every setting, with why and what to do instead.
    """
    problems = [*_callback_problems(trainer), *_setting_problems(trainer), *_strategy_problems(trainer)]
    if problems:
        raise ValueError("\n".join(problems))


def check_takes_steps(trainer: Trainer) -> None:
    """Refuse settings with which a fit takes no step at all.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(
                f"Expected a fit to take steps, but got trainer.{name}: 0, with which nothing trains. Use validate, or "
                "test, for a gate as it is; fit --preview true for a look at the data."
            )


def check_fit(lm: "AdaptedLM") -> None:
    """Refuse what only shows once network, data and optimiser are there, before the first step.

    Raises:
        ValueError: for a search, strategy, monitor or schedule that does not fit.
    """
    check_search(lm)
    check_strategy(lm.trainer.strategy, lm.built_network)
    check_monitors(lm)
    check_schedule_lengths(lm.trainer)
    for config in lm.trainer.lr_scheduler_configs:
        check_schedule(config.scheduler, lm.trainer.estimated_stepping_batches - lm.trainer.global_step)


def check_monitors(lm: "AdaptedLM") -> None:
    """Refuse to watch a value that nobody logs; where strangers' callbacks run, they may log anything.

    Raises:
        ValueError: with the nearest names there are.
    """
    callbacks: list[Any] = lm.trainer.callbacks  # type: ignore[attr-defined]
    if any(type(one).__module__.split(".")[0] not in ("radargate_pl", "lightning") for one in (*callbacks, lm)):
        return
    score = TaskScore(0.0, 0.0, 0)
    known = [*named_scores("val", dict.fromkeys(lm.task_names, score)), "train/loss", "train/lr"]
    known += [f"train/aux/{name}" for name in lm.auxiliary_losses.coefficients]
    has_rates = any(isinstance(callback, LearningRateMonitor) for callback in callbacks)  # by the optimiser's name
    for callback in callbacks:
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or not getattr(callback, "strict", True):
            continue
        name = callback.monitor
        if isinstance(callback, EarlyStopping) and str(name).startswith("val/") and not lm.trainer.enable_validation:
            raise ValueError(
                f"Expected a fit with validations for EarlyStopping on {name!r}, but got none. Raise "
                "trainer.limit_val_batches, or monitor train/loss."
            )
        if name is not None and name not in known and not (has_rates and name.startswith("lr-")):
            near = difflib.get_close_matches(name, known, 3, 0.4) or known[:5]
            raise ValueError(
                f"Expected {type(callback).__name__} to monitor a value that is logged, but got monitor: {name!r}. "
                f"The nearest there are: {', '.join(near)}."
            )


def check_schedule_lengths(trainer: Trainer) -> None:
    """Refuse a OneCycleLR that ends before the fit does: torch raises in the first step behind its end.

    Raises:
        ValueError: naming both numbers of steps.
    """
    steps = trainer.estimated_stepping_batches
    for scheduler in _with_inner(config.scheduler for config in trainer.lr_scheduler_configs):
        if isinstance(scheduler, OneCycleLR) and math.isfinite(steps) and scheduler.total_steps < steps:
            raise ValueError(
                f"Expected model.lr_scheduler OneCycleLR to last for the {steps} steps of the fit, but its total_steps "
                f"are {scheduler.total_steps}. Set total_steps: {steps}."
            )


def _with_inner(schedulers: Any) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        if isinstance(scheduler, ChainedScheduler):
            yield from _with_inner(scheduler._schedulers)


def _callback_problems(trainer: Trainer) -> Iterator[str]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                yield f"Expected trainer.callbacks without {type(callback).__name__}: {reason}."


def _setting_problems(trainer: Trainer) -> Iterator[str]:
    limit = trainer.gradient_clip_val
    if limit is not None and not limit >= 0:
        yield (
            f"Expected trainer.gradient_clip_val to be positive, or 0 or null for no clipping, but got {limit}, which "
            "would turn gradients round."
        )
    every = {name: getattr(trainer, name) for name in ("accumulate_grad_batches", "check_val_every_n_epoch")}
    for name, value in {**every, "val_check_interval": trainer.val_check_interval}.items():
        if isinstance(value, int | float) and value <= 0:  # a limit of time, or none, is no number
            yield f"Expected trainer.{name} to be positive, but got {value}."
    if getattr(trainer, "overfit_batches", 0):
        yield (
            "Expected trainer.overfit_batches to be 0: the data keep their own order and position. Use "
            "data.init_args.max_examples for a fit on a few examples."
        )


def _strategy_problems(trainer: Trainer) -> Iterator[str]:
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        yield (
            f"Expected trainer.strategy to be auto, ddp or gate_ddp, but got {type(strategy).__name__}, which divides "
            "parameters that checkpoints and gate folders need whole."
        )
    if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
        yield (
            "Expected trainer.plugins without AsyncCheckpointIO: last.ckpt and its SHA-256 are made of a file that is "
            "there when saving returns. Checkpoints hold only what trains, and are written in a moment."
        )
