"""Which mixture layers the quick path of decoding knows, and which of them can be computed side by side (layer 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from radargate_pl.combines import Combine
from radargate_pl.experts import ExpertBank
from radargate_pl.gates import RadarGate, StretchGate
from radargate_pl.gates.scorers import InputScorer
from radargate_pl.ops import gate_dtype
from radargate_pl.rotations import NoRotation, RadarRotation

if TYPE_CHECKING:
    from radargate_pl.moe import MoELinear


class Kind(NamedTuple):
    """What members must agree in, and what makes a plan stale when it changes."""

    experts: int
    rank: int
    in_features: int
    dtype: torch.dtype
    device: torch.device
    kept: int
    renormalizes: bool
    rotation_rank: int  # 0 without rotation
    angle_norm: str
    angle_bound: float | None


def settings_of(layer: MoELinear) -> list[tuple[dict[str, Any], str, object]]:
    """Return what decides how a layer computes and is no parameter: where it is kept, its name, its value."""
    owners: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        (layer._modules, ("bank", "gate")),
        (layer.__dict__, ("combine", "mixture")),
        (layer.bank.__dict__, ("scaling", "in_blocks")),
        (layer.gate.__dict__, ("forward", "top_k", "temperature", "renormalize", "output_scale")),
        (layer.gate.rotation.__dict__, ("angle_norm", "angle_bound", "rotation_rank", "rotation_sharing")),
    ]
    return [(owner, name, owner.get(name)) for owner, names in owners for name in names]


def hooks_of(layer: MoELinear) -> list[dict[int, Any]]:
    """Return where hooks on what the quick path leaves out would be."""
    left_out = [part for part in (layer.gate, layer.gate._modules.get("scorer")) if part is not None]
    return [hooks for module in left_out for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def kind_of(layer: MoELinear) -> Kind | None:
    """Return what is known of a layer, or ``None`` where only the general path can compute it."""
    gate, bank, rotation = layer.gate, layer.bank, layer.gate.rotation
    if not isinstance(gate, StretchGate) or type(gate) not in (StretchGate, RadarGate):
        return None
    if type(gate.scorer) is not InputScorer:
        return None
    if type(bank) is not ExpertBank or bank.in_blocks or bank.num_experts == 1 or type(layer.combine) is not Combine:
        return None  # a single expert is PEFT's LoRA, bit for bit
    if "forward" in gate.__dict__ or any(hooks_of(layer)):
        return None
    rotation_rank, norm, bound = 0, "none", None
    if type(rotation) is RadarRotation:
        if rotation.rotation_sharing != "shared" or rotation.rotation_rank == "full":
            return None
        rotation_rank, norm, bound = int(rotation.rotation_rank), rotation.angle_norm, rotation.angle_bound
    elif type(rotation) is not NoRotation:
        return None
    dtype, parameters = bank.lora_A.dtype, list(gate.parameters())
    if any(p.is_inference() for p in (*parameters, bank.lora_A, bank.lora_B)):
        return None  # writes to them are not counted
    if any(p.dtype != gate_dtype(dtype) for p in parameters) or (rotation_rank == 0 and gate_dtype(dtype) != dtype):
        return None  # without a rotation the general path sums in the experts' own dtype
    renormalizes = gate.top_k > 1 if gate.renormalize == "auto" else gate.renormalize == "always"
    sizes = (bank.num_experts, bank.rank, bank.in_features, dtype, bank.lora_A.device)
    return Kind(*sizes, min(gate.top_k, bank.num_experts), renormalizes, rotation_rank, norm, bound)
