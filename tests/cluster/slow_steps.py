"""A callback for runs that are to be signalled in their middle: slow in the first start of a job, at speed later."""

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class SlowSteps(Callback):
    """Sleeps after every step until the job is requeued, and writes down the steps done.

    Args:
        seconds: how long.
        file: where the number of steps goes.
    """

    def __init__(self, seconds: float, file: str) -> None:
        self.seconds, self.file = seconds, Path(file)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.file.write_text(str(trainer.global_step))
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(self.seconds)
