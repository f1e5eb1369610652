"""Losses as free functions (layer 0: torch only)."""

from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100  # label of a position that carries no loss


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each labelled token in nats, in float32 whatever the logits' dtype.

    Args:
        logits: (N, V), any float dtype.
        targets: (N,) int64 token ids.

    Returns:
        (N,) float32 (float64 for float64 logits).

    Example:
        >>> import torch
        >>> token_cross_entropy(torch.zeros(1, 4), torch.tensor([2])).round(decimals=4)
        tensor([1.3863])
    """
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide, targets, reduction="none")


def example_mean_cross_entropy(logits: Tensor, targets: Tensor, example: Tensor, num_examples: int) -> Tensor:
    """Mean over examples of the mean cross-entropy over that example's answer tokens, in nats.

    ``L = 1/N sum_i 1/|T_i| sum_{t in T_i} CE_t``. Equal batches on several ranks, or accumulated, average to exactly
    the loss of the whole batch, which a mean over tokens does not.

    Args:
        logits: labelled positions only, (tokens, V), any float dtype.
        targets: (tokens,) int64.
        example: row of the batch each token belongs to, (tokens,) int64 in [0, num_examples).
        num_examples: rows in the batch; a row without answer tokens counts as zero loss.

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Example:
        >>> import torch
        >>> rows = torch.tensor([0, 0, 1])
        >>> example_mean_cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 2]), rows, 2).round(decimals=4)
        tensor(1.3863)
    """
    losses = token_cross_entropy(logits, targets)
    sums = losses.new_zeros(num_examples).index_add(0, example, losses)
    counts = example.bincount(minlength=num_examples).clamp_min(1)
    return (sums / counts).mean()
