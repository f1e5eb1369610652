"""Where a fit stands: between a training step and the validation that follows it, and in which epoch (layer 5).

Lightning's loops decide in private methods whether a validation is due; a checkpoint that was written just before one
makes a resumed fit skip it; and a fit that goes on from the end of an epoch counts the next one as done, but not as
begun. All three are dealt with here and nowhere else.
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


def count_epoch_as_begun(trainer: Trainer) -> None:
    """Count the epoch under way as begun, once and no more, whatever a resumed fit has made of it.

    Lightning leaves it out where a checkpoint was written behind the last batch of an epoch. A checkpoint at the end of
    a later epoch then looks as if that epoch had been finished, and a fit that goes on from it repeats its data.

    Args:
        trainer: inside an epoch.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    for counts in (progress.total, progress.current):
        counts.ready = counts.started = counts.processed + 1
