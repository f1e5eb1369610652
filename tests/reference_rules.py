"""Slow dense oracles of the rules without training: Arrow, fixed compositions, `separate` merging.

Nothing here is imported from `radargate_pl`; every update is a full matrix, every token is looked at by itself.

Source: arXiv 2405.11157 (Arrow), the code of microsoft/mttl for its variants, arXiv 2306.14870 (PEMs), arXiv 2307.13269
(LoraHub).
"""

from __future__ import annotations

import torch
from reference import Expert
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
