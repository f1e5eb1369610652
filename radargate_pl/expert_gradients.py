"""Gradients that are a mean over exactly the right examples: over all of them, or over each expert's own (layer 5)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from radargate_pl.gates import TaskGate
from radargate_pl.moe import moe_layers
from radargate_pl.steps import StepRequests


class AccumulatedExamples:
    """Counts the examples, and sums the loss, of one optimiser step over its micro-batches and all ranks.

    Args:
        num_experts: number of experts E; expert ids lie in [-1, E), -1 = none.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._sums: Tensor | None = None
        self._asked: Tensor | None = None

    def add(self, loss: Tensor, num_examples: int, expert: Tensor) -> None:
        """Add one micro-batch.

        Args:
            loss: mean loss over its examples in nats, scalar.
            num_examples: its number of examples.
            expert: expert id of each example, (num_examples,) int64.
        """
        ids = torch.arange(self.num_experts, device=expert.device)
        per_expert = (expert.unsqueeze(-1) == ids).sum(0).double()  # bincount would wait for the device
        total = torch.full_like(loss, num_examples, dtype=torch.float64, requires_grad=False)
        sums = torch.cat([torch.stack([loss.detach().double() * num_examples, total]), per_expert])
        self._sums = sums if self._sums is None else self._sums + sums

    def finish(self, requests: StepRequests) -> tuple[Tensor, Tensor, Tensor, StepRequests]:
        """Close the step: add up the ranks and start counting afresh.

        What the ranks ask for travels with the sums. On an accelerator it is that of the step before: waiting for
        this one's would stall every step.

        Args:
            requests: of this rank.

        Returns:
            Mean loss over all examples (scalar), number of examples (scalar), examples per expert (E,); float64, on the
            batches' device. And what any rank asked for.
        """
        assert self._sums is not None, "an optimiser step without a training step"
        sums, self._sums = self._sums, None
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return sums[0] / sums[1], sums[1], sums[2:], replace(requests)
        asked = torch.tensor([requests.save, requests.stop], dtype=sums.dtype, device=sums.device)
        sums = torch.cat([sums, asked])
        torch.distributed.all_reduce(sums)
        sums, asked = sums[:-2], sums[-2:]
        known, self._asked = (asked if asked.device.type == "cpu" else self._asked), asked
        agreed = StepRequests() if known is None else StepRequests(*(count > 0 for count in known.tolist()))
        return sums[0] / sums[1], sums[1], sums[2:], agreed


def expert_parameters(network: nn.Module, experts: Sequence[str]) -> dict[int, list[Tensor]]:
    """Parameters that belong to exactly one expert, while experts train under TaskGate.

    TaskGate sends an example through one expert only, so these parameters hear of that expert's examples and of no
    others. A shared A belongs to several experts and is left out; under any other gate every expert hears of every
    example, and the answer is empty.

    Args:
        network: a network with gated layers.
        experts: names of the experts, in id order.

    Returns:
        Expert id -> its trainable parameters; experts without any are left out.
    """
    owners: dict[Tensor, set[str]] = {}
    for layer in moe_layers(network).values():
        if not isinstance(layer.gate, TaskGate):
            return {}
        for name in layer.bank.names if layer.bank.trainable else ():
            for parameter in layer.bank.expert_weights(name):  # while experts train: the parameters themselves
                owners.setdefault(parameter, set()).add(name)
    owned = {i: [p for p, names in owners.items() if names == {name}] for i, name in enumerate(experts)}
    return {i: parameters for i, parameters in owned.items() if parameters}


def mean_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place; absent gradients stay absent.

    With the loss ``1/W sum_i l_i`` of the micro-batches, ``factor = W / N`` makes the mean over the N examples that
    speak to these parameters: all of them for a gate; for an expert under TaskGate its own, which is what training it
    alone would give.

    Args:
        parameters: any parameters.
        factor: scalar.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:  # one call instead of one for each of hundreds of small tensors, as torch's own clipping does
        torch._foreach_mul_(gradients, factor.to(gradients[0]))


def clip_groups(groups: Iterable[Sequence[Tensor]], limit: float, algorithm: str) -> None:
    """Clip the gradients of each group by itself, in place.

    Args:
        groups: groups of parameters.
        limit: largest norm of a group's gradient (``norm``), or largest absolute entry (``value``).
        algorithm: ``norm`` or ``value``.
    """
    for parameters in groups:
        if algorithm == "value":
            nn.utils.clip_grad_value_(parameters, limit)
        else:
            nn.utils.clip_grad_norm_(parameters, limit)
