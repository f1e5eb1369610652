"""Arrow: experts chosen by the input direction each answers to most strongly; nothing trains (layer 1)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Gate, Routing
from radargate_pl.gates.stretch import check_top_k
from radargate_pl.ops import gate_dtype, select_top_k
from radargate_pl.prototypes import leading_directions
from radargate_pl.rotations import NoRotation, Rotation
from radargate_pl.site import Site

NORM_EPS = 1e-12


class ArrowGate(Gate):
    """``|x . p_i|``, the ``top_k`` largest kept, softmax over them: routing from the experts' own weights.

    ``p_i`` is the expert's prototype, the leading right singular vector of its update, found exactly (PEFT iterates 15
    times from a random start). The defaults are PEFT's. The other options are mttl's, whose default is ``combine:
    separate``. The absolute value makes the sign of a prototype irrelevant; x keeps its length, so long inputs are
    routed more sharply than short ones. An expert without an update has a zero prototype and scores 0.

    Args:
        site: the layer (given by the network, never in a config).
        top_k: experts kept per token; a layer with fewer experts keeps all of them.
        temperature: divides the scores; "sqrt_in" is the root of the width of x (mttl's for 0 or less).
        norm_input: whether x is divided by its norm first (prototypes have norm 1 anyway).
        scale: whether prototypes are multiplied by the square of their singular value.
        rotation: what is done to kept outputs before they are summed.

    Attributes:
        prototypes: ``p_i`` of the experts present, scaled or not, (E, in) float32; made anew from them, never saved.

    Raises:
        ValueError: for values out of range; in `bind`, when the experts are still to be trained.

    Source: Arrow, arXiv 2405.11157, section 4.1; PEFT's ArrowConfig; microsoft/mttl, arrow_selector.py.
    """

    takes_new_experts = True
    prototypes: Tensor

    def __init__(
        self,
        site: Site,
        top_k: int = 3,
        temperature: float | Literal["sqrt_in"] = 1.0,
        norm_input: bool = False,
        scale: bool = False,
        rotation: Callable[[Site], Rotation] = NoRotation,
    ) -> None:
        super().__init__(site)
        check_top_k(top_k)
        if temperature != "sqrt_in" and (isinstance(temperature, str) or not 0 < temperature < math.inf):
            raise ValueError(f"Expected temperature to be positive and finite or 'sqrt_in', but got {temperature!r}.")
        self.top_k, self.temperature = top_k, temperature
        self.norm_input, self.scale = norm_input, scale
        self.rotation = rotation(site)

    def bind(self, bank: ExpertBank) -> None:
        """Find the prototypes of the experts."""
        check_top_k(self.top_k, bank)
        if bank.trainable:
            raise ValueError(
                f"Expected trained experts for ArrowGate, which routes by their weights, but those at {self.site.path} "
                "are still to be trained. Train them with another gate first (TaskGate), then give them as `experts`."
            )
        directions, strengths = leading_directions(bank)
        scaled = directions * strengths.square().unsqueeze(-1) if self.scale else directions
        self.register_buffer("prototypes", scaled, persistent=False)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Compare x with the prototypes, select and weigh; see `Gate.forward`."""
        wide = x.to(gate_dtype(x.dtype))
        if self.norm_input:  # not F.normalize: its gradient is 1e12 where x is zero
            wide = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + NORM_EPS)
        temperature = math.sqrt(self.site.in_features) if self.temperature == "sqrt_in" else self.temperature
        logits = F.linear(wide, self.prototypes.to(wide.dtype)).abs() / temperature
        weights, indices = select_top_k(logits, self.top_k, renormalize=True)
        return Routing(weights, indices, logits)
