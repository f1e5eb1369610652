"""RotMoLE: a rotation gate in rank space beside the scalar gate (layer 1)."""

from radargate_pl.gates.base import Site
from radargate_pl.gates.scorers import ScorerName
from radargate_pl.gates.stretch import LearnedOrFixed, Renormalize, StretchGate
from radargate_pl.rank_rotation import RankRotation


class RotMoLEGate(StretchGate):
    """Rotate each expert's latents by angles linear in the layer input, then weigh the experts like StretchGate.

    ``y = x W + sum_i g_i scaling_i (h_i R(phi_i)) B_i^T``, ``phi_i = x W_i^T``. Trains the scorer and the angle maps,
    which start at zero, where this gate is exactly StretchGate.

    INFERRED throughout: no formula of the paper could be seen; see RankRotation.

    Args:
        site: the layer (given by the network, never in a config).
        top_k: experts kept per token.
        scorer: "x" or "experts" (of the outputs before rotation); see StretchGate.
        temperature: divides the logits; "learned" trains it; see StretchGate.
        renormalize: "auto", "always" or "never"; see StretchGate.
        output_scale: factor of the kept weights; "learned" trains it; see StretchGate.
        trunk_rank: rank of a trunk before the angle maps; ``None`` for full maps (the usual reading).

    Raises:
        ValueError: for values out of range and unknown names.

    Source: RotMoLE, arXiv 2605.25565 (formulas inferred).
    """

    def __init__(
        self,
        site: Site,
        top_k: int = 2,
        scorer: ScorerName = "x",
        temperature: LearnedOrFixed = 1.0,
        renormalize: Renormalize = "auto",
        output_scale: LearnedOrFixed = 1.0,
        trunk_rank: int | None = None,
    ) -> None:
        super().__init__(site, top_k, scorer, temperature, renormalize, output_scale)
        self.trunk_rank = trunk_rank
        self.rotation = RankRotation(site, trunk_rank)
