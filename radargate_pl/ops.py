"""Pure mathematics of gates and rotations (layer 0: torch only, no modules).

Symbols of the paper (arXiv 2505.23184) and their names here: theta -> ``scorer.weight``, epsilon -> ``logits``, g ->
``weights``, tau -> ``temperature``, v_i -> expert output ``v``, S -> ``total``, a_i (theta_r U_i) -> ``angles`` in
radians. Shapes in comments: B batch, S sequence, E experts, K kept experts, r rank, in, out; ``...`` is any number of
token dimensions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

RMS_EPS = 1e-8
WIDEST_GRAM = 2048  # columns of stacked B whose Gram is made; in float64 it has 32 MB then
MOST_PASSES = 8  # largest top_k found one maximum after the other: as far as it was measured to pay


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype gate algebra runs in: float32, or float64 when the operands are float64.

    Example:
        >>> gate_dtype(torch.bfloat16)
        torch.float32
    """
    return torch.promote_types(dtype, torch.float32)


def rotate(v: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring coordinate pairs of a vector: the block-diagonal R_i(x) of the paper without a matrix.

    ``v'[2m] = v[2m] cos a[m] - v[2m+1] sin a[m]`` and ``v'[2m+1] = v[2m] sin a[m] + v[2m+1] cos a[m]``. For an odd
    number of coordinates the last one stays as it is.

    Args:
        v: vectors, (..., out), float32 or float64.
        angles: angles in radians, (..., out // 2), same dtype.

    Returns:
        Rotated vectors of the shape and norm of ``v``.

    Source: arXiv 2505.23184, eq. 17-18 (interleaved pairs).

    Example:
        >>> rotate(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([torch.pi / 2])).round(decimals=4) + 0.0
        tensor([0., 1., 5.])
    """
    paired = 2 * angles.shape[-1]
    even, odd = v[..., :paired:2], v[..., 1:paired:2]
    cos, sin = angles.cos(), angles.sin()
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return rotated if paired == v.shape[-1] else torch.cat((rotated, v[..., paired:]), dim=-1)


def rms_normalize(v: Tensor) -> Tensor:
    """Divide vectors by their root mean square: ``v / sqrt(mean(v^2) + 1e-8)``.

    Args:
        v: vectors, (..., out), float32 or float64.

    Returns:
        Vectors of the same shape whose gradient is finite at ``v = 0`` too.

    Example:
        >>> rms_normalize(torch.tensor([3.0, 4.0])).square().mean().round(decimals=4)
        tensor(1.)
    """
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + RMS_EPS)


def select_top_k(logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor | None]:
    """Keep the ``top_k`` most probable experts of every token: ``g = topk(softmax(logits))``.

    With ``renormalize`` the kept probabilities are divided by their sum, computed as the softmax of the kept logits
    (equal, and stable when the kept ones are small). Ties go to the lowest index: ``torch.topk`` breaks them
    arbitrarily.

    Args:
        logits: scores divided by the temperature, (..., E), float32 or float64.
        top_k: how many to keep; E or more keeps all.
        renormalize: whether the kept weights sum to one.

    Returns:
        ``weights`` (..., K) and ``indices`` (..., K) int64 in falling order; with all experts kept ``weights`` (..., E)
        in expert order and ``None``.

    Source: arXiv 2505.23184, eq. 1.

    Example:
        >>> select_top_k(torch.zeros(3), 2, renormalize=True)
        (tensor([0.5000, 0.5000]), tensor([0, 1]))
    """
    if top_k >= logits.shape[-1]:
        return logits.softmax(-1), None
    indices = largest(logits.detach(), top_k)
    if renormalize:
        is_compiled = torch.compiler.is_compiling() or is_transformed()  # which need plain operations
        kept = logits.gather(-1, indices) if is_compiled else _Gathered.apply(logits, indices)
        return kept.softmax(-1), indices
    return logits.softmax(-1).gather(-1, indices), indices


def is_transformed() -> bool:
    """Tell whether something follows torch's own operations alone: native code and hand-written backwards are hidden.

    That is torch.func (vmap, grad, jvp), forward-mode derivatives, torch.jit.trace and make_fx. Not inside a compiler.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


class _Gathered(torch.autograd.Function):
    """``logits.gather(-1, indices)`` for distinct indices of a row, without keeping the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = logits.shape
        return logits.gather(-1, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.shape).scatter(-1, ctx.saved_tensors[0], grad), None


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values in falling order, ties to the lowest index, as a stable sort gives them.

    A few passes for the maximum take a third of the time of ``torch.sort`` at 20 values a row, a tenth at 128.

    Args:
        values: (..., E), float; no gradient.
        count: how many, at most E.

    Returns:
        (..., count) int64.

    Example:
        >>> largest(torch.tensor([1.0, 3.0, 3.0, -torch.inf]), 4)
        tensor([1, 2, 0, 3])
    """
    if count > MOST_PASSES:
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    left = values.clamp_min(torch.finfo(values.dtype).min)  # -inf is what has been taken already
    found = []
    for _ in range(count):
        found.append(left.max(dim=-1, keepdim=True).indices)  # the first of several maxima
        left.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, dim=-1)


def dense_weights(weights: Tensor, indices: Tensor | None, num_experts: int) -> Tensor:
    """Spread kept weights over all experts, with 0 for those not chosen.

    Args:
        weights: (..., K), float.
        indices: (..., K) int64, or ``None`` when ``weights`` already covers every expert.
        num_experts: E.

    Returns:
        (..., E), the dtype of ``weights``.

    Example:
        >>> dense_weights(torch.tensor([0.7, 0.3]), torch.tensor([2, 0]), 3)
        tensor([0.3000, 0.0000, 0.7000])
    """
    if indices is None:
        return weights
    return weights.new_zeros((*weights.shape[:-1], num_experts)).scatter(-1, indices, weights)


def gram_map(stacked: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``x -> x S^T S``; of wide S without the square matrix, which at 1,000 experts of rank 8 is 512 MB.

    Args:
        stacked: S, (out, E * r).

    Example:
        >>> gram_map(torch.tensor([[1.0, 2.0]]))(torch.tensor([[1.0, 0.0]]))
        tensor([[1., 2.]])
    """
    if stacked.shape[1] > WIDEST_GRAM:
        return lambda x: (x @ stacked.mT) @ stacked
    gram = stacked.mT @ stacked
    return lambda x: x @ gram


def pack_latents(latents: Tensor, coefficients: Tensor) -> Tensor:
    """Multiply every expert's latents by its coefficient and lay them side by side: ``(c_1 h_1, ..., c_E h_E)``.

    Args:
        latents: (..., E, r), the experts' dtype.
        coefficients: (..., E), float32 or float64.

    Returns:
        (..., E * r) in the dtype of ``latents``: the left operand of one GEMM with the stacked ``lora_B``.

    Example:
        >>> pack_latents(torch.ones(2, 2), torch.tensor([1.0, 3.0]))
        tensor([1., 1., 3., 3.])
    """
    return (latents * coefficients.unsqueeze(-1)).to(latents.dtype).flatten(-2)


def routing_entropy(weights: Tensor) -> Tensor:
    """Entropy of each token's weights in nats: ``-sum_i p_i log p_i`` with ``p = w / sum w``.

    Args:
        weights: non-negative weights, (..., K).

    Returns:
        (...), same dtype; 0 for one expert, log K for equal ones.

    Example:
        >>> routing_entropy(torch.tensor([0.5, 0.5, 0.0])).round(decimals=4)
        tensor(0.6931)
    """
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    kept = torch.where(shares > 0, shares, 1)  # entropy 0 too, but with a finite gradient
    return torch.special.entr(kept).sum(-1)


def one_hot_like(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Return one-hot rows for expert indices: (...) int64 to (..., E) of ``dtype``.

    Example:
        >>> one_hot_like(torch.tensor([1]), 3, torch.float32)
        tensor([[0., 1., 0.]])
    """
    if is_transformed():  # torch's own looks at the numbers, which vmap does not have
        return (indices.unsqueeze(-1) == torch.arange(num_experts, device=indices.device)).to(dtype)
    return F.one_hot(indices, num_experts).to(dtype)
