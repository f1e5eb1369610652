"""Prototypes of experts: the input direction each LoRA answers to most strongly (layer 1)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from radargate_pl.experts import ExpertBank
from radargate_pl.ops import gate_dtype


@torch.no_grad()
def leading_directions(bank: ExpertBank) -> tuple[Tensor, Tensor]:
    r"""Find the leading right singular vector and value of every expert's update, ``dW_i = s_i B_i A_i``.

    With the thin factorisations ``A^T = Q_A R_A`` and ``B = Q_B R_B``, ``dW = Q_B (s R_B R_A^T) Q_A^T``: the singular
    vectors of the rank-sized middle give those of ``dW`` exactly, and no ``out x in`` matrix exists. Computed in
    float64 on the CPU, whatever the experts' dtype and device.

    Args:
        bank: the experts of one layer, of any ranks.

    Returns:
        ``directions`` (E, in): unit vectors in the space of the layer input, signed so that the coordinate of largest
        magnitude is positive; zeros for an expert whose update is zero. ``strengths`` (E,): the largest singular
        values. Both float32 (float64 for float64 experts) on the experts' device.

    Source: Arrow, arXiv 2405.11157, section 4.1; the sign is ours (Arrow takes absolute values).
    """
    pairs = [_leading(*bank.expert_weights(name), scale) for name, scale in zip(bank.names, bank.scaling, strict=True)]
    weight, _ = bank.expert_weights(bank.names[0])
    directions, strengths = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    dtype, device = gate_dtype(weight.dtype), weight.device
    return directions.to(device, dtype), strengths.to(device, dtype)


def prototypes(bank: ExpertBank) -> Tensor:
    """Return every expert's prototype, the ``directions`` of `leading_directions`: (E, in), unit norm or zero."""
    return leading_directions(bank)[0]


def _leading(lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = lora_A.detach().double().cpu(), lora_B.detach().double().cpu()
    basis, right = torch.linalg.qr(lora_A.mT)  # (in, r), (r, r)
    left = torch.linalg.qr(lora_B).R
    _, values, vectors = torch.linalg.svd(abs(scaling) * left @ right.mT)
    # Rounding leaves a direction even where B A is exactly zero; it would be noise.
    negligible = 1e-14 * abs(scaling) * left.norm() * right.norm()
    if values[0] <= negligible:
        return torch.zeros_like(lora_A[0]), torch.zeros_like(values[0])
    direction = F.normalize(basis @ vectors[0], dim=0)
    return direction * direction[direction.abs().argmax()].sign(), values[0]
