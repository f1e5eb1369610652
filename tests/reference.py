"""The slow dense oracle: every formula of RadarGate written down once more, as plainly as possible.

Nothing here is imported from `radargate_pl`; parameters come from state dicts and plain tensors. Every expert is made
`d_out` wide, every rotation is an explicit matrix per token, every selection a Python sort. Autograd differentiates it.

Source: RadarGate, arXiv 2505.23184, equations 1, 4-8, 13-20 and appendix B.2; the readings of its inconsistencies
(scaling inside `v_i`, rotation of size `d_out`, list semantics of `S`, sign of equations 17-18) are the project's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from reference_combines import gram_schmidt, separate_sum
from torch import Tensor

NORM_EPSILON = 1e-8  # of angle_norm rms and of the LayerNorm over the concatenated expert outputs


class Expert(NamedTuple):
    """One LoRA expert in PEFT's shapes: A (r, in), B (out, r), and what multiplies after B."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class Dense(NamedTuple):
    """What the dense layer computed: output (T, out), weights (T, E), angles (T, E, pairs), logits, chosen sets."""

    output: Tensor
    weights: Tensor
    angles: Tensor | None
    logits: Tensor | None
    chosen: list[tuple[int, ...]] | None


def expert_outputs(x: Tensor, experts: Sequence[Expert]) -> list[Tensor]:
    """v_i = scaling_i * (x A_i^T) B_i^T, one (T, out) tensor per expert."""
    return [expert.scaling * ((x @ expert.lora_A.T) @ expert.lora_B.T) for expert in experts]


def scores_of_input(x: Tensor, theta: Tensor) -> Tensor:
    """Equation 1: logits = x theta^T with theta (E, in)."""
    return x @ theta.T


def scores_of_experts(outputs: Sequence[Tensor], theta: Tensor) -> Tensor:
    """Appendix B.2: logits = LayerNorm([v_1 .. v_n]) theta^T with theta (E, E * out), no affine part, eps 1e-8."""
    z = torch.cat(list(outputs), dim=-1)
    centred = z - z.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return (centred / torch.sqrt(variance + NORM_EPSILON)) @ theta.T


def choose(scores: Tensor, top_k: int) -> list[tuple[int, ...]]:
    """The k largest per token, ties to the lowest index; largest first."""
    rows = scores.detach().double().tolist()
    return [tuple(sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:top_k]) for row in rows]


def softmax_top_k(logits: Tensor, top_k: int, temperature: float, renormalize: str) -> tuple[Tensor, list]:
    """softmax(logits / temperature), all but the k largest set to 0, divided by their sum when renormalising."""
    chosen = choose(logits, top_k)
    scaled = torch.exp(logits / temperature - (logits / temperature).max(dim=-1, keepdim=True).values.detach())
    probabilities = scaled / scaled.sum(dim=-1, keepdim=True)
    kept = torch.zeros_like(probabilities)
    for token, members in enumerate(chosen):
        kept[token, list(members)] = 1.0
    weights = probabilities * kept
    if renormalize == "always" or (renormalize == "auto" and top_k > 1):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def largest_norms(outputs: Sequence[Tensor], top_k: int) -> tuple[Tensor, list]:
    """RotationGate: the k experts with the largest norm(v_i), each with weight 1/k."""
    norms = torch.stack([output.square().sum(dim=-1).sqrt() for output in outputs], dim=-1)
    chosen = choose(norms, top_k)
    weights = torch.zeros_like(norms)
    for token, members in enumerate(chosen):
        weights[token, list(members)] = 1.0 / top_k
    return weights.detach(), chosen


def plane_angles(v: Tensor, others: Tensor, P: Tensor, Q: Tensor, angle_norm: str) -> Tensor:
    """a = ((v * others) P) Q in radians, (T, out // 2); both factors divided by their RMS under `rms`."""
    if angle_norm == "rms":
        v = v / torch.sqrt((v * v).mean(dim=-1, keepdim=True) + NORM_EPSILON)
        others = others / torch.sqrt((others * others).mean(dim=-1, keepdim=True) + NORM_EPSILON)
    return ((v * others) @ P) @ Q


