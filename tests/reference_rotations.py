"""Slow dense oracles of the rotations' options, of RankRotation and of learned temperatures and scales.

Nothing here is imported from `radargate_pl`: every expert has its own explicit angle matrix, every rotation is a matrix
per token, every latent vector is exactly as long as its expert's rank.

Source: RadarGate, arXiv 2505.23184, eq. 4-8, 17-18, 39 and C.4; MoLE, arXiv 2404.13628 (learned temperature); RotMoLE,
arXiv 2605.25565 (formulas inferred).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from reference import (
    NORM_EPSILON,
    Dense,
    Expert,
    choose,
    expert_outputs,
    largest_norms,
    rotate_rows,
    stretch_weights,
)
from torch import Tensor


def angle_matrix(state: Mapping[str, Tensor], expert: int, rotation_rank: int | str, rotation_sharing: str) -> Tensor:
    """theta_r (out, out // 2) of one expert: trained whole, one product P Q for all, or one for each."""
    if rotation_rank == "full":
        return state["gate.rotation.theta"]
    P, Q = state["gate.rotation.P"], state["gate.rotation.Q"]
    return P[expert] @ Q[expert] if rotation_sharing == "per_expert" else P @ Q


def radar_angles(
    outputs: Sequence[Tensor],
    state: Mapping[str, Tensor],
    *,
    rotation_rank: int | str = 8,
    rotation_sharing: str = "shared",
    angle_norm: str = "rms",
    angle_bound: float | None = None,
) -> Tensor:
    """a_i = (v_i * sum_{j != i} v_j) theta_r, perhaps scale-free, perhaps bounded: (T, E, out // 2)."""
    rows = []
    for i, v in enumerate(outputs):
        others = sum((other for j, other in enumerate(outputs) if j != i), torch.zeros_like(v))
        factors = [v, others]
        if angle_norm == "rms":
            factors = [f / torch.sqrt((f * f).mean(dim=-1, keepdim=True) + NORM_EPSILON) for f in factors]
        angles = (factors[0] * factors[1]) @ angle_matrix(state, i, rotation_rank, rotation_sharing)
        if angle_bound is not None:
            double = torch.exp(2 * angles / angle_bound)
            angles = angle_bound * (double - 1) / (double + 1)
        rows.append(angles)
    return torch.stack(rows, dim=1)


def rank_angles(x: Tensor, state: Mapping[str, Tensor], expert: int, planes: int) -> Tensor:
    """phi_i = x W_i^T or (x T^T) W_i^T for the planes this expert really has, (T, planes)."""
    if "gate.rotation.trunk" in state:
        x = x @ state["gate.rotation.trunk"].T
    return x @ state["gate.rotation.weight"][expert, :planes].T


def rank_rotated_outputs(x: Tensor, experts: Sequence[Expert], state: Mapping[str, Tensor]) -> list[Tensor]:
    """scaling_i (h_i R(phi_i)) B_i^T with h_i as long as the expert's own rank; an odd last latent stays."""
    outputs = []
    for i, expert in enumerate(experts):
        h = x @ expert.lora_A.T
        h = rotate_rows(h, rank_angles(x, state, i, h.shape[1] // 2))
        outputs.append(expert.scaling * (h @ expert.lora_B.T))
    return outputs


RADAR = ("rotation_rank", "rotation_sharing", "angle_norm", "angle_bound")


def dense_rotated_layer(
    x: Tensor, experts: Sequence[Expert], state: Mapping[str, Tensor], *, gate: str, **options: object
) -> Dense:
    """A whole layer under RadarGate, RotationGate, RotMoLEGate or StretchGate with any of their options; x (T, in)."""
    outputs = expert_outputs(x, experts)
    radar = {name: options.pop(name) for name in RADAR if gate in ("RadarGate", "RotationGate") and name in options}
    options.pop("trunk_rank", None)
    if gate == "RotationGate":
        weights, chosen = largest_norms(outputs, options["top_k"])
        logits = None
    else:
        weights, logits, chosen = stretch_weights(x, outputs, experts, state, **options)
        assert chosen == choose(logits, options.get("top_k", 2))
    angles = None
    if gate in ("RadarGate", "RotationGate"):
        angles = radar_angles(outputs, state, **radar)
        outputs = [rotate_rows(v, angles[:, i]) for i, v in enumerate(outputs)]
    if gate == "RotMoLEGate":
        outputs = rank_rotated_outputs(x, experts, state)
    mixed = sum(weights[:, i : i + 1] * v for i, v in enumerate(outputs))
    output = x @ state["base_layer.weight"].T + mixed
    if "base_layer.bias" in state:
        output = output + state["base_layer.bias"]
    return Dense(output, weights, angles, logits, chosen)
