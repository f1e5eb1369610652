"""Rotation of the latents before B, as in RotMoLE (layer 1)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.experts import ExpertBank
from radargate_pl.initialization import generator_for, uniform_parameter
from radargate_pl.ops import gate_dtype, is_transformed, rotate
from radargate_pl.rotations import Rotation
from radargate_pl.site import Site


class RankRotation(Rotation):
    """Rotate each expert's latents ``h_i`` in neighbouring planes by angles from the layer input, before B.

    ``v_i = scaling_i (h_i R(phi_i)) B_i^T`` with ``phi_i = x W_i^T``, one angle for each of the expert's ``r_i // 2``
    planes. ``weight`` (E, r // 2, in) starts at zero: no rotation. It costs O(r) per expert and keeps ``|h_i|`` and the
    column space of ``B_i``, not ``|v_i|``. An expert of odd rank keeps its last latent as it is; latents that only pad
    it to the layer's largest rank are never mixed in, and an expert of rank 1 has nothing to turn.

    INFERRED: of the paper only the abstract was seen, which speaks of a rotation gate beside the scalar one, for the
    selected experts, made cheap by their low rank. Linear angles, interleaved planes and the zero start are our
    reading.

    Args:
        site: the layer (given by the gate, never in a config).
        trunk_rank: ``None`` for full maps; a number puts one trunk ``T`` (trunk_rank, in) before all of them,
            ``phi_i = (x T^T) W_i^T`` with ``weight`` (E, r // 2, trunk_rank).

    Raises:
        ValueError: when ``trunk_rank`` is below 1.

    Source: RotMoLE, arXiv 2605.25565 (formulas inferred).
    """

    has_plane: Tensor | None  # (E, r // 2), False for planes an expert does not have

    def __init__(self, site: Site, trunk_rank: int | None = None) -> None:
        super().__init__(site)
        if trunk_rank is not None and trunk_rank < 1:
            raise ValueError(
                f"Expected trunk_rank to be at least 1, or null for a map without a trunk, but got {trunk_rank}."
            )
        self.trunk_rank = trunk_rank
        width = site.in_features
        if trunk_rank is not None:
            self.trunk = uniform_parameter((trunk_rank, width), width, generator_for(site.path, "rotation"))
            width = trunk_rank
        self.weight = nn.Parameter(torch.zeros(len(site.experts), site.rank // 2, width, dtype=torch.float32))
        self.register_buffer("has_plane", None, persistent=False)

    def bind(self, bank: ExpertBank) -> None:
        """Find out how many planes each expert has; the site knows the largest rank only."""
        planes = torch.arange(bank.rank // 2)
        has_plane = planes < torch.tensor(bank.ranks).unsqueeze(-1) // 2
        self.has_plane = None if has_plane.all() else has_plane

    def latent_angles(self, x: Tensor) -> Tensor:
        """Return the angles in radians, x (..., in) to (..., E, r // 2), float32; 0 in planes an expert lacks."""
        x = x.to(gate_dtype(x.dtype))
        if self.trunk_rank is not None:
            x = F.linear(x, self.trunk)
        angles = F.linear(x, self.weight.flatten(0, 1)).unflatten(-1, self.weight.shape[:2])
        return angles if self.has_plane is None else angles * self.has_plane

    def latents(self, latents: Tensor, x: Tensor, indices: Tensor | None) -> Tensor:
        """Rotate all experts' latents (..., E, r), in their own dtype."""
        angles = self.latent_angles(x)
        turned = rotate if is_transformed() else _Rotate.apply
        return turned(latents.to(angles.dtype), angles).to(latents.dtype)


class _Rotate(torch.autograd.Function):
    """`ops.rotate` that keeps its two inputs only: cosines and sines of every expert would be as much again."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(latents, angles)
        return rotate(latents, angles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        latents, angles = ctx.saved_tensors
        back, paired = rotate(grad, -angles), 2 * angles.shape[-1]
        even, odd = latents[..., :paired:2], latents[..., 1:paired:2]
        return back, even * back[..., 1:paired:2] - odd * back[..., :paired:2]
