"""How far a gate rotates: angles per layer and expert, in training and over each validation."""

import csv
import io
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from radargate_pl.atomic_files import write_text
from radargate_pl.callbacks.exact_resume import may_validate_again
from radargate_pl.processes import gathered
from radargate_pl.records import AngleStatistics, GateOutput
from radargate_pl.step_logging import finished_steps_before, log_to_loggers

ANGLES_FILE = "angles.csv"
OF_ANGLES = ("count", "angle_count", "mean_sum", "abs_sum", "square_sum", "beyond_sum")
SUMS = (*OF_ANGLES, "cosine_count", "cosine_before", "cosine_after")


@dataclass(frozen=True)
class AngleSummary:
    """Angles of one expert at one layer, or of several pooled.

    Attributes:
        tokens: token-expert pairs behind the numbers.
        angle_mean: mean angle over tokens and planes, in radians.
        angle_mean_abs: mean absolute angle, in radians.
        angle_rms: root mean square angle, in radians.
        beyond_quarter_pi: share of planes turned by more than pi / 4.
        cosine_before: mean cosine with the other kept experts before rotation; NaN when never kept together.
        cosine_after: the same after rotation.
    """

    tokens: float
    angle_mean: float
    angle_mean_abs: float
    angle_rms: float
    beyond_quarter_pi: float
    cosine_before: float
    cosine_after: float


def summarize_angles(statistics: AngleStatistics, expert: int | None = None) -> AngleSummary:
    """Turn sums into means: ``rms = sqrt(sum a^2 / (tokens * planes))`` and so on.

    Args:
        statistics: sums over tokens of one layer.
        expert: local index of one expert; ``None`` pools all of them.

    Returns:
        The means; NaN where there was nothing to average.
    """
    if expert is not None:
        return summarize_experts(statistics)[expert]
    return _summary(*(float(getattr(statistics, name).sum()) for name in SUMS))


def summarize_experts(statistics: AngleStatistics) -> list[AngleSummary]:
    """Turn sums into means, expert by expert; see `summarize_angles`.

    Args:
        statistics: sums over tokens of one layer.
    """
    columns = (_rows(getattr(statistics, name)) for name in SUMS)
    return [_summary(*row) for row in zip(*columns, strict=True)]


