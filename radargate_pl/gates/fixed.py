"""Gates without parameters: uniform, fixed weights, and each example's own expert (layer 1)."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Gate, Routing, Site
from radargate_pl.ops import gate_dtype


class ConstantGate(Gate):
    """A gate that gives every token the same weights: what it mixes is one LoRA (see `fixed_compositions`)."""

    @abstractmethod
    def constants(self, bank: ExpertBank) -> list[float]:
        """Return the weight of each expert present at the layer, E numbers of any sign."""

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Return the same weights for every token; see `Gate.forward`."""
        row = torch.tensor(self.constants(bank), dtype=gate_dtype(latents.dtype), device=latents.device)
        return Routing(row.expand(*latents.shape[:-2], -1), None, None)


class UniformGate(ConstantGate):
    """The plain average of all experts present at the layer: ``g_i = 1 / E``."""

    def constants(self, bank: ExpertBank) -> list[float]:
        """Return 1 / E for every expert."""
        return [1 / bank.num_experts] * bank.num_experts


class FixedGate(ConstantGate):
    """The same weights for every token: ``g_i = weights[i]``, not normalised, of any sign.

    Args:
        site: the layer (given by the network, never in a config).
        weights: expert name to weight; experts not named get 0 and are not evaluated.

    Attributes:
        coefficients: expert name to the weight it gets.

    Raises:
        ValueError: when ``weights`` is empty, not finite, or names an expert that is not in the library.
    """

    argument = "weights"  # what names the experts, for messages

    def __init__(self, site: Site, weights: dict[str, float]) -> None:
        super().__init__(site)
        if not weights:
            raise ValueError("Expected weights to name at least one expert, but got {}.")
        if not all(map(math.isfinite, weights.values())):
            raise ValueError(f"Expected weights to be finite, but got {weights}.")
        self.weights = dict(weights)
        self.coefficients = self.weights

    def bind(self, bank: ExpertBank) -> None:
        """Refuse names that are not in the library."""
        unknown = sorted(set(self.coefficients) - set(bank.library))
        if unknown:
            raise ValueError(f"Expected {self.argument} to name experts of {list(bank.library)}, but got {unknown}.")

    def active(self, bank: ExpertBank, context: Context) -> tuple[int, ...]:
        """Return the experts with a weight other than 0."""
        return tuple(i for i, weight in enumerate(self.constants(bank)) if weight != 0.0)

    def constants(self, bank: ExpertBank) -> list[float]:
        """Return the given weights, 0 for experts not named."""
        return [self.coefficients.get(name, 0.0) for name in bank.names]


class TaskGate(Gate):
    """Each example's own expert with weight 1, by ``context.expert``; an example without one gets no update.

    The upper reference "right expert given", and the gate under which a library of experts trains: every example
    touches only its own expert.

    Raises:
        ValueError: in forward, when the batch carries no expert ids, or their number does not fit its rows.
    """

    def active(self, bank: ExpertBank, context: Context) -> tuple[int, ...]:
        """Return the experts of this batch's examples that are present here."""
        wanted = self._expert_ids(context)[1]
        return tuple(local for local, library_id in enumerate(bank.ids) if library_id in wanted)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Look up each example's expert; see `Gate.forward`."""
        expert, _ = self._expert_ids(context)
        local = torch.full_like(expert, -1)
        for index, library_id in enumerate(bank.ids):
            local = torch.where(expert == library_id, index, local)
        repeats, rest = x.shape[0] // local.shape[0], x.shape[0] % local.shape[0]  # divmod of sizes does not compile
        if rest or not repeats:
            raise ValueError(
                f"TaskGate at {self.site.path}: expected the rows of the input to be a multiple of the "
                f"{local.shape[0]} expert ids (beams and choices repeat rows side by side), but got {x.shape[0]} rows."
            )
        rows = local.repeat_interleave(repeats).view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1)
        return Routing((rows >= 0).to(gate_dtype(latents.dtype)), rows.clamp_min(0), None)

    def _expert_ids(self, context: Context) -> tuple[Tensor, tuple[int, ...]]:
        if context.expert is None or context.active is None:
            raise ValueError(
                f"TaskGate at {self.site.path}: expected the batch to carry the expert id of each example, but got "
                "none. Pass `expert=` to the network (its backbone by itself: call that inside `with "
                "network.context.batch(expert=ids):`), or choose a gate that does not need it."
            )
        return context.expert, context.active
