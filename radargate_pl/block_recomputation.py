"""Gradient checkpointing of a frozen backbone, whose blocks are recomputed without ever training (layer 3)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from radargate_pl.gates import Context


def recompute_blocks(model: PreTrainedModel, options: dict[str, Any], context: Context) -> list[nn.Module]:
    """Let a frozen model's blocks be recomputed in the backward pass, non-reentrant.

    Transformers recomputes only blocks in training mode, where some of them drop activations or skip whole layers. So
    the blocks returned are to be switched with the network, and switch themselves off while they compute.

    Args:
        model: the backbone.
        options: arguments of `torch.utils.checkpoint.checkpoint`.
        context: ids and masks of the batch: a block is recomputed with those it was computed with, whatever was called
            in between.

    Returns:
        The blocks that are recomputed while their ``training`` is true.

    Raises:
        ValueError: for ``use_reentrant: True``, which cuts gates out of the graph without an error, and for a model
            without such blocks.
    """
    options = {"use_reentrant": False} | options
    if options["use_reentrant"]:
        raise ValueError("Expected use_reentrant to be False (reentrant checkpointing loses the gates' gradients).")
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(
            f"Expected a backbone whose blocks can be recomputed, but {type(model).__name__} has none. Leave "
            "gradient_checkpointing off."
        )
    recompute = partial(checkpoint, **options)
    for block in blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(_recomputed_in_eval, block, context, recompute)
    return list(blocks)


def _recomputed_in_eval(
    block: nn.Module, context: Context, recompute: Callable[..., Any], function: Callable[..., Any], *args: Any
) -> Any:
    known = context.held()

    def in_eval(*inputs: Any) -> Any:
        before, block.training = block.training, False
        now = context.held()
        context.take(known)
        try:
            return function(*inputs)
        finally:
            context.take(now)
            block.training = before

    return recompute(in_eval, *args)
