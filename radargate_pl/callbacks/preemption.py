"""Ends a fit that was asked to end, once its checkpoint is written."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from radargate_pl.callbacks.run_checkpoint import RunCheckpoint
from radargate_pl.preemption import EXIT_CODE, Preempted, SignalWatch, leave_children_alone, take_trigger


class Preemption(Checkpoint):
    """Saves and ends a fit on SIGTERM or SIGUSR1, with exit code 85; saves on ``touch RUN/save_now``.

    Ctrl-C, a closed terminal and SIGQUIT do the same with the exit codes 130, 129 and 131: a person meant the end.
    All ranks agree at the next optimiser step, over the exchange that step makes anyway; then `RunCheckpoint` writes
    its rolling checkpoint and the process ends, to be started again with ``--ckpt_path auto``. A second signal ends it
    at once. Counted as a checkpoint callback so that Lightning calls it behind all others, `RunCheckpoint` included:
    whoever counts steps has counted this one.
    """

    def __init__(self) -> None:
        self._watch: SignalWatch | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Watch for signals while the data and the network are made, too."""
        if stage == "fit":
            # Lightning's handler of SIGTERM sends it on to ranks that have it already and broadcasts in the middle of
            # whatever is running; its handler of Slurm's signal saves there.
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            self._watch = SignalWatch(pl_module.requests)
            self._watch.install()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Look for the trigger file."""
        if trainer.is_global_zero and take_trigger(Path(trainer.default_root_dir)):
            pl_module.requests.save = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the process if any rank was asked to; after the last step, the fit itself ends.

        Raises:
            Preempted: once the checkpoint is written.
        """
        done = pl_module.completed_step
        if done is None:
            return
        pl_module.requests.save = False
        savers = _savers(trainer)
        # The last step is not saved before its validation, and the fit ends by itself.
        if done.requests.stop and (not savers or any(saver.has_saved(trainer) for saver in savers)):
            leave_children_alone()
            raise Preempted(trainer.global_step, saved=bool(savers), code=self._exit_code)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """End a single process in the middle of a validation, if its step was saved before it.

        Several processes are at different batches then and cannot agree: they finish the validation.

        Raises:
            Preempted: if asked to stop.
        """
        is_alone = trainer.world_size == 1 and trainer.state.fn == "fit"
        if is_alone and pl_module.requests.stop and any(saver.has_saved(trainer) for saver in _savers(trainer)):
            raise Preempted(trainer.global_step, saved=True, code=self._exit_code)

    @property
    def _exit_code(self) -> int:
        return EXIT_CODE if self._watch is None else self._watch.exit_code

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the signals back."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None


def _savers(trainer: Trainer) -> list[RunCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]
