"""Where a fit stands between a training step and the validation that follows it (layer 5).

Lightning's loops decide in private methods whether a validation is due, and a checkpoint that was written just before
one makes a resumed fit skip it. Both are dealt with here and nowhere else.
"""

from typing import Any

from lightning.pytorch import Trainer

TRAINING, VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"


def validation_follows(trainer: Trainer) -> bool:
    """Tell, at the end of a training batch, whether a validation comes before the next one."""
    loop = trainer.fit_loop.epoch_loop
    if not loop._should_check_val_epoch():
        return False
    # The module stops the trainer after the last step so that it validates.
    is_last = trainer.global_step == trainer.max_steps
    fetcher = trainer.fit_loop._data_fetcher
    return is_last or (fetcher is not None and bool(loop._should_check_val_fx(fetcher)))


def is_accumulating(trainer: Trainer) -> bool:
    """Tell whether the latest micro-batch did not complete an optimiser step."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def is_between_steps(trainer: Trainer) -> bool:
    """Tell whether a checkpoint is being written at the end of a training batch, rather than of a validation."""
    return bool(trainer.training)


def mark_validation_as_begun(checkpoint: dict[str, Any]) -> None:
    """Make a fit that goes on from this checkpoint begin with the validation.

    Args:
        checkpoint: Lightning's, changed in place: it now says that a validation was left in its first batch.
    """
    loop = checkpoint["loops"]["fit_loop"]
    for part in ("total", "current"):
        loop[VALIDATION][part] = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
        # Not "at the end of a batch": Lightning would take the last batch of an epoch for the end of that epoch.
        loop[TRAINING][part]["completed"] = loop[TRAINING][part]["processed"]
    loop[VALIDATION]["is_last_batch"] = False
