"""How the training loss comes down: smoothed curve, oscillation, plateau, steps to a threshold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from radargate_pl.atomic_files import write_json
from radargate_pl.step_logging import is_logged_step, log_to_loggers

CONVERGENCE_FILE = "convergence.json"
PLATEAU_SHARE = 0.1


def exponential_average(losses: Sequence[float], decay: float = 0.98, before: Sequence[float] = ()) -> list[float]:
    """Bias-corrected exponential moving average of a loss.

    ``m_t = decay m_{t-1} + (1 - decay) l_t``, ``ema_t = m_t / (1 - decay^t)``.

    Args:
        losses: one value per step.
        decay: weight of the past, in [0, 1).
        before: averages of the steps before these, if the curve goes on.

    Returns:
        As many values as losses; the very first equals the first loss.

    Example:
        >>> exponential_average([4.0, 1.0], decay=0.5)
        [4.0, 2.0]
        >>> exponential_average([1.0], decay=0.5, before=[4.0])
        [2.0]
    """
    weight = 1 - decay ** len(before)
    average, averages = (before[-1] * weight if before else 0.0), []
    for loss in losses:
        average = decay * average + (1 - decay) * loss
        weight = decay * weight + (1 - decay)
        averages.append(average / weight)
    return averages


def oscillation(average: Sequence[float], window: int) -> float | None:
    """Mean absolute second difference of the smoothed loss, ``mean |e_{t+1} - 2 e_t + e_{t-1}|``, over its last values.

    Args:
        average: smoothed loss per step, in nats.
        window: number of last values looked at.

    Returns:
        In nats per step squared; ``None`` for fewer than three values.

    Example:
        >>> oscillation([0.0, 1.0, 0.0, 1.0], window=4)
        2.0
    """
    last = average[-window:]
    bends = [abs(last[i + 1] - 2 * last[i] + last[i - 1]) for i in range(1, len(last) - 1)]
    return sum(bends) / len(bends) if bends else None


def plateau(losses: Sequence[float]) -> float | None:
    """Mean raw loss over the last tenth of the steps (at least one), in nats; ``None`` without any.

    Args:
        losses: one value per step.

    Example:
        >>> plateau([9.0] * 18 + [1.0, 3.0])
        2.0
    """
    last = losses[-max(1, round(PLATEAU_SHARE * len(losses))) :]
    return sum(last) / len(last) if last else None


def steps_to_threshold(average: Sequence[float], threshold: float, first_step: int = 1) -> int | None:
    """The first step at which the smoothed loss is at or below a threshold; ``None`` if it never is.

    Args:
        average: smoothed loss per step, in nats.
        threshold: in nats.
        first_step: number of the first value's step.

    Example:
        >>> steps_to_threshold([3.0, 2.0, 1.0], threshold=2.0)
        2
    """
    return next((first_step + index for index, value in enumerate(average) if value <= threshold), None)


class LossConvergenceMonitor(Callback):
    """Follows the loss of every optimiser step, logs its trend and writes ``convergence.json``.

    Logs ``train/loss_ema``, ``train/loss_oscillation`` and ``train/loss_plateau`` at the trainer's logging interval.
    The curve is part of the checkpoint, so a resumed fit goes on with it.

    Args:
        decay: of the exponential moving average.
        window: last steps that oscillation looks at.
        thresholds: losses in nats whose first crossing by the average is reported; empty = 1.05 times the final
            plateau.
    """

    def __init__(self, decay: float = 0.98, window: int = 100, thresholds: Sequence[float] = ()) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Expected decay to lie in [0, 1), but got {decay}")
        if window < 3:
            raise ValueError(f"Expected window to be at least 3 steps, as a second difference needs, but got {window}")
        self.decay = decay
        self.window = window
        self.thresholds = tuple(thresholds)
        self._first_step = 1
        self._losses: list[float] = []
        self._average: list[float] = []
        self._pending: list[Tensor] = []  # on the device: reading each at once would make every step wait for it

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin at the trainer's step, unless a checkpoint brought the curve along."""
        if self._first_step + len(self._losses) != trainer.global_step + 1:
            self._first_step, self._losses, self._average = trainer.global_step + 1, [], []
        self._pending.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take in the loss of a completed step."""
        if pl_module.completed_step is None:
            return
        self._pending.append(pl_module.completed_step.loss)
        if is_logged_step(trainer):
            self._flush()
            values = {
                "train/loss_ema": self._average[-1],
                "train/loss_oscillation": oscillation(self._average, self.window),
                "train/loss_plateau": plateau(self._losses),
            }
            log_to_loggers(trainer, {name: value for name, value in values.items() if value is not None})

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the curve so far."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the whole curve."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Keep what there is of the curve."""
        if self._losses or self._pending:
            self._write(trainer)

    def report(self) -> dict[str, Any]:
        """The content of ``convergence.json``: settings, curve, and what follows from it (losses in nats)."""
        self._flush()
        average = self._average
        level = plateau(self._losses)
        thresholds = self.thresholds or ((1.05 * level,) if level is not None else ())
        return {
            "format_version": 1,
            "decay": self.decay,
            "window": self.window,
            "first_step": self._first_step,
            "loss": self._losses,
            "ema": average,
            "final_ema": average[-1] if average else None,
            "oscillation": oscillation(average, self.window),
            "plateau": level,
            "steps_to_threshold": [
                {"threshold": value, "step": steps_to_threshold(average, value, self._first_step)}
                for value in thresholds
            ],
        }

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / CONVERGENCE_FILE, self.report())

    def _flush(self) -> None:
        if self._pending:
            losses = torch.stack(self._pending).tolist()
            self._pending.clear()
            self._average += exponential_average(losses, self.decay, self._average)
            self._losses += losses

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        self._flush()
        curves = {"losses": self._losses, "average": self._average}  # recomputed, its last digits would differ
        return {
            "first_step": self._first_step,
            **{name: torch.tensor(values, dtype=torch.float64) for name, values in curves.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curve of the checkpoint."""
        self._first_step = int(state_dict["first_step"])
        self._losses = state_dict["losses"].tolist()
        self._average = state_dict["average"].tolist()
