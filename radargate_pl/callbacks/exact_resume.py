"""What a checkpoint needs beside weights, moments and loops, for a fit to go on as if it had never stopped."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from radargate_pl.optimizer_settings import (
    apply_optimizer_changes,
    check_schedules,
    optimizer_settings,
    schedule_settings,
)
from radargate_pl.processes import gathered
from radargate_pl.random_state import random_state, seed_rank, set_random_state
from radargate_pl.validation_state import (
    TRAINING,
    count_epoch_as_begun,
    is_between_steps,
    mark_validation_as_begun,
    validation_follows,
)

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
        """Read what the configuration says of the optimiser, before a checkpoint is loaded into it.

        Raises:
            ValueError: on every rank, when they go on from different checkpoints.
        """
        _check_same_checkpoint(trainer, pl_module)
        self._optimizers = [optimizer_settings(optimizer) for optimizer in trainer.optimizers]
        self._schedules = [schedule_settings(config.scheduler) for config in trainer.lr_scheduler_configs]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the section ``resume``; all ranks take part."""
        checkpoint[SECTION] = {
            "random_states": gathered(self._present_state(trainer), trainer.world_size),
            "examples_a_batch": _examples_a_batch(trainer),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "optimizers": self._optimizers,
            "schedules": self._schedules,
            "is_validated": not is_between_steps(trainer),
        }
        if is_between_steps(trainer) and validation_follows(trainer):
            mark_validation_as_begun(checkpoint)

    def _present_state(self, trainer: Trainer) -> dict[str, Any]:
        """This rank's random numbers; those of the checkpoint until they are put back (a validation may come first)."""
        states = self._resumed["random_states"] if self._resumed and self._must_restore else []
        is_known = trainer.global_rank < len(states)
        return states[trainer.global_rank] if is_known else random_state(trainer.strategy.root_device)

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
        check_schedules(resumed["schedules"], self._schedules)
        schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        lines = []
        for before, now, optimizer in zip(resumed["optimizers"], self._optimizers, trainer.optimizers, strict=True):
            lines += apply_optimizer_changes(before, now, optimizer, schedulers)
        return lines

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """See to the count of epochs, where a resumed fit begins with a validation: a checkpoint follows it."""
        if self._must_restore:
            count_epoch_as_begun(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the random numbers back, at the last moment before they are used."""
        if not self._must_restore:
            return
        count_epoch_as_begun(trainer)
        assert self._resumed is not None, "set together"
        self._must_restore = False
        states = self._resumed["random_states"]
        if trainer.global_rank < len(states):
            set_random_state(states[trainer.global_rank], trainer.strategy.root_device)
        else:
            seed_rank(_seed(), trainer.global_rank, trainer.global_step)


def _check_same_checkpoint(trainer: Trainer, pl_module: Any) -> None:
    """Each rank looks for the newest checkpoint by itself; a file system may show an older one to some."""
    mine = Path(trainer.ckpt_path).name if trainer.ckpt_path else "none", int(pl_module.restored_step)
    everywhere = gathered(mine, trainer.world_size)
    if len(set(everywhere)) > 1:
        found = ", ".join(f"rank {rank}: {name} of step {step}" for rank, (name, step) in enumerate(everywhere))
        raise ValueError(
            f"Expected every process to go on from the same checkpoint, but got {found}. Name it (--ckpt_path FILE), "
            "and check that all nodes see the same files."
        )


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
    for part in ("current", "total"):
        counts = fit_loop[TRAINING][part]
        examples = counts["processed"] * before
        if part == "current" and examples % now:
            raise ValueError(
                f"Expected data.init_args.batch_size times the number of processes to divide the {examples} examples "
                f"behind this checkpoint, but got {now} (it was {before}). Resume with a divisor of {before}, or with "
                "the old numbers."
            )
        behind = counts["processed"] - counts["completed"]  # 1 at the end of a batch, 0 after a validation
        counts.update(dict.fromkeys(("ready", "started", "processed"), examples // now))
        counts["completed"] = counts["processed"] - behind
