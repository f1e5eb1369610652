"""Logits of the labelled positions only, through the model's own head (layer 3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from radargate_pl.moe import MoELinear


class LabelledLogits(NamedTuple):
    """What the loss needs of a forward.

    Attributes:
        logits: logits of the labelled positions, (N, V).
        targets: their token ids, (N,) int64.
        example: the row of the batch each belongs to, (N,) int64.
    """

    logits: Tensor
    targets: Tensor
    example: Tensor


@contextmanager
def only_positions(head: nn.Module, kept: Tensor) -> Iterator[None]:
    """Let the output head see only the chosen positions, so that the model returns logits (kept, V).

    Most of a step's logits are never looked at: with a vocabulary of 49,152 they are the largest tensor of the step.
    Calling the head on the hidden states instead would skip what models do around it (T5's and Granite's scale,
    Gemma-2's soft cap, mBART's bias).

    Args:
        head: the model's output embeddings.
        kept: positions to keep, (examples, length) bool.
    """

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][kept], *args[1:])

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[kept]

    # A head with experts of its own sees whole rows: its gate tells examples apart by them.
    has_experts = isinstance(head, MoELinear)
    handle = head.register_forward_hook(keep_output) if has_experts else head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
