"""The mixture as the equations stand: every expert's output of every token, written without `radargate_pl`."""

import torch
from torch import Tensor, nn


class DenseMixture(nn.Module):
    """``y = x W + sum_i g_i rotate(v_i, a_i)`` with all n outputs of all tokens in memory.

    Scores come from the input, the k largest weights are kept and divided by their sum, angles are scale-free
    (``angle_norm: rms``). Gate algebra in float32.

    Args:
        linear: the frozen linear layer.
        lora_A: (n, r, in).
        lora_B: (n, out, r).
        scaling: factor behind B.
        top_k: experts kept.
        rotation_rank: rank of the angle matrix.

    Source: arXiv 2505.23184, eq. 1, 4-8 and 17-18.
    """

    def __init__(
        self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float, top_k: int = 2, rotation_rank: int = 8
    ) -> None:
        super().__init__()
        self.linear, self.scaling, self.top_k = linear, scaling, top_k
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(lora_B, requires_grad=False)
        count, out, width = len(lora_A), linear.out_features, linear.in_features
        like = {"device": lora_A.device, "dtype": torch.float32}
        self.theta = nn.Parameter(torch.empty(count, width, **like).uniform_(-(width**-0.5), width**-0.5))
        self.P = nn.Parameter(torch.empty(out, rotation_rank, **like).uniform_(-(out**-0.5), out**-0.5))
        self.Q = nn.Parameter(torch.randn(rotation_rank, out // 2, **like) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., in) to (..., out)."""
        y = self.linear(x)
        v = torch.einsum("...i,eri,eor->...eo", x, self.lora_A, self.lora_B).float() * self.scaling
        probabilities = (x.float() @ self.theta.mT).softmax(-1)
        kept, indices = probabilities.topk(self.top_k, dim=-1)
        kept = kept / kept.sum(-1, keepdim=True) if self.top_k > 1 else kept
        weights = torch.zeros_like(probabilities).scatter(-1, indices, kept)
        others = v.sum(-2, keepdim=True) - v
        angles = (_normed(v) * _normed(others)) @ self.P @ self.Q
        even, odd, cos, sin = v[..., ::2], v[..., 1::2], angles.cos(), angles.sin()
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        return y + (weights.unsqueeze(-1) * rotated).sum(-2).to(y.dtype)


def _normed(v: Tensor) -> Tensor:
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-8)


def put_naive(model: nn.Module, targets: list[str], count: int, rank: int, scaling: float, seed: int) -> None:
    """Replace the linear layers of these names by dense mixtures of random experts, in place."""
    generator = torch.Generator().manual_seed(seed)
    found = [(p, m) for p, m in model.named_modules() if p.rpartition(".")[2] in targets and isinstance(m, nn.Linear)]
    for path, linear in found:
        model.set_submodule(path, naive_layer(linear, count, rank, scaling, generator))


def naive_layer(
    linear: nn.Linear, count: int, rank: int, scaling: float, generator: torch.Generator, top_k: int = 2
) -> DenseMixture:
    """A dense mixture of random experts beside a linear layer, in its dtype."""
    lora_A = torch.randn(count, rank, linear.in_features, generator=generator) / linear.in_features**0.5
    lora_B = torch.randn(count, linear.out_features, rank, generator=generator) * 0.01
    return DenseMixture(linear, lora_A.to(linear.weight), lora_B.to(linear.weight), scaling, min(top_k, count))


def bytes_of_naive(model: nn.Module, targets: list[str], count: int, tokens: int) -> int:
    """Estimate what a forward of dense mixtures keeps for its backward pass.

    Six (tokens, n, out) float32 tensors a layer: outputs, their products, two normed ones, rotated ones and angles.
    """
    layers = [m for p, m in model.named_modules() if p.rpartition(".")[2] in targets and isinstance(m, nn.Linear)]
    return sum(6 * tokens * count * layer.out_features * torch.float32.itemsize for layer in layers)


def loss_of_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A scalar whose gradient is not the same for all outputs."""
    return (layer(x).float() - 1).square().mean()
