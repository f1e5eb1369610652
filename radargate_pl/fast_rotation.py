"""The sum of the kept experts' rotated outputs inside the fast mixture, made twice and kept never (layer 1).

In native code where its operands allow it, else in torch's operations, to the same results.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from radargate_pl.gathered_rows import GatheredRows
from radargate_pl.native import turned_sum as native
from radargate_pl.ops import RMS_EPS
from radargate_pl.rotation_function import complex_planes, skinny, turn_planes


class KeptExperts(NamedTuple):
    """The kept experts of every token, and the sum that they rotate against.

    Attributes:
        total: ``S``, (T, out).
        latents: their scaled latents, (T, K, r).
        weights: (T, K).
        indices: which they are, (T, K) int64; ``None``: all, in order.
        B: rows of their B.
    """

    total: Tensor
    latents: Tensor
    weights: Tensor
    indices: Tensor | None
    B: GatheredRows

    def slots(self) -> Iterator[tuple[Tensor, GatheredRows, Tensor | None]]:
        """The kept outputs one after the other: ``v_j`` (T, out), where its rows are, and which, (T, 1)."""
        for slot in range(self.weights.shape[1]):
            own = None if self.indices is None else self.indices[:, slot : slot + 1]
            rows = self.B.only(slot) if own is None else self.B
            yield rows.sums(self.latents[:, slot : slot + 1], own), rows, own


class Gradients(NamedTuple):
    """Of what a mixture was made from: shaped like that."""

    total: Tensor
    latents: Tensor
    weights: Tensor
    P: Tensor
    Q: Tensor


def turned_sum(kept: KeptExperts, P: Tensor, Q: Tensor, is_normed: bool) -> Tensor:
    """Mix the rotated outputs, ``sum_j g_j R_j v_j``: (T, out).

    Args:
        kept: the kept experts.
        P: (out, r_a).
        Q: (r_a, out // 2).
        is_normed: whether angles are scale-free.

    Source: arXiv 2505.23184, eq. 4-8.
    """
    total, latents, weights, indices, B = kept
    if B.is_native:
        return native.turned_sum(total, latents, weights, indices, B.matrix, P, Q, is_normed)
    mixed = torch.zeros_like(total)
    for slot, (v, _, _) in enumerate(kept.slots()):
        mixed.addcmul_(Turn(v, total, P, Q, is_normed).rotated(), weights[:, slot : slot + 1])
    return mixed


def turned_sum_gradients(kept: KeptExperts, P: Tensor, Q: Tensor, is_normed: bool, grad: Tensor) -> Gradients:
    """Return the gradients of all of it for that of the mixture (T, out); arguments as for `turned_sum`."""
    total, latents, weights, indices, B = kept
    if B.is_native:
        return Gradients(
            *native.turned_sum_gradients(grad, total, latents, weights, indices, B.matrix, P, Q, is_normed)
        )
    sums = Gradients(*map(torch.zeros_like, (total, latents, weights, P, Q)))
    share = torch.zeros_like(weights[:, :1])  # of the gradient of S, what is a multiple of S
    for slot, (v, rows, own) in enumerate(kept.slots()):
        turn = Turn(v, total, P, Q, is_normed)
        of_v = turn.add_gradients(grad, weights[:, slot : slot + 1], slot, sums, share)
        sums.latents[:, slot] = rows.dots(of_v, own).squeeze(1)
    sums.total.addcmul_(total, share)
    return sums


class Turn:
    """The rotation of one kept output of every token, ``a = c ((v * w) P) Q`` with ``w = S - v``.

    ``c = 1 / (rms(v) rms(w))``, or 1 without norm, is applied behind P, where a row has ``rank`` numbers. The same
    mathematics as `rotations.RadarRotation`; gradient: arXiv 2505.23184, eq. 38-39.
    """

    def __init__(self, v: Tensor, total: Tensor, P: Tensor, Q: Tensor, is_normed: bool) -> None:
        self.v, self.P, self.Q = v, P, Q
        self.others = total - v
        self.product = v * self.others
        self.raw = skinny(self.product, P)
        self.inverse = (_inverse_rms(v), _inverse_rms(self.others)) if is_normed else None
        self.z = self.raw if self.inverse is None else self.raw * (self.inverse[0] * self.inverse[1])
        self.planes = Q.shape[1]

    def rotated(self) -> Tensor:
        """``v`` turned by its angles."""
        angles = self.z @ self.Q
        return turn_planes(self.v, torch.complex(angles.cos(), angles.sin()))

    def add_gradients(self, grad: Tensor, weight: Tensor, slot: int, sums: Gradients, share: Tensor) -> Tensor:
        """Return the gradient of ``v`` for that of the mixture, and add the other ones up; uses itself up.

        With the angles' pull on ``v * w``, ``D = grad_raw P^T``, and the norms' on v and w, ``alpha v`` and ``beta w``:
        ``dS = D v + beta w`` and ``dv = g R^T G + D w + alpha v - dS``. Written with ``F = D - beta`` both need fewer
        passes over tensors of (T, out): ``dS = F v + beta S``, ``dv = g R^T G + F (w - v) + (alpha - beta) v``.
        """
        v, others = self.v, self.others
        angles = -self.z @ self.Q
        back = turn_planes(grad, torch.complex(angles.cos(), angles.sin()))  # R^T G
        # Plane by plane: dL/da = v[2m] back[2m+1] - v[2m+1] back[2m].
        products = complex_planes(v, self.planes).conj() * complex_planes(back, self.planes)
        of_angles = products.imag.contiguous()
        unpaired = (v[:, 2 * self.planes :] * back[:, 2 * self.planes :]).sum(-1)
        sums.weights[:, slot] = products.real.sum(-1) + unpaired  # <v, back>
        of_z = skinny(of_angles, self.Q.mT) * weight
        sums.Q.addmm_((self.z * weight).mT, of_angles)
        if self.inverse is None:
            of_raw, alpha_beta = of_z, None
            F_ = of_raw @ self.P.mT
        else:
            inverse_v, inverse_others = self.inverse
            of_raw = of_z * (inverse_v * inverse_others)
            # d rms(v)^-1 / d v = -rms(v)^-3 v / out, for v and for the others alike.
            pull = (of_z * self.raw).sum(-1, keepdim=True) / -v.shape[-1]
            alpha, beta = pull * inverse_others * inverse_v**3, pull * inverse_v * inverse_others**3
            F_, alpha_beta = torch.addmm(-beta, of_raw, self.P.mT), alpha - beta
            share.add_(beta)
        sums.P.add_((of_raw.mT @ self.product).mT)
        sums.total.addcmul_(F_, v)
        of_v = back.mul_(weight).addcmul_(F_, others.sub_(v))
        return of_v if alpha_beta is None else of_v.addcmul_(v, alpha_beta)


def _inverse_rms(v: Tensor) -> Tensor:
    return torch.rsqrt(torch.linalg.vector_norm(v, dim=-1, keepdim=True).square() / v.shape[-1] + RMS_EPS)
