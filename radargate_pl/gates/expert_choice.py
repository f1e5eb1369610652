"""The gate in which experts choose tokens, not tokens experts (layer 1)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Gate, Routing
from radargate_pl.gates.scorers import InputScorer
from radargate_pl.gates.stretch import check_top_k
from radargate_pl.notices import say_once
from radargate_pl.ops import select_top_k
from radargate_pl.rotations import NoRotation, Rotation
from radargate_pl.site import Site

NOT_CAUSAL = (
    "ExpertChoiceGate selects over all tokens of a batch, later ones too, which is not causal: only training does so. "
    "Evaluation, validation and generation keep the top_k experts of each token instead."
)


class ExpertChoiceGate(Gate):
    """While training each expert takes its ``ceil(T * capacity / E)`` best of the T real tokens of the batch.

    ``S = softmax(x W_g)`` over experts; expert e takes the tokens with the largest ``S[:, e]`` (ties to the first); the
    weight is ``S`` itself. A token gets any number of experts, none too; padding is never taken. In evaluation mode
    each token keeps its ``top_k`` experts, weights ``S`` on the same scale: what other tokens are in a batch would
    otherwise change a token's result, and one that is decoded alone has nobody to compete with (INFERRED: the paper
    decodes nothing).

    Args:
        site: the layer (given by the network, never in a config).
        capacity: experts a token gets on average while training.
        top_k: experts kept per token in evaluation mode; a layer with fewer experts keeps all of them.
        rotation: what is done to kept outputs before they are summed.

    Raises:
        ValueError: for values out of range.

    Source: Expert Choice, arXiv 2202.09368, section 3 (equations recalled, not re-read).
    """

    is_ragged = True

    def __init__(
        self,
        site: Site,
        capacity: float = 2.0,
        top_k: int = 2,
        rotation: Callable[[Site], Rotation] = NoRotation,
    ) -> None:
        super().__init__(site)
        check_top_k(top_k)
        if not 0 < capacity < math.inf:
            raise ValueError(f"Expected capacity to be positive and finite, but got {capacity}.")
        self.capacity, self.top_k = capacity, top_k
        self.scorer = InputScorer(site)
        self.rotation = rotation(site)

    def bind(self, bank: ExpertBank) -> None:
        """Refuse a ``top_k`` above the number of experts in the library, and say what evaluation does."""
        check_top_k(self.top_k, bank)
        say_once(NOT_CAUSAL)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Score; select over the tokens in training, over the experts otherwise; see `Gate.forward`."""
        logits = self.scorer(x, latents, bank)
        if not self.training:
            return Routing(*select_top_k(logits, self.top_k, renormalize=False), logits)
        probabilities = logits.softmax(-1)
        real = self._real_tokens(logits, context)
        taken = best_tokens(probabilities.detach().flatten(0, -2), real, self.capacity)
        return Routing(probabilities * taken.view_as(probabilities), None, logits)

    def _real_tokens(self, logits: Tensor, context: Context) -> Tensor:  # (T,) bool
        count = logits.shape[:-1].numel()
        tokens = context.tokens.get(self.site.stream)
        if tokens is None:
            return torch.ones(count, dtype=torch.bool, device=logits.device)
        if tokens.numel() != count:
            raise ValueError(
                f"ExpertChoiceGate at {self.site.path}: expected the mask of real tokens to cover the layer's "
                f"{tuple(logits.shape[:-1])} positions, but it has shape {tuple(tokens.shape)}. Pass the mask of this "
                "very batch to the network."
            )
        return tokens.flatten().to(logits.device)


def best_tokens(scores: Tensor, real: Tensor, capacity: float) -> Tensor:
    """Tell which tokens each expert takes: its ``ceil(T * capacity / E)`` best real ones, ties to the first.

    Args:
        scores: (tokens, E), not negative.
        real: which of them are real, (tokens,) bool; T is their number.
        capacity: experts a token gets on average.

    Returns:
        (tokens, E) bool.

    Source: arXiv 2202.09368, section 3.2.

    Example:
        >>> best_tokens(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), torch.tensor([True, True, True]), 1.0).int()
        tensor([[1, 0],
                [1, 1],
                [0, 1]], dtype=torch.int32)
    """
    order = scores.masked_fill(~real.unsqueeze(-1), -1).sort(dim=0, descending=True, stable=True).indices
    places = torch.arange(scores.shape[0], device=scores.device).unsqueeze(-1).expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, places)
    # A tensor, not a number: reading T back would make every layer wait for the device.
    taken = (real.sum(dtype=torch.float64) * capacity / scores.shape[-1]).ceil()
    return (rank < taken) & real.unsqueeze(-1)
