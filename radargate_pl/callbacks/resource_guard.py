"""Memory, disk and records: what runs short is said in time, with what can be done about it."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from radargate_pl.disk_space import Disk, format_bytes
from radargate_pl.execution import Execution
from radargate_pl.memory_estimate import free_memory, step_memory
from radargate_pl.provenance import peak_memory_bytes

# What the allocators of CUDA and of the CPU write into a plain RuntimeError.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class ResourceGuard(Callback):
    """Says what memory a fit needs and what to do when it runs out, warns before a disk is full, counts bad records.

    * At the start of a fit, where the data say how long their examples are: what the largest batch needs beside the
      weights, part by part, and what is free; with the levers if it is more than that.
    * Out of memory in a fit: shapes of the last batch, peak memory, and the levers in order; the error itself goes on.
    * Free space of the run folder and of the temporary folder, at the start of a fit and every ``every_n_steps``.
      A running fit is only warned, once for each disk: a checkpoint that does not fit leaves the old ones whole.
    * Records that were left out under ``on_bad_record: skip``, per task, at the start of a fit.

    Args:
        warn_below_gb: free space in 10^9 bytes below which a disk is worth a warning; 0 for never.
        stop_below_mb: free space in 10^6 bytes below which a fit does not start; 0 for never.
        every_n_steps: optimiser steps between two looks at the disks.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, warn_below_gb: float = 5.0, stop_below_mb: float = 200.0, every_n_steps: int = 100) -> None:
        if warn_below_gb < 0 or stop_below_mb < 0 or every_n_steps < 1:
            raise ValueError(
                "Expected warn_below_gb and stop_below_mb to be at least 0 and every_n_steps at least 1, but got "
                f"{warn_below_gb}, {stop_below_mb} and {every_n_steps}; 0 switches a limit off"
            )
        self.warn_below_gb, self.stop_below_mb, self.every_n_steps = warn_below_gb, stop_below_mb, every_n_steps
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._warned: set[int] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count the records that were left out; look at the disks.

        Raises:
            ValueError: on all ranks, if a disk of one of them has less than ``stop_below_mb``.
        """
        skipped = skipped_records(getattr(trainer, "datamodule", None))
        if skipped:
            counts = ", ".join(f"{task} {count}" for task, count in skipped.items())
            rank_zero_info(f"records left out (on_bad_record: skip): {sum(skipped.values())}: {counts}")
        full = [place for place in disks(trainer) if place.free < self.stop_below_mb * 1e6]
        # Otherwise the others would wait for the one that stops.
        if trainer.strategy.reduce_boolean_decision(bool(full), all=False):
            raise ValueError(
                f"Expected at least {self.stop_below_mb:g} MB free on every disk that a fit writes to, but "
                f"{' and '.join(map(str, full)) or 'a disk of another process has less'}. Free some space; or choose "
                "another trainer.default_root_dir or TMPDIR; or lower resource_guard.stop_below_mb."
            )
        self._warn(trainer)
        for line in memory_report(trainer, pl_module):
            rank_zero_info(line)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Remember the shapes of the batch."""
        self._shapes = shapes_of(batch)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        """Remember the shapes of the batch."""
        self._shapes = shapes_of(batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the disks now and then."""
        if pl_module.completed_step is not None and trainer.global_step % self.every_n_steps == 0:
            self._warn(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Say what to do about a fit that ran out of memory."""
        if trainer.state.fn == "fit" and is_out_of_memory(exception):
            where = f" in process {trainer.global_rank}" if trainer.world_size > 1 else ""
            # Any rank may be the one, also one whose log messages are off.
            print(f"out of memory{where}\n{self._advice(trainer, pl_module)}", file=sys.stderr, flush=True)

    def _warn(self, trainer: Trainer) -> None:
        for place in disks(trainer):
            if place.free < self.warn_below_gb * 1e9 and place.device not in self._warned:
                self._warned.add(place.device)
                rank_zero_info(
                    f"warning: {place}. Checkpoints may soon not fit; those that are there stay whole. Free some "
                    "space, or keep fewer checkpoints (checkpoint.keep)."
                )

    def _advice(self, trainer: Trainer, pl_module: Any) -> str:
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in self._shapes.items()) or "none yet"
        lines = [f"last batch: {shapes}; peak memory: {format_bytes(peak_memory_bytes())}", "what helps, in order:"]
        levers = list(_levers(trainer, pl_module))
        return "\n".join([*lines, *(f"  {number}. {lever}" for number, lever in enumerate(levers, start=1))])