class RotationAngleMonitor(Callback):
    """Logs angles while training, writes ``angles.csv`` over each validation, warns when the rotation does nothing.

    Every ``every_n_steps`` optimiser steps the loggers get ``gate/<layer>/angle_rms``, ``angle_mean_abs``,
    ``beyond_quarter_pi``, ``cosine_before`` and ``cosine_after``. Each validation of a fit appends a row per layer and
    expert to ``angles.csv`` and logs ``val/angle_rms``. Gates without a rotation cost nothing and write nothing.

    Args:
        every_n_steps: optimiser steps between two entries in the loggers.
        warn_below: RMS angle in radians under which, twice in a row or at the end of the fit, the rotation counts as
            idle.
    """

    def __init__(self, every_n_steps: int = 50, warn_below: float = 0.02) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected every_n_steps to be at least 1, but got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.warn_below = warn_below
        self.latest_rms: float | None = None  # of the last evaluation, all layers pooled, radians
        self._low_evaluations = 0
        self._has_warned = False
        self._training: dict[str, AngleStatistics] = {}
        self._evaluation: dict[str, AngleStatistics] = {}
        self._experts: dict[str, tuple[str, ...]] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Ask the module for the gates."""
        pl_module.request_gates(self.wants_gates)

    def wants_gates(self, stage: str, step: int) -> bool:
        """Every evaluation batch, and every ``every_n_steps``-th optimiser step from the first on."""
        return stage != "train" or step % self.every_n_steps == 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Drop the rows of ``angles.csv`` that lie after the step training goes on from."""
        path = Path(trainer.default_root_dir) / ANGLES_FILE
        if trainer.is_global_zero and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            last = trainer.global_step - may_validate_again(trainer)
            kept = [line for line in lines[1:] if line.endswith("\n") and _step_of(line) <= last]
            write_text(path, "".join(lines[:1] + kept)) if kept else path.unlink()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Pool the micro-batches of a step; log when it was taken."""
        if self.wants_gates("train", finished_steps_before(trainer, pl_module)):
            self._pool(self._training, outputs["gates"])
            if pl_module.completed_step is not None:
                log_to_loggers(trainer, self._layer_values(self._over_ranks(trainer, self._training)))
                self._training.clear()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Pool the batch."""
        self._pool(self._evaluation, outputs["gates"])

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Pool the batch."""
        self._pool(self._evaluation, outputs["gates"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write and log the angles of this validation."""
        self._finish_evaluation(trainer, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the angles of this test."""
        self._finish_evaluation(trainer, "test")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Warn if the fit ends with an idle rotation."""
        if self._low_evaluations:
            self._warn(trainer.global_step)

    def _pool(self, pool: dict[str, AngleStatistics], gates: dict[str, GateOutput] | None) -> None:
        for path, output in (gates or {}).items():
            if output.angle_stats is not None:
                pool[path] = pool[path] + output.angle_stats if path in pool else output.angle_stats
                self._experts[path] = output.experts

    def _over_ranks(self, trainer: Trainer, pool: dict[str, AngleStatistics]) -> dict[str, AngleStatistics]:
        """Add up the sums of all ranks on the CPU; a rank may have seen other layers, or none."""
        mine = {path: (self._experts[path], _on_cpu(statistics)) for path, statistics in pool.items()}
        total: dict[str, AngleStatistics] = {}
        for found in gathered(mine, trainer.world_size):
            for path, (experts, statistics) in found.items():
                total[path] = total[path] + statistics if path in total else statistics
                self._experts[path] = experts
        return total

    def _layer_values(self, pool: dict[str, AngleStatistics]) -> dict[str, float]:
        names = ("angle_rms", "angle_mean_abs", "beyond_quarter_pi", "cosine_before", "cosine_after")
        values: dict[str, float] = {}
        for path, statistics in pool.items():
            summary = summarize_angles(statistics)
            values |= {f"gate/{path}/{name}": getattr(summary, name) for name in names}
        return {name: value for name, value in values.items() if value == value}

    def _finish_evaluation(self, trainer: Trainer, stage: str) -> None:
        pool, self._evaluation = self._over_ranks(trainer, self._evaluation), {}
        if not pool or trainer.sanity_checking:
            return
        square_sum = sum(float(statistics.square_sum.sum()) for statistics in pool.values())
        angles = sum(float(statistics.angle_count.sum()) for statistics in pool.values())
        self.latest_rms = _ratio(square_sum, angles) ** 0.5
        log_to_loggers(trainer, {f"{stage}/angle_rms": self.latest_rms})
        if trainer.state.fn != "fit":
            return
        if trainer.is_global_zero:
            self._append(Path(trainer.default_root_dir) / ANGLES_FILE, trainer.global_step, pool)
        self._low_evaluations = self._low_evaluations + 1 if self.latest_rms < self.warn_below else 0
        if self._low_evaluations == 2:
            self._warn(trainer.global_step)

    def _append(self, path: Path, step: int, pool: dict[str, AngleStatistics]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            writer.writerow(["step", "layer", "expert", *AngleSummary.__dataclass_fields__])
        for layer, statistics in pool.items():
            for expert, summary in zip(self._experts[layer], summarize_experts(statistics), strict=True):
                writer.writerow([step, layer, expert, *astuple(summary)])
        with path.open("a") as file:
            file.write(text.getvalue())

    def _warn(self, step: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        rank_zero_warn(
            f"The rotation hardly turns anything: RMS angle {self.latest_rms:.4f} rad after {step} steps (below "
            f"{self.warn_below} rad), so the gate behaves like StretchGate. With RadarGate and RotationGate set "
            "angle_norm: rms, which makes angles independent of the size of the experts' outputs; if it is set "
            "already, raise the rotation's learning rate (model.lr_multipliers: {rotation: 5}) or train longer"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {
            "low_evaluations": self._low_evaluations,
            "has_warned": self._has_warned,
            "latest_rms": self.latest_rms,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self._low_evaluations = state_dict["low_evaluations"]
        self._has_warned = state_dict["has_warned"]
        self.latest_rms = state_dict["latest_rms"]


def _on_cpu(statistics: AngleStatistics) -> AngleStatistics:
    moved: dict[str, Any] = {name: v.cpu() for name, v in vars(statistics).items() if isinstance(v, Tensor)}
    return replace(statistics, **moved)


def _rows(sums: Tensor) -> list[float]:
    found: list[float] = sums.tolist() if sums.dim() == 1 else [float(row.sum()) for row in sums]
    return found


def _summary(
    tokens: float,
    angles: float,
    mean: float,
    absolute: float,
    square: float,
    beyond: float,
    pairs: float,
    before: float,
    after: float,
) -> AngleSummary:
    return AngleSummary(
        tokens=tokens,
        angle_mean=_ratio(mean, angles),
        angle_mean_abs=_ratio(absolute, angles),
        angle_rms=_ratio(square, angles) ** 0.5,
        beyond_quarter_pi=_ratio(beyond, angles),
        cosine_before=_ratio(before, pairs),
        cosine_after=_ratio(after, pairs),
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _step_of(line: str) -> int:
    return int(line.partition(",")[0])
