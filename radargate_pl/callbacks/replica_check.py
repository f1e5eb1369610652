"""Compares what trains over all processes, now and then."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from radargate_pl.replicas import check_replicas

REMEDY = (
    "A process has left the others: different hardware, libraries or data types, or a fault. Start again from the last "
    "checkpoint, without the machine that differs."
)


class ReplicaCheck(Callback):
    """Compares checksums of everything that trains over all processes every N optimiser steps.

    DDP gives every process the same gradients and trusts that the same weights come of it; nothing in a run shows when
    they do not. Experts that are divided among processes differ on purpose and are left out.

    Args:
        every_n_steps: optimiser steps between two comparisons; ``None`` for none.
    """

    def __init__(self, every_n_steps: int | None = 100) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Expected every_n_steps to be at least 1 or null, but got {every_n_steps}.")
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare, if it is time.

        Raises:
            ValueError: on every process, naming the layers that differ.
        """
        is_due = self.every_n_steps is not None and pl_module.completed_step is not None
        if trainer.world_size == 1 or not is_due or getattr(trainer.strategy, "division", None) is not None:
            return
        if trainer.global_step % (self.every_n_steps or 1) == 0:
            check_replicas(pl_module.network.trainable_state(), trainer.world_size, "trained weights", REMEDY)
