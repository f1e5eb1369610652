"""RadarGate and its rotation-only half (layer 1)."""

from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gates.base import Context, Gate, Routing, Site
from radargate_pl.gates.scorers import ScorerName
from radargate_pl.gates.stretch import LearnedOrFixed, Renormalize, StretchGate, check_top_k
from radargate_pl.ops import gate_dtype, largest
from radargate_pl.rotations import AngleNorm, RadarRotation, RotationRank, RotationSharing


class RadarGate(StretchGate):
    """Rotate each kept expert by angles learned from its interaction with the others, then stretch it by its weight.

    ``y = x W + sum_i g_i rotate(v_i, a_i)``, ``a_i = ((v_i * (S - v_i)) P) Q``. Trains the scorer, P and Q; Q starts at
    zero, where this gate is exactly StretchGate. A rotation keeps norms: the update is no longer than the longest kept
    output unless ``output_scale`` lets it be.

    Args:
        site: the layer (given by the network, never in a config).
        top_k: experts kept and rotated per token.
        scorer: "x" or "experts"; see StretchGate.
        temperature: divides the logits; "learned" trains it; see StretchGate.
        renormalize: "auto", "always" or "never"; see StretchGate.
        output_scale: factor of the kept weights; "learned" trains it; see StretchGate.
        rotation_rank: rank of the angle matrix theta_r = P Q; "full" trains theta_r itself.
        rotation_sharing: "shared": one P and Q per layer for all experts; "per_expert": a pair for each.
        angle_norm: "rms" makes angles independent of the size of the expert outputs; "none" is the paper's form, whose
            angles are quadratic in outputs that are small in practice, so that it hardly rotates at small rates.
        angle_bound: largest angle in radians, ``bound tanh(a / bound)``; ``None`` for no bound.

    Raises:
        ValueError: for values out of range and unknown names.

    Source: arXiv 2505.23184, eq. 4-8 and 13-20; low-rank form section 4.3; the paper derives ``shared`` (eq. 39) and
        counts ``per_expert`` (C.4); ``angle_norm: rms``, ``angle_bound`` and ``output_scale`` are ours.
    """

    def __init__(
        self,
        site: Site,
        top_k: int = 2,
        scorer: ScorerName = "x",
        temperature: LearnedOrFixed = 1.0,
        renormalize: Renormalize = "auto",
        output_scale: LearnedOrFixed = 1.0,
        rotation_rank: RotationRank = 8,
        rotation_sharing: RotationSharing = "shared",
        angle_norm: AngleNorm = "rms",
        angle_bound: float | None = None,
    ) -> None:
        super().__init__(site, top_k, scorer, temperature, renormalize, output_scale)
        self.rotation_rank = rotation_rank
        self.rotation_sharing = rotation_sharing
        self.angle_norm = angle_norm
        self.angle_bound = angle_bound
        self.rotation = RadarRotation(site, rotation_rank, rotation_sharing, angle_norm, angle_bound)


class RotationGate(Gate):
    """Rotation without a learned stretch: the ``top_k`` experts with the largest outputs, weights ``1 / top_k``.

    The paper does not say what its rotation-only rows do about the weights; choosing by ``|v_i|``, which has no
    parameter, is our reading (INFERRED). Trains P and Q only.

    Args:
        site: the layer (given by the network, never in a config).
        top_k: experts kept and rotated per token.
        rotation_rank: rank of the angle matrix theta_r = P Q, or "full"; see RadarGate.
        rotation_sharing: "shared" or "per_expert"; see RadarGate.
        angle_norm: "rms" or "none"; see RadarGate.
        angle_bound: largest angle in radians, or ``None``.

    Raises:
        ValueError: for values out of range and unknown names.

    Source: arXiv 2505.23184, tables ("rotation-only"); selection inferred.
    """

    def __init__(
        self,
        site: Site,
        top_k: int = 2,
        rotation_rank: RotationRank = 8,
        rotation_sharing: RotationSharing = "shared",
        angle_norm: AngleNorm = "rms",
        angle_bound: float | None = None,
    ) -> None:
        super().__init__(site)
        check_top_k(top_k)
        self.top_k = top_k
        self.rotation_rank = rotation_rank
        self.rotation_sharing = rotation_sharing
        self.angle_norm = angle_norm
        self.angle_bound = angle_bound
        self.rotation = RadarRotation(site, rotation_rank, rotation_sharing, angle_norm, angle_bound)

    def bind(self, bank: ExpertBank) -> None:
        """Refuse a ``top_k`` above the number of experts in the library."""
        check_top_k(self.top_k, bank)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        """Keep the experts with the largest outputs; see `Gate.forward`."""
        kept = min(self.top_k, bank.num_experts)
        norms = bank.norms(latents.detach())
        weights = norms.new_full((*latents.shape[:-2], kept), 1 / kept, dtype=gate_dtype(latents.dtype))
        if kept == bank.num_experts:
            return Routing(weights, None, None)
        indices = largest(norms, kept)
        return Routing(weights, indices, None)
