"""Rotations of expert outputs before they are mixed (layer 1)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from radargate_pl.initialization import generator_for
from radargate_pl.ops import rms_normalize
from radargate_pl.precision import Float32Module
from radargate_pl.rotation_function import RadarRotationFunction
from radargate_pl.site import Site

AngleNorm = Literal["none", "rms"]


class Rotation(Float32Module):
    """What happens to an expert between its latents and the mixture; this base class changes nothing.

    A rotation acts on the latents (before the lift to ``out``), on the outputs (after it), or on neither. ``mix`` lifts
    the chosen experts one by one only when ``acts_on_outputs`` is true; otherwise the mixture is one GEMM.

    Args:
        site: the layer (given by the gate, never in a config).
    """

    acts_on_outputs: bool = False

    def __init__(self, site: Site) -> None:
        super().__init__()

    def latents(self, latents: Tensor, x: Tensor, indices: Tensor | None) -> Tensor:
        """Transform latents (..., E, r) given the layer input x (..., in) and the chosen indices (..., K)."""
        return latents

    def outputs(self, v: Tensor, total: Tensor, expert: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """Transform one expert's output per token.

        Args:
            v: outputs of one expert per token, (..., out), float32.
            total: sum of all experts' outputs, (..., out), float32.
            expert: local index of the expert of each token, (...) int64, or one index for all tokens.

        Returns:
            The transformed output (..., out) and its angles in radians (..., out // 2), or ``None``.
        """
        return v, None


class NoRotation(Rotation):
    """The identity: experts are only stretched."""


class RadarRotation(Rotation):
    r"""Rotate ``v_i`` by angles that come from its interaction with all other experts.

    ``a_i = (U_i P) Q`` with ``U_i = v_i * (S - v_i)``, ``P`` (out, rank), ``Q`` (rank, out // 2), shared by all
    experts; ``vt_i = rotate(v_i, a_i)``. With ``angle_norm="rms"`` both factors of ``U_i`` are divided by their root
    mean square first, so that angles depend neither on the size of the LoRA outputs nor on the number of experts.
    ``Q`` starts at zero: no rotation.

    Args:
        site: the layer (given by the gate, never in a config); with an odd width the last coordinate stays.
        rotation_rank: rank of the angle matrix theta_r = P Q (r_a of the paper).
        angle_norm: "none" (the paper's form) or "rms" (scale-free).

    Raises:
        ValueError: when ``rotation_rank`` is below 1 or ``angle_norm`` is unknown.

    Source: arXiv 2505.23184, eq. 4-8, 17-20 and section 4.3; shapes of P and Q repaired (theta_r is out x out // 2).
    """

    acts_on_outputs = True

    def __init__(self, site: Site, rotation_rank: int = 8, angle_norm: AngleNorm = "rms") -> None:
        super().__init__(site)
        if rotation_rank < 1:
            raise ValueError(f"Expected rotation_rank to be at least 1, but got {rotation_rank}.")
        if angle_norm not in ("none", "rms"):
            raise ValueError(f"Expected angle_norm to be 'none' or 'rms', but got {angle_norm!r}.")
        self.rotation_rank = rotation_rank
        self.angle_norm = angle_norm
        bound = 1 / math.sqrt(site.out_features)
        generator = generator_for(site.path, "rotation")
        self.P = nn.Parameter(
            torch.empty(site.out_features, rotation_rank, dtype=torch.float32).uniform_(
                -bound, bound, generator=generator
            )
        )
        self.Q = nn.Parameter(torch.zeros(rotation_rank, site.out_features // 2, dtype=torch.float32))

    def angles(self, v: Tensor, total: Tensor) -> Tensor:
        """Compute the angles ``a = (U P) Q`` in radians: v and total (..., out) to (..., out // 2), float32."""
        others = total - v
        if self.angle_norm == "rms":
            v, others = rms_normalize(v), rms_normalize(others)
        return (v * others) @ self.P @ self.Q

    def outputs(self, v: Tensor, total: Tensor, expert: Tensor | int) -> tuple[Tensor, Tensor]:
        """Rotate ``v`` (..., out) by its angles; see `Rotation.outputs`.

        Equals ``rotate(v, self.angles(v, total))``; the angles returned carry no gradient.
        """
        rotated, angles = RadarRotationFunction.apply(v, total, self.P, self.Q, self.angle_norm == "rms")
        return rotated, angles
