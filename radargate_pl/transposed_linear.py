"""GPT-2's linear layers, which keep their weights transposed, as ordinary ones without copying a number (layer 3)."""

from torch import Tensor, nn


def with_ordinary_linears(model: nn.Module) -> None:
    """Put an `nn.Linear` in the place of every Conv1D: ``x W + b`` of the same weight, seen from the other side.

    The weight becomes a view of the stored one, (out, in) with the strides of (in, out), so products see the very
    same memory, and everything else (experts, grouped attention, quantities) need not know of Conv1D.

    Args:
        model: changed in place; frozen, as backbones are.
    """
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, _ordinary(child.weight.data, child.bias))


def _ordinary(weight: Tensor, bias: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(1, 1, device="meta", dtype=weight.dtype)
    linear.in_features, linear.out_features = weight.shape
    linear.weight, linear.bias = nn.Parameter(weight.t(), requires_grad=False), bias
    return linear
