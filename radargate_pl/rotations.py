"""Rotations of expert outputs before they are mixed (layer 1)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from radargate_pl.experts import ExpertBank
from radargate_pl.initialization import generator_for, uniform_parameter
from radargate_pl.ops import is_transformed, rms_normalize, rotate
from radargate_pl.precision import Float32Module
from radargate_pl.rotation_function import RadarRotationFunction
from radargate_pl.site import Site

AngleNorm = Literal["none", "rms"]
RotationSharing = Literal["shared", "per_expert"]
RotationRank = int | Literal["full"]
DEFAULT_RANK = 8


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

    def bind(self, bank: ExpertBank) -> None:
        """Look at the experts once, when the gate is attached (for what the site does not know, such as ranks)."""

    def latents(self, latents: Tensor, x: Tensor, indices: Tensor | None) -> Tensor:
        """Transform latents (..., E, r) given the layer input x (..., in) and the chosen indices (..., K)."""
        return latents

    def latent_angles(self, x: Tensor) -> Tensor | None:
        """Return the angles `latents` turns by, (..., E, r // 2) in radians, or ``None`` if it does not rotate."""
        return None

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

    ``a_i = (U_i P) Q`` with ``U_i = v_i * (S - v_i)``, ``P`` (out, rank), ``Q`` (rank, out // 2); ``vt_i = rotate(v_i,
    a_i)``. With ``angle_norm="rms"`` both factors of ``U_i`` are divided by their root mean square first, so that
    angles depend neither on the size of the LoRA outputs nor on the number of experts. ``Q`` starts at zero: no
    rotation.

    Args:
        site: the layer (given by the gate, never in a config); with an odd width the last coordinate stays.
        rotation_rank: rank of the angle matrix theta_r = P Q (r_a of the paper); "full" trains ``theta`` (out, out //
            2) itself, from zero.
        rotation_sharing: "shared": one P and Q for all experts; "per_expert": each its own, (E, out, rank) and
            (E, rank, out // 2).
        angle_norm: "none" (the paper's form) or "rms" (scale-free).
        angle_bound: largest angle in radians, ``bound tanh(a / bound)``; ``None`` for no bound.

    Raises:
        ValueError: for values out of range, unknown names, and "full" with "per_expert".

    Source: arXiv 2505.23184, eq. 4-8, 17-20 and section 4.3; shapes of P and Q repaired (theta_r is out x out // 2).
        The paper derives shared angles (eq. 39) and counts per-expert ones (C.4). ``angle_norm: rms`` and
        ``angle_bound`` are ours.
    """

    acts_on_outputs = True

    def __init__(
        self,
        site: Site,
        rotation_rank: RotationRank = DEFAULT_RANK,
        rotation_sharing: RotationSharing = "shared",
        angle_norm: AngleNorm = "rms",
        angle_bound: float | None = None,
    ) -> None:
        super().__init__(site)
        _check_rotation(rotation_rank, rotation_sharing, angle_norm, angle_bound)
        self.rotation_rank = rotation_rank
        self.rotation_sharing = rotation_sharing
        self.angle_norm = angle_norm
        self.angle_bound = angle_bound
        width, planes = site.out_features, site.out_features // 2
        if rotation_rank == "full":
            self.theta = nn.Parameter(torch.zeros(width, planes, dtype=torch.float32))
            return
        if rotation_rank > max(width, DEFAULT_RANK):
            raise ValueError(
                f"Expected rotation_rank to be at most {width}, the width of {site.path}, but got {rotation_rank}; "
                "'full' trains the whole angle matrix."
            )
        experts = (len(site.experts),) if rotation_sharing == "per_expert" else ()
        self.P = uniform_parameter((*experts, width, rotation_rank), width, generator_for(site.path, "rotation"))
        self.Q = nn.Parameter(torch.zeros(*experts, rotation_rank, planes, dtype=torch.float32))

    def angles(self, v: Tensor, total: Tensor, expert: Tensor | int = 0) -> Tensor:
        """Compute the angles ``a = (U P) Q`` in radians, (..., out // 2), float32; see `Rotation.outputs`."""
        P, Q, columns = self._factors(expert)
        others = total - v
        if self.angle_norm == "rms":
            v, others = rms_normalize(v), rms_normalize(others)
        angles = (v * others) @ P
        angles = angles if columns is None else angles * columns
        angles = angles if Q is None else angles @ Q
        return angles if self.angle_bound is None else self.angle_bound * (angles / self.angle_bound).tanh()

    def outputs(self, v: Tensor, total: Tensor, expert: Tensor | int) -> tuple[Tensor, Tensor]:
        """Rotate ``v`` (..., out) by its angles; see `Rotation.outputs`.

        Equals ``rotate(v, self.angles(v, total, expert))``; the angles returned carry no gradient.
        """
        if torch.compiler.is_compiling() or is_transformed():  # they write a backward pass of their own
            angles = self.angles(v, total, expert)
            return rotate(v, angles), angles.detach()
        P, Q, columns = self._factors(expert)
        is_normed = self.angle_norm == "rms"
        rotated, angles = RadarRotationFunction.apply(v, total, P, Q, is_normed, columns, self.angle_bound)
        return rotated, angles

    def _factors(self, expert: Tensor | int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return P, Q, and which columns of P belong to each token (``None``: all)."""
        if self.rotation_rank == "full":
            return self.theta, None, None
        if self.rotation_sharing == "shared":
            return self.P, self.Q, None
        if isinstance(expert, int):
            return self.P[expert], self.Q[expert], None
        # All experts' factors side by side: two GEMMs, where gathering P per token would move rank times ``out``.
        owners = torch.arange(len(self.P) * self.rotation_rank, device=expert.device) // self.rotation_rank
        return self.P.transpose(0, 1).flatten(1), self.Q.flatten(0, 1), expert.unsqueeze(-1) == owners


def _check_rotation(rank: RotationRank, sharing: str, norm: str, bound: float | None) -> None:
    if rank != "full" and (isinstance(rank, str) or rank < 1):
        raise ValueError(f"Expected rotation_rank to be at least 1, or 'full', but got {rank!r}.")
    if sharing not in ("shared", "per_expert"):
        raise ValueError(f"Expected rotation_sharing to be 'shared' or 'per_expert', but got {sharing!r}.")
    if rank == "full" and sharing == "per_expert":
        raise ValueError(
            "Expected rotation_rank to be a number under rotation_sharing 'per_expert', but got 'full': a whole angle "
            "matrix for every expert would outweigh the experts. Give a rank, or use rotation_sharing 'shared'."
        )
    if norm not in ("none", "rms"):
        raise ValueError(f"Expected angle_norm to be 'none' or 'rms', but got {norm!r}.")
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(f"Expected angle_bound to be positive and finite (radians), or null, but got {bound}.")
