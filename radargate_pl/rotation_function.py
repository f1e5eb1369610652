"""The rotation of one slot with its backward pass by hand (layer 1).

Written out, forward and backward read and write the (tokens, out) tensors a third as often as autograd would, and a
training step is bound by exactly those passes, not by its products. `RadarRotation.angles` and `ops.rotate` state the
formulas in plain operations; tests compare the two in float64.
"""

import math
from typing import Any

import torch
from torch import Tensor

from radargate_pl.ops import RMS_EPS


class RadarRotationFunction(torch.autograd.Function):
    """``rotate(v, a)`` with ``a = c ((v * w) P) Q``, ``w = S - v`` and ``c = 1 / (rms(v) rms(w))``, or 1 without norm.

    The row factor ``c`` is applied behind P, where a row has ``rank`` numbers instead of ``out``. Inputs: v and S
    (..., out), P (out, rank), Q (rank, out // 2), all float32 or all float64, and whether angles are scale-free.
    Without Q (``None``) P is the whole angle matrix, (out, out // 2). With ``columns`` (..., rank), bool, each token
    uses only its own columns of P and rows of Q: the factors of several experts side by side. With ``bound`` angles are
    ``bound tanh(a / bound)``. Outputs: the rotated v and the angles in radians, (..., out // 2), the latter without
    gradient.

    Source: arXiv 2505.23184, eq. 4-8, 17-18; gradient eq. 38-39.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        total: Tensor,
        P: Tensor,
        Q: Tensor | None,
        is_normed: bool,
        columns: Tensor | None = None,
        bound: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate; keeps what the backward pass reads."""
        shape = v.shape
        tokens = math.prod(shape[:-1])
        v, total = v.reshape(tokens, shape[-1]), total.reshape(tokens, shape[-1])
        others = total - v
        raw = skinny(v * others, P) if Q is not None else (v * others) @ P
        if columns is not None:
            columns = columns.reshape(tokens, -1)
            raw = raw * columns
        inverse = [_inverse_rms(v), _inverse_rms(others)] if is_normed else []
        z = raw * (inverse[0] * inverse[1]) if is_normed else raw
        angles = z if Q is None else z @ Q
        slope = None  # of the bound
        if bound is not None:
            share = (angles / bound).tanh()
            angles, slope = bound * share, 1 - share.square()
        turn = torch.complex(angles.cos(), angles.sin())
        ctx.save_for_backward(v, others, P, Q, columns, slope, raw, z, turn, *inverse)
        angles = angles.view(*shape[:-1], turn.shape[1])
        ctx.mark_non_differentiable(angles)
        return turn_planes(v, turn).view(shape), angles

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of v, S, P and Q.

        Raises:
            RuntimeError: under ``create_graph=True``. torch's ``once_differentiable`` lets a constant incoming gradient
                pass, and the second derivative would then silently lack the rotation.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("The rotation of RadarGate and RotationGate cannot be differentiated twice.")
        v, others, P, Q, columns, slope, raw, z, turn, *inverse = ctx.saved_tensors
        shape = grad.shape
        grad_v = turn_planes(grad.reshape(v.shape), turn.conj())
        # With G turned back to G', plane by plane: dL/da = v[2m] G'[2m+1] - v[2m+1] G'[2m].
        planes = turn.shape[-1]
        grad_angles = (complex_planes(v, planes).conj() * complex_planes(grad_v, planes)).imag.contiguous()
        if slope is not None:
            grad_angles *= slope
        grad_z, grad_Q = (grad_angles, None) if Q is None else (skinny(grad_angles, Q.mT), z.mT @ grad_angles)
        if columns is not None:
            grad_z = grad_z * columns
        grad_raw = grad_z * (inverse[0] * inverse[1]) if inverse else grad_z
        grad_product = grad_raw @ P.mT  # of v * others
        grad_total = grad_product * v
        grad_v.addcmul_(grad_product, others)
        if inverse:
            # d rms(v)^-1 / d v = -rms(v)^-3 v / out, for v and for the others alike.
            pull = (grad_z * raw).sum(-1, keepdim=True) / -v.shape[-1]
            inverse_v, inverse_others = inverse
            grad_v.addcmul_(pull * inverse_others * inverse_v**3, v)
            grad_total.addcmul_(pull * inverse_v * inverse_others**3, others)
        grad_v -= grad_total
        grad_P = (grad_raw.mT @ (v * others)).mT
        return grad_v.view(shape), grad_total.view(shape), grad_P, grad_Q, None, None, None


def _inverse_rms(v: Tensor) -> Tensor:
    mean_square = torch.linalg.vecdot(v, v).unsqueeze(-1) / v.shape[-1]
    return torch.rsqrt(mean_square + RMS_EPS)


def skinny(wide: Tensor, narrow: Tensor) -> Tensor:
    """``wide @ narrow`` with few columns; written from the other side it takes a third of the time."""
    return (narrow.mT @ wide.mT).mT


def complex_planes(v: Tensor, planes: int) -> Tensor:
    """Neighbouring pairs as complex numbers, (tokens, planes): a view, but for an odd width."""
    return torch.view_as_complex(v[:, : 2 * planes].contiguous().unflatten(-1, (planes, 2)))


def turn_planes(v: Tensor, turn: Tensor) -> Tensor:
    """``v`` turned by unit complex numbers, one per plane: one vectorised pass, unlike strided real arithmetic.

    The last coordinate of an odd width stays.
    """
    turned = torch.view_as_real(complex_planes(v, turn.shape[-1]) * turn).flatten(-2)
    return turned if turned.shape == v.shape else torch.cat((turned, v[:, turned.shape[-1] :]), dim=-1)
