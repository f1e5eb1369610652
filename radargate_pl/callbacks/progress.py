"""One quiet progress line: loss, learning rate, tokens per second."""

import math
import sys
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

ENDLESS = 10  # steps between two lines of a fit whose number of steps nobody knows


class RunProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, learning rate and tokens per second.

    Without a terminal (in a job's log) it prints a line every tenth of the fit, test or prediction instead.

    Args:
        refresh_rate: batches between two updates; reading the loss makes the device wait, so not every batch.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stderr.isatty() else 0)
        self._tokens: Tensor | int = 0
        self._begun = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Validations do not count as training time."""
        super().on_validation_end(trainer, pl_module)
        self._restart()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the tokens; show them."""
        self._tokens = self._tokens + batch["attention_mask"].sum()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.is_disabled and pl_module.completed_step is not None and trainer.is_global_zero:
            total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
            # A fit that only max_time ends has no tenths.
            if trainer.global_step % (max(1, int(total) // 10) if math.isfinite(total) else ENDLESS) == 0:
                done, speed = pl_module.completed_step, self._tokens_per_second()
                line = f"loss {float(done.loss):.4f}  lr {done.learning_rate:.3g}  {speed:.0f} tokens/s"
                of_all = f"/{total}" if math.isfinite(total) else ""
                print(f"step {done.step}{of_all}  {line}", file=sys.stderr, flush=True)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        super().on_test_start(trainer, pl_module)
        self._restart()

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        """Say how far the test is."""
        super().on_test_batch_end(trainer, pl_module, *rest)
        self._say_share("test", trainer, rest[2] + 1, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        super().on_predict_start(trainer, pl_module)
        self._restart()

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        """Say how far the prediction is."""
        super().on_predict_batch_end(trainer, pl_module, *rest)
        self._say_share("predict", trainer, rest[2] + 1, trainer.num_predict_batches)

    def _say_share(self, command: str, trainer: Trainer, done: int, batches: list[int | float]) -> None:
        """A line every tenth of the batches of this process, where there is no bar."""
        total = sum(batches)
        if self.is_disabled and trainer.is_global_zero and done % max(1, total // 10) == 0:
            seconds = time.perf_counter() - self._begun
            print(f"{command}: batch {done}/{total}  {seconds:.0f} s", file=sys.stderr, flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, int | str | float | dict[str, float]]:
        """Loss, learning rate and tokens per second of this process since the last validation."""
        logged = super().get_metrics(trainer, pl_module)
        shown: dict[str, int | str | float | dict[str, float]] = {}
        for name, label in (("train/loss", "loss"), ("train/lr", "lr")):
            if name in logged:
                shown[label] = f"{logged[name]:.4g}"
        if self._begun:
            shown["tokens/s"] = f"{self._tokens_per_second():.0f}"
        return shown

    def _tokens_per_second(self) -> float:
        return int(self._tokens) / max(time.perf_counter() - self._begun, 1e-9)

    def _restart(self) -> None:
        self._tokens, self._begun = 0, time.perf_counter()
