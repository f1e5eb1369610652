"""``summary.json``: what a command did, with what, and what came of it; also when it failed."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from radargate_pl.atomic_files import write_json
from radargate_pl.benchmark_results import summary_of
from radargate_pl.callbacks.benchmark_writer import BenchmarkWriter
from radargate_pl.callbacks.rotation_angles import RotationAngleMonitor
from radargate_pl.metrics import mean_over_tasks
from radargate_pl.preemption import EXIT_CODE, Preempted
from radargate_pl.provenance import git_state, global_seed, installed_versions, peak_memory_bytes
from radargate_pl.quantization import number_of_weights
from radargate_pl.redaction import redact_arguments

SUMMARY_FILE = "summary.json"
FORMAT_VERSION = 1
NO_SCORES: dict[str, Any] = {"tasks": {}, "mean": None, "rotation": {"rms_angle_rad": None}}


class RunSummary(Callback):
    """Writes ``summary.json`` into the run folder at the end of every command, whole or not at all, on rank 0.

    When another command went well in the folder before (a fit before a test), its summary is kept under
    ``earlier.<command>``.
    """

    def __init__(self) -> None:
        self._stopwatch = Stopwatch()
        self._tokens: Tensor | int = 0
        self._first_loss: Tensor | float | None = None
        self._last_loss: Tensor | float | None = None
        self._scores: dict[str, Any] = {}  # of the latest validation of a fit

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Training begins."""
        self._stopwatch.enter("train")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count tokens and keep the losses, without waiting for the device."""
        self._tokens = self._tokens + batch["attention_mask"].sum()
        if pl_module.completed_step is not None:
            self._last_loss = pl_module.completed_step.loss
            self._first_loss = self._last_loss if self._first_loss is None else self._first_loss

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Training is over; count the tokens of all ranks."""
        if isinstance(self._tokens, Tensor) and trainer.world_size > 1:
            self._tokens = trainer.strategy.reduce(self._tokens, reduce_op="sum")
        self._stopwatch.enter("finish")

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Time validations apart from training."""
        self._stopwatch.enter("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Go on with what was interrupted."""
        is_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._stopwatch.enter("train" if is_fit else "finish")
        if is_fit:
            self._scores = _scores(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The test begins."""
        self._stopwatch.enter("test")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The test is over."""
        self._stopwatch.enter("finish")

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Generation begins."""
        self._stopwatch.enter("predict")

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Generation is over."""
        self._stopwatch.enter("finish")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write the summary of a command that went well."""
        self._write(trainer, pl_module, "ok", None)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the summary of a command that did not."""
        is_preempted = isinstance(exception, Preempted) and exception.code == EXIT_CODE
        interrupted = isinstance(exception, (KeyboardInterrupt, SIGTERMException, Preempted))  # by a person
        status = "preempted" if is_preempted else "interrupted" if interrupted else "failed"
        error = f"{type(exception).__name__}: {exception}".rstrip(": ")
        self._write(trainer, pl_module, status, error)

    def _write(self, trainer: Trainer, pl_module: Any, status: str, error: str | None) -> None:
        if not trainer.is_global_zero:
            return
        self._stopwatch.enter("finish")
        command = trainer.state.fn.value if trainer.state.fn else "unknown"
        summary = {
            "format_version": FORMAT_VERSION,
            "command": command,
            "status": status,
            "error": error,
            **_network_facts(pl_module),
            "steps": max(trainer.global_step, getattr(pl_module, "restored_step", 0)),
            **self._measurements(_compile_seconds(pl_module), is_fit=command == "fit"),
            **(_scores(trainer, pl_module) or (self._scores if command == "fit" else {}) or NO_SCORES),
            **_settings(trainer),
        }
        write_summary(Path(trainer.default_root_dir), summary)
        self._stopwatch = Stopwatch()
        self._tokens = 0

    def _measurements(self, compile_seconds: float, is_fit: bool) -> dict[str, Any]:
        seconds = self._stopwatch.seconds
        if is_fit and compile_seconds:  # they passed inside the first training steps
            seconds["compile"] = round(compile_seconds, 3)
            seconds["train"] = round(max(0.0, seconds["train"] - compile_seconds), 3)
        tokens, training = int(self._tokens), seconds.get("train", 0.0)
        first, last = (self._first_loss, self._last_loss) if is_fit else (None, None)
        return {
            "seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
            "tokens_per_second": tokens / training if tokens and training else None,
            "peak_memory_bytes": peak_memory_bytes(),
            "loss": {"first": _number(first), "last": _number(last)},
        }

    def state_dict(self) -> dict[str, Any]:
        """Losses and latest scores, which a resumed fit reports too, also one that has no step left to take."""
        losses = {"first_loss": _number(self._first_loss), "last_loss": _number(self._last_loss)}
        return {**losses, "scores": self._scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self._first_loss, self._last_loss = state_dict["first_loss"], state_dict["last_loss"]
        self._scores = state_dict["scores"]


class Stopwatch:
    """Seconds per phase; one phase follows the other without a gap, the first is ``setup``."""

    def __init__(self) -> None:
        self._phase, self._begun = "setup", time.perf_counter()
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the present phase and begin another.

        Args:
            phase: its name.
        """
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._begun
        self._phase, self._begun = phase, now

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each finished phase."""
        return {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json``; what went well before in this folder moves to ``earlier``.

    A fit that went well outdates everything before it; a command that failed outdates nothing.

    Args:
        folder: the run folder.
        summary: must hold ``command`` and ``status``.
    """
    path = folder / SUMMARY_FILE
    earlier = _summaries_so_far(path)
    if summary["status"] == "ok":
        earlier = {} if summary["command"] == "fit" else earlier
        earlier.pop(summary["command"], None)
    write_json(path, {**summary, "earlier": earlier})


def _summaries_so_far(path: Path) -> dict[str, Any]:
    """Command -> its latest summary that went well."""
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        earlier: dict[str, Any] = before.pop("earlier")
        return {**earlier, before["command"]: before} if before["status"] == "ok" else earlier
    except (ValueError, KeyError, AttributeError):  # not a summary of ours: nothing that could be kept
        return {}


def _network_facts(pl_module: Any) -> dict[str, Any]:
    network = getattr(pl_module, "network", None)
    if network is None:  # it failed before it was built
        return {"gate": None, "combine": None, "execution": None, "fingerprints": None, "parameters": None}
    return {
        "gate": network.describe(),
        "combine": network.combine,
        "execution": network.applied_execution.line(),
        "fingerprints": network.fingerprints,
        "parameters": count_parameters(network),
    }


def _compile_seconds(pl_module: Any) -> float:
    applied = getattr(getattr(pl_module, "network", None), "applied_execution", None)
    return 0.0 if applied is None or applied.compiled is None else float(applied.compiled.seconds)


def count_parameters(network: nn.Module) -> dict[str, int]:
    """Numbers of trainable and frozen parameters; a shared one counts once.

    Args:
        network: any module.
    """
    parameters = list(network.parameters())
    trainable = sum(number_of_weights(parameter) for parameter in parameters if parameter.requires_grad)
    return {"trainable": trainable, "frozen": sum(map(number_of_weights, parameters)) - trainable}


def _scores(trainer: Trainer, pl_module: Any) -> dict[str, Any]:
    """What the latest evaluation found; empty without one."""
    for writer in _callbacks(trainer):
        if isinstance(writer, BenchmarkWriter) and writer.results:
            return summary_of(writer.results)
    results = getattr(pl_module, "task_results", {})
    if not results:
        return {}
    monitors = [monitor for monitor in _callbacks(trainer) if isinstance(monitor, RotationAngleMonitor)]
    return {
        "tasks": {name: asdict(score) for name, score in results.items()},
        "mean": asdict(mean_over_tasks(results)),
        "rotation": {"rms_angle_rad": monitors[0].latest_rms if monitors else None},
    }


def _settings(trainer: Trainer) -> dict[str, Any]:
    return {
        "seed": global_seed(),
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "versions": installed_versions(),
        "git": git_state(Path.cwd()),
        "argv": redact_arguments(sys.argv),
    }


def _callbacks(trainer: Trainer) -> list[Callback]:
    return getattr(trainer, "callbacks", [])


def _number(value: Tensor | float | None) -> float | None:
    return None if value is None else float(value)
