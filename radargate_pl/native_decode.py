"""The updates of layers that read one input while a model decodes, in native code (layer 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from radargate_pl.decode_kinds import Kind
from radargate_pl.decode_mixture import MOST_KEPT, collapses, gate_factor, total_map
from radargate_pl.gates import StretchGate
from radargate_pl.native import decode_step
from radargate_pl.native.functions import is_native
from radargate_pl.ops import gate_dtype
from radargate_pl.rotations import RadarRotation

if TYPE_CHECKING:
    from radargate_pl.moe import MoELinear


class NativeDecodeMixture:
    """Does what `DecodeMixture` does in one call, from the experts where their banks keep them.

    Of all weights only P is copied, ``out`` times the rotation's rank, and an A that experts share; ``W_sum`` is made
    where that reads less.

    Args:
        layers: the members.
        kind: theirs.
    """

    def __init__(self, layers: Sequence[MoELinear], kind: Kind) -> None:
        self.kind = kind
        self.collapses = kind.rotation_rank > 0 and collapses(kind, [layer.bank.out_features for layer in layers])
        self._step = decode_step.DecodeStep([_member(layer, kind, self.collapses) for layer in layers])

    def updates(self, x: Tensor) -> Sequence[Tensor] | None:
        """Compute ``sum_i g_i R_i v_i`` of every member: x (..., in) to (..., out) each.

        The results are overwritten by the next call. ``None`` where the general path is cheaper.
        """
        if x.numel() // x.shape[-1] * self.kind.kept > MOST_KEPT:
            return None
        return self._step.updates(x)


def suits_native(layers: Sequence[MoELinear], kind: Kind) -> bool:
    """Tell whether native code can decode layers of a kind."""
    if any(layer.mixture != "auto" or layer.bank.lora_B.dtype != kind.dtype for layer in layers):
        return False
    return is_native(gate_dtype(kind.dtype), layers[0].bank.lora_A.detach())


def _member(layer: MoELinear, kind: Kind, is_collapsed: bool) -> decode_step.Member:
    bank, gate, dtype = layer.bank, cast(StretchGate, layer.gate), gate_dtype(kind.dtype)
    rotation = cast(RadarRotation, gate.rotation) if kind.rotation_rank else None
    A = bank.lora_A.detach().expand(kind.experts, -1, -1).flatten(0, 1)  # a shared A is a single one
    return decode_step.Member(
        theta=gate.scorer.weight.detach().contiguous(),
        A=A.contiguous(),
        B=bank.lora_B.detach().mT.flatten(0, 1).contiguous(),
        scaling=torch.tensor(bank.scaling, dtype=dtype),
        P=None if rotation is None else rotation.P.detach().mT.contiguous(),
        Q=None if rotation is None else rotation.Q.detach().contiguous(),
        W_sum=total_map(bank, dtype).contiguous() if is_collapsed else None,
        kept=kind.kept,
        renormalizes=kind.renormalizes,
        is_normed=kind.angle_norm == "rms",
        temperature=float(gate_factor(gate, "temperature")),
        output_scale=float(gate_factor(gate, "output_scale")),
        angle_bound=kind.angle_bound,
    )
