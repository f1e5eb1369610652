"""Stops a fit before a NaN or an infinity reaches the weights, and writes down where it came from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from radargate_pl.atomic_files import write_json
from radargate_pl.callbacks.run_checkpoint import CHECKPOINTS
from radargate_pl.search import NevergradSearch

NON_FINITE_FILE = "non_finite.json"
FORMAT_VERSION = 1


@dataclass
class MicroBatch:
    """One micro-batch of the step under way.

    Attributes:
        ids: of its examples.
        tasks: index of each example's task, (examples,) int64.
        weighted_loss: what its backward pass started from, auxiliary losses included, times its number of examples,
            scalar; ``None`` until the backward pass.
    """

    ids: list[str]
    tasks: Tensor
    weighted_loss: Tensor | None = None


class NonFiniteGuard(Callback):
    """Ends a fit whose loss or gradients are NaN or infinite before the optimiser has used them, on all ranks together.

    Step, losses, learning rates, the parameters and the examples concerned are written to ``non_finite.json`` in the
    run folder; with several processes each writes its own, ``non_finite.rank0.json`` and so on.

    It costs one reduction of three numbers and one read from the device per step. Under ``16-mixed`` the gradient
    scaler leaves out steps with infinite gradients by itself, so that only the loss counts. A search (NevergradSearch)
    has no gradients, and its candidates may be infinite: it is left alone.
    """

    def __init__(self) -> None:
        self._batches: list[MicroBatch] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget a step that was begun and never finished."""
        self._batches = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Remember the examples of this micro-batch."""
        self._batches.append(MicroBatch(list(batch.get("id", ())), batch["task"]))

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Remember the loss of this micro-batch, without waiting for the device."""
        # The module divides by the usual batch size and multiplies by the number of examples, so that micro-batches of
        # different sizes add up; Lightning divides by their number, and a scaler multiplies.
        full_batch = int(getattr(trainer.datamodule, "batch_size", 1))  # type: ignore[attr-defined]
        factor = full_batch * trainer.accumulate_grad_batches
        scaler = gradient_scaler(trainer)
        self._batches[-1].weighted_loss = loss.detach().double() * (factor / (scaler.get_scale() if scaler else 1.0))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Refuse the update if anything in it is not finite.

        Raises:
            ValueError: which step, where the details are, where the last checkpoint is, and what can be done.
        """
        batches, self._batches = self._batches, []
        if isinstance(optimizer, NevergradSearch):
            return
        gradients = [] if gradient_scaler(trainer) else [p.grad for g in optimizer.param_groups for p in g["params"]]
        sums = trainer.strategy.reduce(_sums(batches, gradients, pl_module.device), reduce_op="sum")
        assert isinstance(sums, Tensor)
        if not math.isfinite(float(sums.sum())):
            _stop(trainer, pl_module, optimizer, batches, float(sums[0] / sums[1]))


def gradient_scaler(trainer: Trainer) -> Any:
    """The gradient scaler of ``16-mixed``, ``None`` under every other precision.

    Args:
        trainer: a trainer with a strategy.
    """
    return getattr(trainer.strategy.precision_plugin, "scaler", None)


def _sums(batches: list[MicroBatch], gradients: list[Tensor | None], device: torch.device) -> Tensor:
    """Weighted losses, examples, and absolute gradients: (3,) float64, finite exactly if everything in them is."""
    losses = [batch.weighted_loss for batch in batches if batch.weighted_loss is not None]
    there = [gradient for gradient in gradients if gradient is not None]
    # In float64 the sum of any number of finite float32 gradients is finite.
    norms = torch._foreach_norm(there, 1, dtype=torch.float64) if there else []
    zero = torch.zeros((), dtype=torch.float64, device=device)
    examples = zero + sum(len(batch.tasks) for batch in batches)
    return torch.stack([sum(losses, zero), examples, sum(norms, zero)])


def _stop(trainer: Trainer, pl_module: Any, optimizer: Optimizer, batches: list[MicroBatch], loss: float) -> None:
    trained = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    bad_gradients = {} if gradient_scaler(trainer) else _bad(gradients)
    report = {
        "format_version": FORMAT_VERSION,
        "step": trainer.global_step + 1,
        "epoch": trainer.current_epoch,
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "loss": _shown(loss),
        "learning_rates": [float(group["lr"]) for group in optimizer.param_groups],
        "bad_gradients": bad_gradients,
        "bad_parameters": _bad({name: parameter.detach() for name, parameter in trained.items()}),
        "micro_batches": [_described(batch, pl_module.task_names) for batch in batches],
    }
    name = NON_FINITE_FILE if trainer.world_size == 1 else f"non_finite.rank{trainer.global_rank}.json"
    path = Path(trainer.default_root_dir) / name
    try:
        write_json(path, report)
        details = f"losses, parameters and the ids of all examples of the step are in {path}"
    except OSError as error:  # a full disk must not hide why the run stops
        details = f"the details could not be written ({error})"
    raise ValueError(_message(trainer, report, details))


def _message(trainer: Trainer, report: Mapping[str, Any], details: str) -> str:
    bad = list(report["bad_gradients"])
    parts = [f"a loss of {report['loss']}"] if isinstance(report["loss"], str) else []
    parts += [f"NaN or infinity in the gradients of {len(bad)} parameters (first: {bad[0]})"] if bad else []
    parts += ["parameters that are NaN or infinite already"] if report["bad_parameters"] else []
    rates = ", ".join(f"{rate:g}" for rate in report["learning_rates"])
    return (
        f"Expected a finite loss and finite gradients, but got {' and '.join(parts) or 'neither in another process'} "
        f"at optimiser step {report['step']}. The update was not made; {details}. {_checkpoint(trainer)} Ways on, in "
        f"order: look at those examples; a lower model.optimizer.lr (now {rates}); trainer.gradient_clip_val: 1.0 (now "
        f"{trainer.gradient_clip_val}); trainer.precision: 32-true (now {trainer.precision}) with "
        "model.network.init_args.dtype: float32."
    )


def _checkpoint(trainer: Trainer) -> str:
    path = Path(trainer.default_root_dir) / CHECKPOINTS / "last.ckpt"
    if path.exists():
        return f"The last checkpoint, {path}, is intact: --ckpt_path auto goes on from there."
    return "No checkpoint had been written yet."


def _bad(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Name -> how many entries are NaN, are infinite, and are there; only tensors that have such entries."""
    return {
        name: {"nan": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum()), "entries": tensor.numel()}
        for name, tensor in tensors.items()
        if not bool(tensor.isfinite().all())
    }


def _described(batch: MicroBatch, task_names: tuple[str, ...]) -> dict[str, Any]:
    tasks = [task_names[index] for index in batch.tasks.tolist()]
    ids = batch.ids or [""] * len(tasks)  # a stranger's data module may have none
    loss = math.nan if batch.weighted_loss is None else float(batch.weighted_loss) / max(len(tasks), 1)
    examples = [{"id": name, "task": task} for name, task in zip(ids, tasks, strict=True)]
    return {"loss": _shown(loss), "examples": examples}


def _shown(value: float) -> float | str:
    """A number as it is; NaN and infinity, which JSON lacks, as "nan", "inf" and "-inf"."""
    return value if math.isfinite(value) else str(value)
