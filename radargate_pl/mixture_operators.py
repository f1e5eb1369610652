"""The fast mixture under a rotation as operators that `torch.compile` can place in a graph (layer 2).

The same code as in eager mode, `expert_sources` and `fast_rotation`, in native code on a CPU: the compiler sees latents
go in and the mixture come out. The rows of B stay as they are stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from radargate_pl.expert_sources import LatentSource
from radargate_pl.fast_rotation import KeptExperts, turned_sum, turned_sum_gradients
from radargate_pl.ops import gate_dtype


def _source(B: Tensor, scaling: Sequence[float], weights: Tensor) -> LatentSource:
    dtype = torch.promote_types(gate_dtype(B.dtype), weights.dtype)
    return LatentSource(B, tuple(scaling), B.new_tensor(scaling, dtype=dtype), True)


@torch.library.custom_op("radargate::turned_mixture", mutates_args=(), device_types="cpu")
def turned_mixture(
    latents: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    scaling: Sequence[float],
    is_normed: bool,
) -> tuple[Tensor, Tensor]:
    """Mix the rotated outputs of the kept experts, (T, out), and return ``S``, (T, out), which has no gradient.

    Args:
        latents: of all experts, (T, E, r).
        weights: of the kept ones, (T, K).
        indices: which they are, (T, K) int64; ``None``: all, in order.
        B: stacked (E * r, out).
        P: (out, r_a).
        Q: (r_a, out // 2).
        scaling: of each expert.
        is_normed: whether angles are scale-free.

    Source: arXiv 2505.23184, eq. 4-8.
    """
    side = _source(B, scaling, weights)
    total = side.total(latents)
    return turned_sum(KeptExperts(total, side.kept(latents, indices), weights, indices, side.B), P, Q, is_normed), total


@torch.library.custom_op("radargate::turned_mixture_gradients", mutates_args=(), device_types="cpu")
def turned_mixture_gradients(
    grad: Tensor,
    latents: Tensor,
    total: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    scaling: Sequence[float],
    is_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of latents, weights, P and Q for that of the mixture (T, out).

    Args:
        grad: (T, out).
        latents: as for `turned_mixture`, like all the others.
        total: ``S``, as it was returned.
        weights: see there.
        indices: see there.
        B: see there.
        P: see there.
        Q: see there.
        scaling: see there.
        is_normed: see there.
    """
    side = _source(B, scaling, weights)
    kept = KeptExperts(total, side.kept(latents, indices), weights, indices, side.B)
    found = turned_sum_gradients(kept, P, Q, is_normed, grad)
    of_latents = side.gradient(indices, found.total, found.latents).to(latents.dtype)
    return of_latents, found.weights, found.P, found.Q


@turned_mixture.register_fake
def _(latents: Tensor, weights: Tensor, indices: Tensor | None, B: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (latents.shape[0], B.shape[1])
    dtype = torch.promote_types(gate_dtype(B.dtype), weights.dtype)
    return latents.new_empty(shape, dtype=dtype), latents.new_empty(shape, dtype=dtype)


@turned_mixture_gradients.register_fake
def _(
    grad: Tensor, latents: Tensor, total: Tensor, weights: Tensor, indices: Tensor | None, B: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    P, Q, _, _ = rest
    return tuple(tensor.new_empty(tensor.shape) for tensor in (latents, weights, P, Q))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    latents, weights, indices, B, P, Q, ctx.scaling, ctx.is_normed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(latents, output[1], weights, indices, B, P, Q)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = turned_mixture_gradients(grad, *ctx.saved_tensors, ctx.scaling, ctx.is_normed)
    of_latents, of_weights, of_P, of_Q = found
    return of_latents, of_weights, None, None, of_P, of_Q, None, None


turned_mixture.register_autograd(_backward, setup_context=_keep)
