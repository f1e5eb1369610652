"""How module and callbacks reach the loggers (layer 5)."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


def log_to_loggers(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Send values to every logger now, whatever the trainer's logging interval.

    The step is Lightning's: counted from 0, so that these values stand beside ``train/loss`` of the same optimiser
    step.

    Args:
        trainer: may have no logger at all.
        values: name -> value; nothing is sent when empty.
    """
    if values:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=max(trainer.global_step - 1, 0))


def log_step(trainer: Trainer, step: int, values: Mapping[str, Tensor]) -> None:
    """Send the values of one optimiser step to every logger, at the trainer's logging interval and after the last step.

    Args:
        trainer: may have no logger at all.
        step: the optimiser step, from 1.
        values: name -> scalar; read only when they are sent, since reading makes the device wait.
    """
    every = getattr(trainer, "log_every_n_steps", 0)
    if trainer.loggers and ((every and step % every == 0) or step == trainer.max_steps):
        sent = {name: float(value) for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(sent, step=step - 1)


def finished_steps_before(trainer: Trainer, pl_module: Any) -> int:
    """Optimiser steps that were finished before the batch that just ended, which may have finished one more."""
    return trainer.global_step - (pl_module.completed_step is not None)


def is_logged_step(trainer: Trainer) -> bool:
    """Whether the step that just ended is one at which the trainer logs."""
    every = getattr(trainer, "log_every_n_steps", 0)
    return bool(every) and trainer.global_step % every == 0


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which must leave nothing behind."""
    return bool(getattr(trainer, "fast_dev_run", False))
