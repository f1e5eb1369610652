"""Checkpoints with fixed names, each file whole or absent."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from radargate_pl.checkpoint_files import damage, remove_checkpoint, remove_leftovers, second_name, write_checkpoint
from radargate_pl.notices import say_once
from radargate_pl.step_logging import is_trial
from radargate_pl.validation_state import is_accumulating, validation_follows

CHECKPOINTS = "checkpoints"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it to disk and renames it; reads it as data only.

    Lightning's own writes to ``$TMPDIR`` and moves: across file systems that is a copy, half done when the job is
    killed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one checkpoint.

        Args:
            checkpoint: what to save.
            path: the file.
            storage_options: not used.
        """
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read one checkpoint without running any code in it.

        Args:
            path: the file.
            map_location: as in ``torch.load``.
            weights_only: always true, whatever is asked for.
        """
        content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        return content


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``step=00000040.ckpt``, ``last.ckpt`` and ``best.ckpt`` in ``checkpoints/`` of the run folder.

    ``best.ckpt`` is the checkpoint with the lowest ``val/loss``, ``last.ckpt`` the newest. Both are second names of
    step files and stay when those are removed; each has its SHA-256 beside it. A checkpoint is written every
    ``every_n_steps``, before and after each validation (only after the one that ends the fit), at the end, and whenever
    a step was asked for one. All of them are taken between two optimiser steps, never in the middle of an accumulation.

    Args:
        every_n_steps: optimiser steps between two checkpoints; ``None`` saves at validations and at the end only.
        keep: how many of the newest step files stay; -1 keeps all. With 2, the last but one is there if the last is
            damaged.
        monitor: logged value that decides what is best, lower is better.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 2, monitor: str = "val/loss") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Expected every_n_steps to be at least 1 or null, but got {every_n_steps}")
        if keep < 1 and keep != -1:
            raise ValueError(f"Expected keep to be at least 1, or -1 for all, but got {keep}")
        super().__init__(monitor=monitor, mode="min", save_last=True, every_n_epochs=1, enable_version_counter=False)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._best: float | None = None
        self._goes_back = False

    @property
    def state_key(self) -> str:
        """One key whatever the arguments, so that a resumed fit may save more or less often."""
        return type(self).__qualname__

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Take the run folder's ``checkpoints``, and make every save of this trainer atomic."""
        self.dirpath = str(Path(trainer.default_root_dir).resolve() / CHECKPOINTS)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # somebody's own plugin stays
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit" and trainer.is_global_zero and not is_trial(trainer):
            remove_leftovers(self._folder)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save every ``every_n_steps``, before a validation, after the last step, and when asked to."""
        done = pl_module.completed_step
        if done is None:
            return
        is_due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        is_last = trainer.global_step == trainer.max_steps
        if is_last and validation_follows(trainer):
            return  # a fit that goes on from its last step has no more to do, not even that validation
        # The end of the fit is too late: Lightning then believes the epoch is over, and a longer fit would skip its
        # rest.
        if is_due or is_last or validation_follows(trainer) or done.requests.save or done.requests.stop:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Nothing: steps and validations decide."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save, and keep the file as ``best.ckpt`` if the monitored value has never been lower."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or is_trial(trainer):
            return
        if is_accumulating(trainer):
            say_once(
                "This validation fell between the micro-batches of a step: no checkpoint is written, and it may not "
                "become the best. Make trainer.val_check_interval and the batches of an epoch multiples of "
                "trainer.accumulate_grad_batches."
            )
            return
        value = trainer.callback_metrics.get(str(self.monitor))
        is_best = value is not None and (self._best is None or float(value) < self._best)
        if value is not None and is_best:
            self._best = float(value)  # before saving: the file must know about itself
            self.best_model_score = value
            self.best_model_path = str(self._folder / "best.ckpt")
        self._save(trainer, is_best=is_best)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save what no step or validation has saved."""
        if not self.has_saved(trainer):
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Nothing: in the middle of a step there is no state to go on from, and ``last.ckpt`` is there."""

    def has_saved(self, trainer: Trainer) -> bool:
        """Whether the present step has a checkpoint; Lightning counts a fit's beginning as saved, where none lies."""
        return self._last_global_step_saved == trainer.global_step and self._path(trainer).is_file()

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None, "set in setup"
        return Path(self.dirpath)

    def _path(self, trainer: Trainer) -> Path:
        return self._folder / f"step={trainer.global_step:08d}.ckpt"

    def _save(self, trainer: Trainer, is_best: bool = False) -> None:
        folder = self._folder
        path = self._path(trainer)
        if is_trial(trainer):
            return
        self.last_model_path = str(folder / "last.ckpt")
        for logger in trainer.loggers:
            logger.save()  # a fit that goes on from here has the rows of all steps before
        self._save_checkpoint(trainer, str(path))
        if trainer.is_global_zero:
            if is_best:  # before last.ckpt: killed in between, a fit repeats the validation
                second_name(path, folder / "best.ckpt")
            second_name(path, folder / "last.ckpt")
            self._remove_discarded(folder, trainer.global_step)
            self._remove_older(folder, path)
        trainer.strategy.barrier()

    def _remove_discarded(self, folder: Path, step: int) -> None:
        """A fit that went back to an earlier checkpoint takes the later steps anew: theirs must not be found again."""
        if not self._goes_back:
            return
        self._goes_back = False
        later = [path for path in sorted(folder.glob("step=*.ckpt")) if path.name > f"step={step:08d}.ckpt"]
        later += [folder / "best.ckpt"] if self._best is None else []
        for path in (path for path in later if _step_of(path) > step):
            remove_checkpoint(path)
            rank_zero_info(f"{path}: removed, this fit has gone back behind its step and takes it anew.")

    def _remove_older(self, folder: Path, newest: Path) -> None:
        if self.keep == -1:
            return
        older = sorted(path for path in folder.glob("step=*.ckpt") if path.name <= newest.name)
        for path in older[: -self.keep]:
            remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best value so far; `on_fit_start` forgets it where it belongs to another run folder."""
        self._best = state_dict["best"]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the best value of a checkpoint from this run folder only, wherever that has been moved to."""
        come_from = Path(trainer.ckpt_path).resolve().parent if trainer.ckpt_path else None
        self._goes_back = come_from == self._folder
        if not self._goes_back:
            self._best = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget a best value whose file is part of the steps taken anew; only now the step is known."""
        super().on_train_start(trainer, pl_module)
        best = self._folder / "best.ckpt"
        if self._goes_back and _step_of(best) > trainer.global_step:
            self._best = None
        elif self._best is not None:
            self.best_model_path = str(best)


def _step_of(path: Path) -> int:
    """Step of a checkpoint file; -1 where there is none, or none that opens."""
    if not path.is_file() or damage(path) is not None:
        return -1
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
