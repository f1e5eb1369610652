"""The sum of rotated experts and its gradients, by native code (layer 1).

``sum_j g_j R_j v_j`` over the kept experts of every token, with ``v_j = h_j B_j`` turned by ``a = c ((v_j * w) P) Q``,
``w = S - v_j`` and ``c = 1 / (rms(v_j) rms(w))``, or 1 without norm. Symbols: T tokens, K kept experts, E experts, r
rank, r_a rotation rank. Everything but indices and B has one dtype, float32 or float64.

Source: arXiv 2505.23184, eq. 4-8, 17-18; gradient eq. 38-39.
"""

import torch
from torch import Tensor

from radargate_pl.native.functions import address, experts_of, native_function, operand
from radargate_pl.ops import RMS_EPS


def turned_sum(
    total: Tensor,
    latents: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    is_normed: bool,
) -> Tensor:
    """Mix the rotated outputs of the kept experts, (T, out).

    Args:
        total: ``S``, (T, out).
        latents: scaled latents of the kept experts, (T, K, r).
        weights: their weights, (T, K).
        indices: which they are, (T, K) int64; ``None``: expert j in place j.
        B: stacked (E * r, out), in the dtype of all else, or bfloat16 for float32.
        P: (out, r_a).
        Q: (r_a, out // 2).
        is_normed: whether angles are scale-free.

    Raises:
        RuntimeError: for dtypes and shapes that do not go together.
        IndexError: for an expert that is none.
    """
    mixed = torch.empty_like(total, memory_format=torch.contiguous_format)
    _call("turned_sum", total, latents, weights, indices, B, P, Q, is_normed, others=(mixed,))
    return mixed


def turned_sum_gradients(
    grad: Tensor,
    total: Tensor,
    latents: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    is_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``total``, ``latents``, ``weights``, ``P`` and ``Q`` for that of the mixture.

    Args:
        grad: (T, out); the others, and what is raised, as in `turned_sum`.
        total: see there.
        latents: see there.
        weights: see there.
        indices: see there.
        B: see there.
        P: see there.
        Q: see there.
        is_normed: see there.
    """
    grad = operand("the gradient", grad, total.dtype, total.shape)
    like = (total, latents, weights, P.mT, Q)
    found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like]
    _call("turned_sum_gradients", total, latents, weights, indices, B, P, Q, is_normed, others=(grad, *found))
    of_total, of_latents, of_weights, of_P, of_Q = found
    return of_total, of_latents, of_weights, of_P.mT.contiguous(), of_Q


def _call(
    name: str,
    total: Tensor,
    latents: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    is_normed: bool,
    others: tuple[Tensor, ...],
) -> None:
    (tokens, kept, rank), (_, out), turns, dtype = latents.shape, total.shape, P.shape[1], total.dtype
    experts = kept if indices is None else len(B) // rank
    operands = [
        operand("the sum of all outputs", total, dtype, (tokens, out)),
        operand("latents", latents, dtype, (tokens, kept, rank)),
        operand("weights", weights, dtype, (tokens, kept)),
        None if indices is None else experts_of(indices, (tokens, kept), experts),
        operand("B", B, B.dtype, (experts * rank, out)),
        operand("P", P.mT, dtype, (turns, out)),
        operand("Q", Q, dtype, (turns, out // 2)),
    ]
    places = map(address, (*operands, *others))
    function = native_function(name, dtype, B.dtype)
    function(tokens, kept, rank, out, turns, is_normed, RMS_EPS, *places, torch.get_num_threads())
