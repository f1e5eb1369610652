"""The learned gate that only stretches: softmax, top-k, weighted sum (layer 1)."""

import math
from typing import Literal

from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Gate, Routing, Site
from radargate_pl.gates.scorers import ScorerName, build_scorer
from radargate_pl.ops import select_top_k

Renormalize = Literal["auto", "always", "never"]


class StretchGate(Gate):
    """Softmax over scores, the ``top_k`` largest kept: ``y = x W + sum_i g_i v_i`` ("MoLE gate" of the paper's tables).

    The update stays inside the convex hull of the kept expert outputs.

    Args:
        site: the layer (given by the network, never in a config).
        top_k: experts kept per token; a layer with fewer experts keeps all of them.
        scorer: "x" scores from the layer input (eq. 1); "experts" from the LayerNorm of all expert outputs (appendix
            B.2).
        temperature: divides the logits.
        renormalize: whether kept weights are divided by their sum: "auto" does for top_k above 1 (at 1 the weight would
            be 1 and the scorer would get no gradient), "always", "never".

    Raises:
        ValueError: when ``top_k`` is below 1, ``temperature`` is not positive or a name is unknown.

    Source: arXiv 2505.23184, eq. 1.
    """

    def __init__(
        self,
        site: Site,
        top_k: int = 2,
        scorer: ScorerName = "x",
        temperature: float = 1.0,
        renormalize: Renormalize = "auto",
    ) -> None:
        super().__init__(site)
        check_top_k(top_k)
        if not 0 < temperature < math.inf:
            raise ValueError(f"Expected temperature to be positive and finite, but got {temperature}.")
        if renormalize not in ("auto", "always", "never"):
            raise ValueError(f"Expected renormalize to be 'auto', 'always' or 'never', but got {renormalize!r}.")
        self.top_k = top_k
        self.temperature = temperature
        self.renormalize = renormalize
        self.scorer = build_scorer(scorer, site)

    def bind(self, bank: ExpertBank) -> None:
        """Refuse a ``top_k`` above the number of experts in the library."""
        check_top_k(self.top_k, bank)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Score, select and weigh the experts; see `Gate.forward`."""
        logits = self.scorer(x, latents, bank) / self.temperature
        renormalize = self.top_k > 1 if self.renormalize == "auto" else self.renormalize == "always"
        weights, indices = select_top_k(logits, self.top_k, renormalize=renormalize)
        return Routing(weights, indices, logits)


def check_top_k(top_k: int, bank: ExpertBank | None = None) -> None:
    """Refuse a ``top_k`` below 1 or above the number of experts of the bank's library.

    Raises:
        ValueError: naming the value and the limit.
    """
    if top_k < 1:
        raise ValueError(f"Expected top_k to be at least 1, but got {top_k}.")
    if bank is not None and top_k > len(bank.library):
        experts = f"{len(bank.library)} ({', '.join(bank.library)})"
        raise ValueError(f"Expected top_k to be at most the number of experts, {experts}, but got {top_k}.")
