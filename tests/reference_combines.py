"""OMoE's Gram-Schmidt and the separate sum, token by token and expert by expert; imports nothing of the package.

Source: gates.md's readings of arXiv 2501.10062 / MOORE (Gram-Schmidt in the order of the experts) and of LoraHub, PEMs
and mttl's Arrow (A and B summed apart).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gram_schmidt(outputs: Sequence[Tensor], kept: Sequence[Sequence[int]], unit: bool) -> list[Tensor]:
    """Outputs (T, out) of every expert with the kept ones of each token made orthogonal, in expert order.

    The Gram with e = 1e-6 tr(K) / k + 1e-12 on its diagonal is that of vectors with k more coordinates, sqrt(e) in one
    of them: those are made orthogonal, and the extra coordinates dropped.
    """
    rows = [list(output.unbind(0)) for output in outputs]
    for token, members in enumerate(kept):
        chosen = torch.stack([rows[expert][token] for expert in sorted(members)])
        jitter = 1e-6 * chosen.square().sum() / len(members) + 1e-12
        extended = torch.cat([chosen, jitter.sqrt() * torch.eye(len(members), dtype=chosen.dtype)], dim=-1)
        basis: list[Tensor] = []
        for vector in extended:
            for earlier in basis:
                vector = vector - (vector @ earlier) / (earlier @ earlier) * earlier
            basis.append(vector)
        for expert, vector in zip(sorted(members), basis, strict=True):
            rows[expert][token] = (vector / vector.norm() if unit else vector)[: chosen.shape[-1]]
    return [torch.stack(row) for row in rows]


def separate_sum(x: Tensor, experts: Sequence, weights: Tensor) -> Tensor:
    """(sum_i w_i sqrt(s_i) A_i) and (sum_j w_j sqrt(s_j) B_j), merged for each token and multiplied."""
    rows = []
    for token in range(x.shape[0]):
        lora_A = sum(w * e.scaling**0.5 * e.lora_A for w, e in zip(weights[token], experts, strict=True))
        lora_B = sum(w * e.scaling**0.5 * e.lora_B for w, e in zip(weights[token], experts, strict=True))
        rows.append((x[token] @ lora_A.T) @ lora_B.T)
    return torch.stack(rows)
