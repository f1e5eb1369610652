"""What a checkpoint needs beside weights, moments and loops, for a fit to go on as if it had never stopped."""

import os
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from radargate_pl.optimizer_settings import (
    apply_optimizer_changes,
    apply_schedule_changes,
    optimizer_settings,
    schedule_settings,
)
from radargate_pl.random_state import random_state, seed_rank, set_random_state
from radargate_pl.validation_state import TRAINING, is_between_steps, mark_validation_as_begun, validation_follows

SECTION = "resume"


class ExactResume(Callback):
    """Stores and restores the random numbers of every rank, batch counts and optimiser settings.

    The order of the data is no concern of this callback: the train loader keeps its own position. A fit may go on with
    another number of processes, as long as ``batch_size * processes`` divides the position; the same product with
    ``accumulate_grad_batches`` means the same steps over the same examples. What the configuration says of the
    optimiser beats what the checkpoint says, and is printed.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._must_restore = False
        self._optimizers: list[Any] = []  # settings of this run's configuration
        self._schedules: list[Any] = []

    @property
    def may_validate_again(self) -> bool:
        """Whether the checkpoint that the fit goes on from was written before any validation of its step."""
        return self._resumed is not None and not self._resumed["is_validated"]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Read what the configuration says of the optimiser, before a checkpoint is loaded into it."""
        self._optimizers = [optimizer_settings(optimizer) for optimizer in trainer.optimizers]
        self._schedules = [schedule_settings(config.scheduler) for config in trainer.lr_scheduler_configs]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the section ``resume``; all ranks take part."""
        states = [random_state()]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(states, random_state())
        checkpoint[SECTION] = {
            "random_states": states,
            "examples_a_batch": _examples_a_batch(trainer),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "optimizers": self._optimizers,
            "schedules": self._schedules,
            "is_validated": not is_between_steps(trainer),
        }
        if is_between_steps(trainer) and validation_follows(trainer):
            mark_validation_as_begun(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the section; count batches as this run counts them.

        Raises:
            ValueError: if the position lies inside a batch of this run.
        """
        if trainer.state.fn != "fit":
            return
        self._resumed = checkpoint.get(SECTION)
        if self._resumed is None:
            rank_zero_warn("The checkpoint holds no random state (no ExactResume when it was written): not exact.")
            return
        before, now = self._resumed["examples_a_batch"], _examples_a_batch(trainer)
        if before != now:
            _recount(checkpoint["loops"]["fit_loop"], before, now)
        steps = (before * self._resumed["accumulate_grad_batches"], now * trainer.accumulate_grad_batches)
        if steps[0] != steps[1]:
            rank_zero_warn(f"Steps have {steps[1]} examples from here on, and had {steps[0]} before.")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Let the configured optimiser settings win; give every rank random numbers of its own."""
        if self._resumed is None:
            if trainer.world_size > 1 and not trainer.global_step:
                seed_rank(_seed(), trainer.global_rank)
            return
        self._must_restore = True
        for line in self._changes(trainer, self._resumed):
            rank_zero_info(f"resuming with another setting: {line}")

    def _changes(self, trainer: Trainer, resumed: dict[str, Any]) -> list[str]:
        schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        lines = []
        for before, now, optimizer in zip(resumed["optimizers"], self._optimizers, trainer.optimizers, strict=True):
            lines += apply_optimizer_changes(before, now, optimizer, schedulers)
        if len(resumed["schedules"]) == len(schedulers):
            for before, now, scheduler in zip(resumed["schedules"], self._schedules, schedulers, strict=True):
                lines += apply_schedule_changes(before, now, scheduler)
        return lines

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the random numbers back, at the last moment before they are used."""
        if not self._must_restore:
            return
        assert self._resumed is not None, "set together"
        self._must_restore = False
        states = self._resumed["random_states"]
        if trainer.global_rank < len(states):
            set_random_state(states[trainer.global_rank])
        else:
            seed_rank(_seed(), trainer.global_rank, trainer.global_step)


def may_validate_again(trainer: Trainer) -> bool:
    """Whether a resumed fit may repeat a validation of its latest step, of which files may hold rows already."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return any(isinstance(callback, ExactResume) and callback.may_validate_again for callback in callbacks)


def _examples_a_batch(trainer: Trainer) -> int:
    """Examples of one batch of all processes."""
    return int(getattr(trainer.datamodule, "batch_size", 1)) * trainer.world_size  # type: ignore[attr-defined]


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def _recount(fit_loop: dict[str, Any], before: int, now: int) -> None:
    for part in ("total", "current"):
        counts = fit_loop[TRAINING][part]
        examples = counts["processed"] * before
        if examples % now:
            raise ValueError(
                f"Expected data.init_args.batch_size times the number of processes to divide the {examples} examples "
                f"behind this checkpoint, but got {now} (it was {before}). Resume with a divisor of {before}, or with "
                "the old numbers."
            )
        behind = counts["processed"] - counts["completed"]  # 1 at the end of a batch, 0 after a validation
        counts.update(dict.fromkeys(("ready", "started", "processed"), examples // now))
        counts["completed"] = counts["processed"] - behind
