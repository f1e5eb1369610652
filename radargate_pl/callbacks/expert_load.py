"""Which experts a gate uses: share of the weight per expert, and how undecided the gate is."""

from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from radargate_pl.processes import gathered
from radargate_pl.records import GateOutput
from radargate_pl.step_logging import finished_steps_before, log_to_loggers

MOST_SHARES = 10_000  # of single layers in one entry of the loggers


class ExpertLoadMonitor(Callback):
    """Logs, per layer, each expert's share of the routed weight and the mean entropy of the weights.

    Every ``every_n_steps`` optimiser steps the loggers get ``gate/<layer>/load/<expert>`` (sums to 1 over the experts),
    ``gate/<layer>/entropy`` in nats (0 = one expert, log E = all alike), and their plain means over the layers,
    ``gate/load/<expert>`` and ``gate/entropy``. Each validation logs the means as ``val/load/<expert>`` and
    ``val/gate_entropy``. Where layers times experts are more than `MOST_SHARES`, the shares of each layer are left out;
    their means and the entropies stay.

    Args:
        every_n_steps: optimiser steps between two entries in the loggers.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected every_n_steps to be at least 1, but got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._training = _Loads()
        self._evaluation = _Loads()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Ask the module for the gates."""
        pl_module.request_gates(self.wants_gates)

    def wants_gates(self, stage: str, step: int) -> bool:
        """Every validation batch, and every ``every_n_steps``-th optimiser step from the first on."""
        return stage == "val" or (stage == "train" and step % self.every_n_steps == 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the micro-batches of a step; log when it was taken."""
        if self.wants_gates("train", finished_steps_before(trainer, pl_module)):
            self._training.add(outputs["gates"] or {})
            if pl_module.completed_step is not None:
                log_to_loggers(trainer, self._training.finish(trainer))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Take in the batch."""
        if not trainer.sanity_checking:
            self._evaluation.add(outputs["gates"] or {})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the means over the layers."""
        values = self._evaluation.finish(trainer)
        means = {name: value for name, value in values.items() if name.startswith("gate/load/")}
        named = {name.replace("gate/load/", "val/load/"): value for name, value in means.items()}
        if "gate/entropy" in values:
            named["val/gate_entropy"] = values["gate/entropy"]
        log_to_loggers(trainer, named)


class _Loads:
    """Means over batches, weighted by their real tokens, kept on the device until they are logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # layer -> (E + 2,): load * tokens per expert, entropy * tokens, tokens
        self._experts: dict[str, tuple[str, ...]] = {}

    def add(self, gates: dict[str, GateOutput]) -> None:
        for path, output in gates.items():
            tokens = output.weights[..., 0].numel() if output.tokens is None else output.tokens.sum()
            values = (
                torch.cat([output.load(), output.entropy().reshape(1), output.weights.new_ones(1)]).double() * tokens
            )
            self._sums[path] = self._sums[path] + values if path in self._sums else values
            self._experts[path] = output.experts

    def finish(self, trainer: Trainer) -> dict[str, float]:
        """Add up all ranks, which may have seen different layers or, where experts are divided, nothing at all."""
        mine = {path: (self._experts[path], sums.cpu()) for path, sums in self._sums.items()}
        totals: dict[str, Tensor] = {}
        for found in gathered(mine, trainer.world_size):
            for path, (experts, sums) in found.items():
                totals[path] = totals[path] + sums if path in totals else sums
                self._experts[path] = experts
        self._sums.clear()
        return self._values(totals) if totals else {}

    def _values(self, totals: dict[str, Tensor]) -> dict[str, float]:
        values: dict[str, float] = {}
        shares: defaultdict[str, list[float]] = defaultdict(list)  # expert -> one number a layer
        entropies = []
        has_few = sum(len(self._experts[path]) for path in totals) <= MOST_SHARES
        for path, total in totals.items():
            *loads, entropy, _ = (total / total[-1].clamp_min(1)).tolist()
            named = list(zip(self._experts[path], loads, strict=True))
            for name, load in named:
                shares[name].append(load)
            values |= {f"gate/{path}/load/{name}": load for name, load in named if has_few}
            values[f"gate/{path}/entropy"] = entropy
            entropies.append(entropy)
        means = {f"gate/load/{name}": sum(of_layers) / len(of_layers) for name, of_layers in shares.items()}
        return values | {"gate/entropy": sum(entropies) / len(entropies)} | means
