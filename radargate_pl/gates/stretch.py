"""The learned gate that only stretches: softmax, top-k, weighted sum (layer 1)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Gate, Routing, Site
from radargate_pl.gates.scorers import ScorerName, build_scorer
from radargate_pl.ops import select_top_k

Renormalize = Literal["auto", "always", "never"]
LearnedOrFixed = float | Literal["learned"]


class StretchGate(Gate):
    """Softmax over scores, the ``top_k`` largest kept: ``y = x W + sum_i g_i v_i`` ("MoLE gate" of the paper's tables).

    Kept weights that sum to one leave the update inside the convex hull of the kept expert outputs, never longer than
    the longest of them. ``output_scale`` multiplies the kept weights after that: direction from the softmax, length
    from one number per layer, also at top_k 1 and in every mode of ``renormalize``.

    Args:
        site: the layer (given by the network, never in a config).
        top_k: experts kept per token; a layer with fewer experts keeps all of them.
        scorer: "x" scores from the layer input (eq. 1); "experts" from the LayerNorm of all expert outputs (appendix
            B.2).
        temperature: divides the logits; "learned" trains one per layer as exp(``log_temperature``), from 1.
        renormalize: whether kept weights are divided by their sum: "auto" does for top_k above 1 (at 1 the weight would
            be 1 and the scorer would get no gradient), "always", "never".
        output_scale: factor of all kept weights; "learned" trains one per layer, ``output_scale_weight``, from 1 (it
            may cross zero).

    Raises:
        ValueError: when ``top_k`` is below 1, a number is not positive or a name is unknown.

    Source: arXiv 2505.23184, eq. 1; the learned temperature is MoLE's, arXiv 2404.13628, section 3.2;
        ``output_scale`` is ours.
    """

    reads_latents = False

    def __init__(
        self,
        site: Site,
        top_k: int = 2,
        scorer: ScorerName = "x",
        temperature: LearnedOrFixed = 1.0,
        renormalize: Renormalize = "auto",
        output_scale: LearnedOrFixed = 1.0,
    ) -> None:
        super().__init__(site)
        check_top_k(top_k)
        if renormalize not in ("auto", "always", "never"):
            raise ValueError(f"Expected renormalize to be 'auto', 'always' or 'never', but got {renormalize!r}.")
        self.top_k = top_k
        self.temperature = temperature
        self.renormalize = renormalize
        self.output_scale = output_scale
        self.log_temperature = learned_scalar("temperature", temperature, start=0.0)
        self.output_scale_weight = learned_scalar("output_scale", output_scale, start=1.0)
        self.scorer = build_scorer(scorer, site)

    def bind(self, bank: ExpertBank) -> None:
        """Refuse a ``top_k`` above the number of experts in the library."""
        check_top_k(self.top_k, bank)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Score, select and weigh the experts; see `Gate.forward`."""
        temperature = float(self.temperature) if self.log_temperature is None else self.log_temperature.exp()
        logits = self.scorer(x, latents, bank)
        logits = logits if self.temperature == 1 else logits / temperature
        renormalize = self.top_k > 1 if self.renormalize == "auto" else self.renormalize == "always"
        weights, indices = select_top_k(logits, self.top_k, renormalize=renormalize)
        if self.output_scale != 1:
            scale = self.output_scale_weight
            weights = weights * (float(self.output_scale) if scale is None else scale)
        return Routing(weights, indices, logits)


def learned_scalar(name: str, value: LearnedOrFixed, *, start: float) -> nn.Parameter | None:
    """Return the parameter of an argument that is "learned", (1,) float32 (FSDP takes none of shape ()), or ``None``.

    Raises:
        ValueError: when a given number is not positive and finite, naming the argument.
    """
    if value == "learned":
        return nn.Parameter(torch.full((1,), start, dtype=torch.float32))
    if isinstance(value, str) or not 0 < value < math.inf:
        raise ValueError(
            f"Expected {name} to be positive and finite, but got {value}; give a number above 0, or 'learned'."
        )
    return None


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
