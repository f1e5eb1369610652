"""Slow dense oracles of the rules without training: Arrow, fixed compositions, `separate` merging.

Nothing here is imported from `radargate_pl`; every update is a full matrix, every token is looked at by itself.

Source: arXiv 2405.11157 (Arrow), the code of microsoft/mttl for its variants, arXiv 2306.14870 (PEMs), arXiv 2307.13269
(LoraHub).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from reference import Expert, choose
from torch import Tensor


def dense_update(expert: Expert) -> Tensor:
    """The update as PEFT adds it to the weight: dW = s B A, (out, in)."""
    return expert.scaling * (expert.lora_B @ expert.lora_A)


def dense_prototype(expert: Expert) -> tuple[Tensor, Tensor]:
    """Leading right singular vector (in,) and value of the dense update, from its full SVD; zeros for a zero update."""
    update = dense_update(expert).double()
    if not update.abs().max() > 1e-13 * expert.lora_A.abs().max() * expert.lora_B.abs().max():
        return torch.zeros_like(update[0]), torch.zeros_like(update[0, 0])
    _, values, vectors = torch.linalg.svd(update, full_matrices=False)
    direction = vectors[0]
    largest = max(range(direction.shape[0]), key=lambda i: abs(float(direction[i])))
    return direction * (1.0 if direction[largest] > 0 else -1.0), values[0]


def arrow_weights(
    x: Tensor,
    outputs: Sequence[Tensor],
    experts: Sequence[Expert],
    state: Mapping[str, Tensor],
    *,
    top_k: int = 3,
    temperature: float | str = 1.0,
    norm_input: bool = False,
    scale: bool = False,
) -> tuple:
    """ArrowGate, token by token: |x . p_i|, the k largest, softmax over those; (weights (T, E), logits, chosen)."""
    prototypes = []
    for expert in experts:
        direction, value = dense_prototype(expert)
        prototypes.append(direction * value**2 if scale else direction)
    tau = math.sqrt(x.shape[-1]) if temperature == "sqrt_in" else float(temperature)
    rows = []
    for token in x:
        if norm_input:
            token = token / torch.sqrt((token * token).sum() + 1e-12)
        rows.append(torch.stack([(token @ prototype).abs() / tau for prototype in prototypes]))
    logits = torch.stack(rows)
    chosen = choose(logits, top_k)
    weights = torch.zeros_like(logits)
    for token, members in enumerate(chosen):
        kept = [torch.exp(logits[token, i] - logits[token, list(members)].max().detach()) for i in members]
        for i, value in zip(members, kept, strict=True):
            weights = weights.index_put((torch.tensor(token), torch.tensor(i)), value / sum(kept))
    return weights, logits, chosen


def merged_apart(experts: Sequence[Expert], weights: Sequence[float], sign_of_A: bool = True) -> Tensor:
    """(sum_j w_j sqrt(s_j) B_j) (sum_i w_i sqrt(s_i) A_i), (out, in); |w_i| before A_i unless `sign_of_A`."""
    lora_A = sum((w if sign_of_A else abs(w)) * math.sqrt(e.scaling) * e.lora_A for w, e in _pairs(experts, weights))
    lora_B = sum(w * math.sqrt(e.scaling) * e.lora_B for w, e in _pairs(experts, weights))
    return lora_B @ lora_A


def merged_updates(experts: Sequence[Expert], weights: Sequence[float]) -> Tensor:
    """sum_i w_i s_i B_i A_i, (out, in)."""
    return sum(w * dense_update(e) for w, e in _pairs(experts, weights))


def _pairs(experts: Sequence[Expert], weights: Sequence[float]) -> list[tuple[float, Expert]]:
    return list(zip(weights, experts, strict=True))
