"""What becomes of the gradients of one optimiser step, between the last backward pass and the update (layer 5)."""

from torch import Tensor
from torch.optim import Optimizer

from radargate_pl.expert_gradients import AccumulatedExamples, clip_groups, expert_parameters, mean_gradients
from radargate_pl.networks import GatedNetwork
from radargate_pl.steps import StepRequests


class StepGradients:
    """Makes each gradient the mean over exactly its examples, then clips: each expert by itself, all else together.

    Args:
        network: what trains.
        full_batch: any number that is the same on all ranks: it cancels. The usual batch size makes the loss of a
            full micro-batch its plain mean.

    Attributes:
        experts_alone: id of each expert that trains under TaskGate to its parameters.
    """

    def __init__(self, network: GatedNetwork, full_batch: int) -> None:
        self.full_batch = full_batch
        self.experts_alone = expert_parameters(network, network.experts)
        self._accumulated = AccumulatedExamples(len(network.experts))

    def add(self, loss: Tensor, num_examples: int, expert: Tensor) -> float:
        """Count one micro-batch; see `AccumulatedExamples.add`.

        Returns:
            The factor of its loss, which makes accumulation exact.
        """
        self._accumulated.add(loss, num_examples, expert)
        return num_examples / self.full_batch

    def finish(
        self,
        optimizer: Optimizer,
        requests: StepRequests,
        *,
        divided_by: int,
        clip_value: int | float | None,
        clip_algorithm: str | None,
    ) -> tuple[Tensor, StepRequests]:
        """Turn what was accumulated into the gradients of the update, in place.

        Args:
            optimizer: about to step.
            requests: what this rank asks for.
            divided_by: what the gradients were divided by already: micro-batches (Lightning) times ranks (DDP).
            clip_value: the trainer's limit; nothing is clipped without one.
            clip_algorithm: ``norm`` (default) or ``value``.

        Returns:
            Mean loss over the examples of all micro-batches and ranks, and what any rank asked for.
        """
        loss, examples, per_expert, agreed = self._accumulated.finish(requests)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        alone = {id(parameter) for parameters in self.experts_alone.values() for parameter in parameters}
        together = [parameter for parameter in trained if id(parameter) not in alone]
        weight = self.full_batch * divided_by
        mean_gradients(together, weight / examples)
        for index, parameters in self.experts_alone.items():
            mean_gradients(parameters, weight / per_expert[index].clamp_min(1))
        if clip_value:
            clip_groups([*self.experts_alone.values(), together], clip_value, clip_algorithm or "norm")
        return loss, agreed
