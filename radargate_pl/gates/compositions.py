"""Rules that compose experts without gradients: one LoRA, PEMs' arithmetic, LoraHub's searched weights (layer 1)."""

import math

import torch
from torch import Tensor, nn

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Routing
from radargate_pl.gates.fixed import ConstantGate, FixedGate
from radargate_pl.ops import gate_dtype
from radargate_pl.site import Site


class DirectLoRA(FixedGate):
    """One expert with weight 1 for every token, as if it were the only LoRA; the others are never evaluated.

    A LoRA of all tasks together (``new_experts: {per: union}``) needs no gate of this kind: it is the only expert.

    Args:
        site: the layer (given by the network, never in a config).
        expert: name of the expert.

    Raises:
        ValueError: in `bind`, when the library has no expert of this name.

    Source: arXiv 2505.23184, table 3 and figure 1 ("vanilla LoRA"), which do not say whether it is trained per task or
        on the union.
    """

    argument = "expert"

    def __init__(self, site: Site, expert: str) -> None:
        super().__init__(site, {expert: 1.0})
        self.expert = expert


class PEMs(FixedGate):
    """Arithmetic on whole modules: weighted addition, and negation by a negative weight.

    With ``combine: separate``, the paper's own, ``dW = (sum_j w_j sqrt(s_j) B_j) (sum_i |w_i| sqrt(s_i) A_i)``: the
    sign goes to B only, since on both factors it would cancel. With ``combine: sum``, ``dW = sum_i w_i s_i B_i A_i``.

    Args:
        site: the layer (given by the network, never in a config).
        weights: expert name to weight; experts not named get 0.
        normalize: divide the weights by their sum, as the paper does.

    Raises:
        ValueError: for weights whose sum, to be divided by, is 0; and as for `FixedGate`.

    Source: PEMs, arXiv 2306.14870, section 2; hkust-nlp/PEM_composition, merge.py, negation.py, analogy.py.
    """

    negates_one_factor = True

    def __init__(self, site: Site, weights: dict[str, float], normalize: bool = True) -> None:
        super().__init__(site, weights)
        self.normalize = normalize
        if normalize:
            total = math.fsum(weights.values())
            # Rounding leaves a little of sums like 0.1 + 0.2 - 0.3; dividing by that would blow every weight up.
            if abs(total) <= 1e-9 * max(map(abs, weights.values())):
                raise ValueError(
                    f"Expected weights whose sum is not 0, since they are divided by it, but got {weights}. Change "
                    "them, or set normalize: false."
                )
            self.coefficients = {name: weight / total for name, weight in weights.items()}


class LoraHub(ConstantGate):
    """One weight per expert, the same in all layers and for every token, searched without gradients.

    The weights are no function of anything: `radargate_pl.search.NevergradSearch` proposes them and keeps the best.
    They are a parameter so that they are saved, counted and resumed like one. LoraHub itself adds A and B apart
    (``combine: separate``). At the start all are 0: the bare backbone.

    Args:
        site: the layer (given by the network, never in a config).

    Attributes:
        weights: of every expert of the library, also of those that are absent here, (library,) float32.

    Source: LoraHub, arXiv 2307.13269, section 3; sail-sg/lorahub, algorithm.py.
    """

    weights: nn.Parameter
    present: Tensor

    def bind(self, bank: ExpertBank) -> None:
        """Make the weights: as many as the library has experts, so that those of all layers are alike."""
        self.weights = nn.Parameter(torch.zeros(len(bank.library), dtype=torch.float32))
        self.register_buffer("present", torch.tensor(bank.ids), persistent=False)

    def constants(self, bank: ExpertBank) -> list[float]:
        """Return the weights of the experts present."""
        return self.weights[self.present].tolist()

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Return the weights, cut off from the graph; see `Gate.forward`."""
        row = self.weights.detach()[self.present].to(gate_dtype(latents.dtype))
        return Routing(row.expand(*latents.shape[:-2], -1), None, None)
