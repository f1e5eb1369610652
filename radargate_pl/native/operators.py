"""The native functions as operators that `torch.compile` can place in a graph (layer 1)."""

from typing import Any

import torch
from torch import Tensor

from radargate_pl.native import turned_sum as native

turned_sum = torch.library.custom_op("radargate::turned_sum", native.turned_sum, mutates_args=(), device_types="cpu")
turned_sum_gradients = torch.library.custom_op(
    "radargate::turned_sum_gradients", native.turned_sum_gradients, mutates_args=(), device_types="cpu"
)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


@turned_sum.register_fake
def _(total: Tensor, *_: Any) -> Tensor:
    return _like(total)[0]


@turned_sum_gradients.register_fake
def _(grad: Tensor, total: Tensor, latents: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, P, Q, _ = rest
    return _like(total, latents, weights, P, Q)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_normed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_total, of_latents, of_weights, of_P, of_Q = turned_sum_gradients(grad, *ctx.saved_tensors, ctx.is_normed)
    return of_total, of_latents, of_weights, None, None, of_P, of_Q, None


turned_sum.register_autograd(_backward, setup_context=_keep)
