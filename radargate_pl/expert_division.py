"""Experts that train under TaskGate, divided among processes that exchange no gradients (layer 5)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ExpertDivision:
    """Which process trains which expert, and how the others get to know it.

    TaskGate sends an example through its own expert only, so a process that sees all examples of an expert, and no
    other does, computes that expert's gradient by itself. Every process takes, of each global batch, the examples of
    its own experts: steps are those of one process with the whole batch.

    Args:
        experts: id of each expert to its parameters.
        rank: number of this process.
        world_size: number of processes; at most the number of experts.

    Raises:
        ValueError: when there are fewer experts than processes.
    """

    def __init__(self, experts: Mapping[int, Sequence[Tensor]], rank: int, world_size: int) -> None:
        if len(experts) < world_size:
            raise ValueError(
                f"Expected at least one expert for each of {world_size} processes, but there are {len(experts)} to "
                "train. Use fewer devices."
            )
        self.rank = rank
        self.world_size = world_size
        self._experts = {expert: list(parameters) for expert, parameters in experts.items()}

    def owner(self, expert: int) -> int:
        """The process that trains an expert; the first one for examples without any (-1)."""
        return expert % self.world_size if expert in self._experts else 0

    def gather(self, optimizer: Optimizer | None) -> None:
        """Give every process the present parameters and moments of all experts; all must call this.

        Args:
            optimizer: holds the moments; ``None`` for parameters only.
        """
        for source in range(self.world_size):
            payload = [self._owned(source, optimizer) if source == self.rank else None]
            torch.distributed.broadcast_object_list(payload, src=source)
            if source != self.rank:
                self._take(source, payload[0], optimizer)

    def _parameters(self, rank: int) -> list[Tensor]:
        return [p for expert, parameters in self._experts.items() if self.owner(expert) == rank for p in parameters]

    def _owned(self, rank: int, optimizer: Optimizer | None) -> list[tuple[Tensor, dict[str, Any]]]:
        moments = optimizer.state if optimizer is not None else {}
        return [
            (parameter.detach().cpu(), {name: _to(value, "cpu") for name, value in moments.get(parameter, {}).items()})
            for parameter in self._parameters(rank)
        ]

    @torch.no_grad()
    def _take(self, rank: int, payload: Any, optimizer: Optimizer | None) -> None:
        for parameter, (value, moments) in zip(self._parameters(rank), payload, strict=True):
            parameter.copy_(value)
            if optimizer is not None and moments:
                # torch keeps the step count of most optimisers on the CPU, everything else beside its parameter
                optimizer.state[parameter] = {
                    name: _to(moment, "cpu" if name == "step" else parameter.device) for name, moment in moments.items()
                }


def _to(value: Any, device: Any) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