def rotation_matrix(angles: Tensor, out_features: int) -> Tensor:
    """Block diagonal R (out, out) for ONE token such that the row vector v R follows equations 17 and 18."""
    matrix = torch.eye(out_features, dtype=angles.dtype)
    for plane in range(out_features // 2):
        cosine, sine = torch.cos(angles[plane]), torch.sin(angles[plane])
        block = torch.zeros_like(matrix)
        even, odd = 2 * plane, 2 * plane + 1
        for row, column, value in (
            (even, even, cosine - 1),
            (odd, even, -sine),
            (even, odd, sine),
            (odd, odd, cosine - 1),
        ):
            unit = torch.zeros_like(matrix)
            unit[row, column] = 1.0
            block = block + value * unit
        matrix = matrix + block
    return matrix


def rotate_rows(v: Tensor, angles: Tensor) -> Tensor:
    """Each row of v (T, out) times its own rotation matrix."""
    return torch.stack([v[token] @ rotation_matrix(angles[token], v.shape[-1]) for token in range(v.shape[0])])


def mixture(outputs: Sequence[Tensor], weights: Tensor, P: Tensor | None, Q: Tensor | None, angle_norm: str) -> tuple:
    """sum_i g_i R_i v_i over ALL experts; the sum inside an angle runs over the list j != i, equal experts too."""
    mixed = torch.zeros_like(outputs[0])
    all_angles = []
    for i, v in enumerate(outputs):
        if P is not None and Q is not None:
            others = torch.zeros_like(v)
            for j, other in enumerate(outputs):
                if j != i:
                    others = others + other
            angles = plane_angles(v, others, P, Q, angle_norm)
            all_angles.append(angles)
            v = rotate_rows(v, angles)
        mixed = mixed + weights[:, i : i + 1] * v
    return mixed, torch.stack(all_angles, dim=1) if all_angles else None


def stretch_weights(
    x: Tensor,
    outputs: Sequence[Tensor],
    experts: Sequence[Expert],
    state: Mapping[str, Tensor],
    *,
    top_k: int = 2,
    scorer: str = "x",
    temperature: float | str = 1.0,
    renormalize: str = "auto",
    output_scale: float | str = 1.0,
) -> tuple[Tensor, Tensor, list]:
    """Softmax at a temperature, the k largest, renormalised or not, times a factor; both given or learned."""
    theta = state["gate.scorer.weight"]
    tau = torch.exp(state["gate.log_temperature"]) if temperature == "learned" else temperature
    factor = state["gate.output_scale_weight"] if output_scale == "learned" else output_scale
    logits = (scores_of_input(x, theta) if scorer == "x" else scores_of_experts(outputs, theta)) / tau
    weights, chosen = softmax_top_k(logits, top_k, 1.0, renormalize)
    return weights * factor, logits, chosen


def norm_weights(
    x: Tensor, outputs: Sequence[Tensor], experts: Sequence[Expert], state: Mapping[str, Tensor], *, top_k: int = 2
) -> tuple:
    """RotationGate: the k largest outputs, weight 1/k."""
    weights, chosen = largest_norms(outputs, top_k)
    return weights, None, chosen


def constant_weights(
    x: Tensor,
    outputs: Sequence[Tensor],
    experts: Sequence[Expert],
    state: Mapping[str, Tensor],
    *,
    fixed: Sequence[float] | None = None,
) -> tuple:
    """UniformGate, and gates whose weights the test knows."""
    weights = [1.0 / len(experts)] * len(experts) if fixed is None else fixed
    return torch.as_tensor(weights, dtype=x.dtype).expand(x.shape[0], len(experts)), None, None


# Gate name to the function of (x, outputs, experts, state, **options) that gives weights (T, E), logits, chosen sets.
WEIGHTS = {
    "StretchGate": stretch_weights,
    "RadarGate": stretch_weights,
    "RotationGate": norm_weights,
    "UniformGate": constant_weights,
    "FixedGate": constant_weights,
    "TaskGate": constant_weights,
}


def dense_layer(
    x: Tensor,
    experts: Sequence[Expert],
    state: Mapping[str, Tensor],
    *,
    gate: str,
    combine: str = "sum",
    angle_norm: str = "rms",
    **options: object,
) -> Dense:
    """The whole layer on x (T, in); `state` holds base_layer.*, gate.scorer.weight, gate.rotation.P and .Q."""
    outputs = expert_outputs(x, experts)
    weights, logits, chosen = WEIGHTS[gate](x, outputs, experts, state, **options)
    P, Q = state.get("gate.rotation.P"), state.get("gate.rotation.Q")
    if combine.startswith("gram_schmidt"):
        kept = [(row != 0).nonzero().flatten().tolist() for row in weights]
        outputs = gram_schmidt(outputs, kept, unit=combine.endswith("unit"))
    if combine == "separate":
        mixed, angles = separate_sum(x, experts, weights), None
    else:
        mixed, angles = mixture(outputs, weights, P, Q, angle_norm)
    output = x @ state["base_layer.weight"].T + mixed
    if "base_layer.bias" in state:
        output = output + state["base_layer.bias"]
    return Dense(output, weights, angles, logits, chosen)


def project_onto_hull(points: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact projection of target (d,) onto the convex hull of points (k, d): nearest point and its weights.

    Every face is tried: on the affine hull of a subset the projection is a least-squares problem with one equality, and
    the best of those with non-negative weights is the projection onto the hull.
    """
    count = points.shape[0]
    best, best_weights, best_distance = points[0], np.eye(count)[0], math.inf
    for size in range(1, count + 1):
        for members in itertools.combinations(range(count), size):
            origin, rest = points[members[0]], points[list(members[1:])]
            directions = (rest - origin).T
            solution = np.linalg.lstsq(directions, target - origin, rcond=None)[0] if size > 1 else np.zeros(0)
            weights = np.zeros(count)
            weights[list(members)] = np.concatenate([[1.0 - solution.sum()], solution])
            distance = float(np.linalg.norm(weights @ points - target))
            if weights.min() >= -1e-12 and distance < best_distance:
                best, best_weights, best_distance = weights @ points, weights, distance
    return best, best_weights


def distance_to_hull(points: np.ndarray, target: np.ndarray) -> float:
    """Euclidean distance of target (d,) from the convex hull of points (k, d)."""
    return float(np.linalg.norm(project_onto_hull(points, target)[0] - target))
