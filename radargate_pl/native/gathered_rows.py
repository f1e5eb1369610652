"""Products with the rows of each token's kept experts, by native code (layer 1)."""

import torch
from torch import Tensor

from radargate_pl.native.functions import address, experts_of, native_function, operand


def gathered_sums(factors: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Sum each token's rows times its factors.

    Args:
        factors: (T, K, r), float32 or float64.
        indices: experts, (T, K) int64.
        rows: stacked (E * r, width), in the dtype of the factors, or bfloat16 for float32.

    Returns:
        (T, width), the dtype of the factors.
    """
    (tokens, kept, rank), (height, width) = factors.shape, rows.shape
    factors = operand("factors", factors, factors.dtype, factors.shape)
    indices = experts_of(indices, (tokens, kept), height // rank)
    rows = operand("rows", rows, rows.dtype, rows.shape)
    result = factors.new_empty(tokens, width)
    function = native_function("gathered_sums", factors.dtype, rows.dtype)
    places = map(address, (factors, indices, rows, result))
    function(tokens, kept, rank, width, *places, torch.get_num_threads())
    return result


def gathered_dots(wide: Tensor, indices: Tensor, rows: Tensor, rank: int) -> Tensor:
    """Multiply each token by its rows.

    Args:
        wide: (T, width), float32 or float64.
        indices: experts, (T, K) int64.
        rows: stacked (E * rank, width), in the dtype of ``wide``, or bfloat16 for float32.
        rank: rows of one expert.

    Returns:
        (T, K, rank), the dtype of ``wide``.
    """
    (tokens, width), kept = wide.shape, indices.shape[1]
    wide = operand("wide", wide, wide.dtype, wide.shape)
    indices = experts_of(indices, (tokens, kept), len(rows) // rank)
    rows = operand("rows", rows, rows.dtype, (len(rows), width))
    result = wide.new_empty(tokens, kept, rank)
    function = native_function("gathered_dots", wide.dtype, rows.dtype)
    places = map(address, (wide, indices, rows, result))
    function(tokens, kept, rank, width, *places, torch.get_num_threads())
    return result
