"""Attention for training on CPUs: two batched products, the query heads of one key folded into rows (layer 3).

torch's fused attention has a slow backward pass on CPUs with bfloat16 units (a third of a training step), and copies
keys and values once for every query head that shares them. The products below do neither.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

NAME = "radargate_grouped"  # at every length
SHORT = "radargate_grouped_short"  # up to LONGEST tokens
# Scores are kept for the backward pass, heads x length^2 of them a row and layer; torch's fused attention keeps none.
LONGEST = 512


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend; where no gradient is wanted, and for everything this form does not know, as ``sdpa`` does.

    Args:
        module: the attention layer.
        query: (examples, heads, length, head width).
        key: (examples, key heads, keys, head width); ``heads`` is a multiple of ``key heads``.
        value: the same shape, or of another width.
        attention_mask: added to the scores, (examples or 1, 1, length, keys) float; see `grouped_mask`.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; ``None`` for 1 / sqrt(head width).
        others: what the model passes on: position biases, soft caps, a paged cache, causality.

    Returns:
        (examples, length, heads, value width), and no attention weights.
    """
    is_known = not any(others.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux"))
    is_added = attention_mask is not None and attention_mask.is_floating_point()
    if attention_mask is None or not (is_added and is_known and _is_wanted(query.device)) or dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    examples, heads, length, width = query.shape
    key_heads, keys = key.shape[1:3]
    scaling = width**-0.5 if scaling is None else scaling
    rows = (query * scaling).reshape(examples * key_heads, heads // key_heads * length, width)
    scores = torch.bmm(rows, key.reshape(examples * key_heads, keys, width).mT).view(examples, heads, length, keys)
    weights = (scores + attention_mask).softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = weights.view(examples * key_heads, -1, keys)
    out = torch.bmm(weights, value.reshape(examples * key_heads, keys, -1))
    return out.view(examples, heads, length, -1).transpose(1, 2).contiguous(), None


def grouped_mask(*args: Any, **options: Any) -> Tensor | None:
    """Make the mask that `grouped_attention` adds, or where it leaves the work to ``sdpa`` that one's own.

    Transformers asks the function registered beside an attention for its mask. Without one it passes none, and padding
    is silently attended to.

    Args:
        args: as transformers passes them.
        options: the same; ``mask_function`` says what is causal, packed, or inside a sliding window.
    """
    device = torch.device(options.get("device", "cpu"))
    mask: Tensor | None = (eager_mask if _is_wanted(device) else sdpa_mask)(*args, **options)
    return mask


def grouped_mask_of_short(*args: Any, **options: Any) -> Tensor | None:
    """Make the mask like `grouped_mask`, beyond `LONGEST` tokens ``sdpa``'s own, with which it attends there too.

    Args:
        args: as transformers passes them.
        options: the same.
    """
    is_short = max(int(options.get("q_length", 0)), int(options.get("kv_length", 0))) <= LONGEST
    mask: Tensor | None = (grouped_mask if is_short else sdpa_mask)(*args, **options)
    return mask


def use_grouped_attention(model: PreTrainedModel, *, only_short: bool = False) -> str | None:
    """Let a model attend like this from now on.

    Args:
        model: the backbone.
        only_short: whether batches of more than `LONGEST` tokens keep the model's own attention.

    Returns:
        Why it cannot: it is left as it is then. ``None`` when it does.
    """
    used = getattr(model.config, "_attn_implementation", None)
    name = SHORT if only_short else NAME
    if used == name:
        return None
    if model.config.is_encoder_decoder:
        return "an encoder-decoder backbone keeps its own"
    if used != "sdpa" or not model._supports_attention_backend:
        return f"{type(model).__name__} attends by {used!r}, which has no place for another"
    AttentionInterface.register(name, grouped_attention)
    AttentionMaskInterface.register(name, grouped_mask_of_short if only_short else grouped_mask)
    model.set_attn_implementation(name)
    is_set = model.config._attn_implementation == name
    return None if is_set else f"{type(model).__name__} has no place for another attention"


def _is_wanted(device: torch.device) -> bool:
    return device.type == "cpu" and torch.is_grad_enabled()