def memory_report(trainer: Trainer, pl_module: Any) -> list[str]:
    """What the largest batch will need beside the weights; nothing where the data do not say how long examples are.

    Args:
        trainer: of the run.
        pl_module: its module, with the network on its device.

    Returns:
        One line, and the levers below it where more is needed than is free.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not (hasattr(datamodule, "examples") and hasattr(datamodule, "batch_size")):
        return []
    rows = int(datamodule.batch_size)
    length, labelled = datamodule.examples("train").largest_batch(rows)
    needed, free = step_memory(pl_module.built_network, rows, length, labelled), free_memory(pl_module.device)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in vars(needed).items())
    known = "" if free is None else f"; {format_bytes(free)} are free"
    line = f"memory of a step of {rows} x {length} tokens: about {format_bytes(needed.total)} ({parts}){known}"
    if free is None or needed.total <= free:
        return [line]
    levers = [f"  {number}. {lever}" for number, lever in enumerate(_levers(trainer, pl_module), start=1)]
    return [line, "\n".join(["warning: this fit may run out of memory; what helps, in order:", *levers])]


def disks(trainer: Trainer) -> list[Disk]:
    """Return the file systems of the run folder and of the temporary folder, each once.

    Args:
        trainer: of the run.
    """
    found = [Disk("run folder", Path(trainer.default_root_dir)), Disk("temporary folder", Path(tempfile.gettempdir()))]
    return found[:1] if found[0].device == found[1].device else found


def skipped_records(datamodule: Any) -> dict[str, int]:
    """Return how many records of each task were left out, tasks without any not named.

    Args:
        datamodule: a `FlanMixture`, or another with ``bad_records`` or without.
    """
    if hasattr(datamodule, "skipped"):  # counts too long answers too, also when the tokens came from the cache
        counts = {task.name: datamodule.skipped(task) for task in datamodule.tasks}
    else:
        counts = dict(getattr(getattr(datamodule, "bad_records", None), "skipped", {}))
    return {task: count for task, count in counts.items() if count}


def shapes_of(batch: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a batch by name.

    Args:
        batch: what the data loader made.
    """
    items = batch.items() if isinstance(batch, Mapping) else ()
    return {name: tuple(value.shape) for name, value in items if isinstance(value, Tensor)}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or the one it came from, says that memory ran out.

    Args:
        error: any exception.
    """
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _levers(trainer: Trainer, pl_module: Any) -> Iterator[str]:
    datamodule: Any = getattr(trainer, "datamodule", None)
    size, accumulated = getattr(datamodule, "batch_size", None), trainer.accumulate_grad_batches
    if size is None or size > 1:
        values = "" if size is None else f": {size // 2} (now {size})"
        more = "more" if size is None else f"{2 * accumulated} (now {accumulated})"
        yield (
            f"data.init_args.batch_size{values} with trainer.accumulate_grad_batches: {more}: the same gradients, in "
            "smaller parts"
        )
    network = getattr(pl_module, "network", None)
    if not getattr(network, "recomputes_blocks", False):
        name = "model.network.init_args.gradient_checkpointing"
        yield f"{name}: true: activations are computed a second time instead of kept"
    if getattr(getattr(network, "applied_execution", None), "execution", Execution()).mixture == "plain":
        yield "model.network.init_args.execution.mixture: auto: keeps less of each layer's mixture"
    length = getattr(datamodule, "max_length", None)
    now = "" if length is None else f" (now {length})"
    yield f"a shorter data.init_args.max_length{now}: longer sources lose their middle"
    if getattr(network, "quantization", "none") != "4bit":
        yield "model.network.init_args.quantization: 4bit: the backbone's weights in 4 bits (bitsandbytes)"
