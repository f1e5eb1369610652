"""The fast mixture under a rotation as operators that `torch.compile` can place in a graph (layer 2).

The same code as in eager mode, `expert_sources` and `fast_rotation`, in native code on a CPU: the compiler sees latents
or the layer input go in and the mixture come out. The rows of A and B stay as they are stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from radargate_pl.expert_sources import InputSource, LatentSource, StackedExperts
from radargate_pl.fast_rotation import KeptExperts, turned_sum, turned_sum_gradients
from radargate_pl.ops import gate_dtype


def _computed(B: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(gate_dtype(B.dtype), weights.dtype)


def _side(A: Tensor, B: Tensor, W_sum: Tensor | None, scaling: Sequence[float], weights: Tensor) -> LatentSource:
    experts = StackedExperts(A, B, tuple(scaling), B.new_tensor(scaling, dtype=_computed(B, weights)))
    return LatentSource(experts, True) if W_sum is None else InputSource(experts, True, lambda: W_sum)


@torch.library.custom_op("radargate::turned_mixture", mutates_args=(), device_types="cpu")
def turned_mixture(
    source: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    A: Tensor,
    B: Tensor,
    W_sum: Tensor | None,
    P: Tensor,
    Q: Tensor,
    scaling: Sequence[float],
    is_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix the rotated outputs of the kept experts: (T, out).

    Also returns, without gradients, what the backward pass needs: ``S``, (T, out), and kept latents, (T, K, r).

    Args:
        source: latents of all experts, (T, E, r), or with ``W_sum`` the layer input, (T, in).
        weights: of the kept ones, (T, K).
        indices: which they are, (T, K) int64; ``None``: all, in order.
        A: stacked (E * r, in).
        B: stacked (E * r, out).
        W_sum: see `expert_sources.folded`.
        P: (out, r_a).
        Q: (r_a, out // 2).
        scaling: of each expert.
        is_normed: whether angles are scale-free.

    Source: arXiv 2505.23184, eq. 4-8.
    """
    with torch.autocast("cpu", enabled=False):
        side = _side(A, B, W_sum, scaling, weights)
        total, latents = side.total(source), side.kept(source, indices)
        return turned_sum(KeptExperts(total, latents, weights, indices, side.B), P, Q, is_normed), total, latents


@torch.library.custom_op("radargate::turned_mixture_gradients", mutates_args=(), device_types="cpu")
def turned_mixture_gradients(
    grad: Tensor,
    total: Tensor,
    latents: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    A: Tensor,
    B: Tensor,
    W_sum: Tensor | None,
    P: Tensor,
    Q: Tensor,
    scaling: Sequence[float],
    is_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of source, weights, P and Q for that of the mixture; that of the source in its dtype.

    Args:
        grad: (T, out).
        total: as `turned_mixture` returned it.
        latents: as `turned_mixture` returned them.
        weights: see there, like all the others.
        indices: see there.
        A: see there.
        B: see there.
        W_sum: see there.
        P: see there.
        Q: see there.
        scaling: see there.
        is_normed: see there.
    """
    with torch.autocast("cpu", enabled=False):
        side = _side(A, B, W_sum, scaling, weights)
        found = turned_sum_gradients(KeptExperts(total, latents, weights, indices, side.B), P, Q, is_normed, grad)
        return side.gradient(indices, found.total, found.latents), found.weights, found.P, found.Q


@turned_mixture.register_fake
def _(
    source: Tensor, weights: Tensor, indices: Tensor | None, A: Tensor, B: Tensor, W_sum: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, scaling, _ = rest
    shapes = (B.shape[1],), (B.shape[1],), (weights.shape[1], B.shape[0] // len(scaling))
    return tuple(weights.new_empty((weights.shape[0], *shape), dtype=_computed(B, weights)) for shape in shapes)


@turned_mixture_gradients.register_fake
def _(grad: Tensor, total: Tensor, latents: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, A, _, W_sum, P, Q, scaling, _ = rest
    width = (len(scaling), latents.shape[2]) if W_sum is None else (A.shape[1],)
    return (
        total.new_empty((total.shape[0], *width)),
        *(tensor.new_empty(tensor.shape) for tensor in (weights, P, Q)),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source, weights, indices, A, B, W_sum, P, Q, ctx.scaling, ctx.is_normed = inputs
    _, total, latents = output
    ctx.dtype = source.dtype
    ctx.mark_non_differentiable(total, latents)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, latents, weights, indices, A, B, W_sum, P, Q)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    found = turned_mixture_gradients(grad, *ctx.saved_tensors, ctx.scaling, ctx.is_normed)
    of_source, of_weights, of_P, of_Q = found
    return of_source.to(ctx.dtype), of_weights, None, None, None, None, of_P, of_Q, None, None


turned_mixture.register_autograd(_backward, setup_context=_keep)
