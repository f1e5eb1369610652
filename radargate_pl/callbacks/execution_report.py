"""What a fit runs with: the attention, compiled layers or not and why, and what compiling took."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info


class ExecutionReport(Callback):
    """Tells the network how long the fit is, which decides about ``execution.compile: auto``, and says what was chosen.

    Without this callback, in a trainer of one's own, "auto" never compiles.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Let the network decide, and say it."""
        applied = pl_module.built_network.applied_execution
        batches = batches_of_fit(trainer)
        applied.begin_fit(batches, pl_module.device, is_recorded=bool(pl_module.auxiliary_losses))
        rank_zero_info(f"execution: {applied.line()}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say what compiling took."""
        compiled = pl_module.built_network.applied_execution.compiled
        if compiled is not None and compiled.graphs:
            rank_zero_info(f"execution: compiled {compiled.graphs} graphs in {compiled.seconds:.1f} s")


def batches_of_fit(trainer: Trainer) -> float | None:
    """Batches of a whole fit on this process, at most; infinite for one that is to be stopped by hand or by the clock.

    Args:
        trainer: one whose fit has begun: before, it would load the data to count them.

    Returns:
        ``None`` if they cannot be known: epochs over data without a length, and no ``max_steps``.
    """
    steps = trainer.estimated_stepping_batches
    return None if steps < 0 else float(steps * trainer.accumulate_grad_batches)
