"""A product of bfloat16 matrices summed in float32, by native code (layer 1).

The same numbers as the product of both widened to float32, but for the order of the sums and for numbers below 1e-38,
which count as zero, in less than half the time.
"""

import torch
from torch import Tensor

from radargate_pl.native.functions import address, is_native, native_function, operand
from radargate_pl.native.library import native_library


def can_multiply(x: Tensor, rows: Tensor) -> bool:
    """Tell whether `narrow_product` can: bfloat16 on a processor with such an instruction, an even number of rows.

    Args:
        x: (T, n).
        rows: (n, out).
    """
    if x.dtype != torch.bfloat16 or rows.dtype != torch.bfloat16 or len(rows) % 2:
        return False
    return is_native(torch.float32, rows) and hasattr(native_library(), "narrow_product_bfloat16")


def narrow_product(x: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Return ``scale * x rows``, (T, out) float32.

    Args:
        x: (T, n), bfloat16.
        rows: (n, out), bfloat16; n is even.
        scale: of the result.

    Raises:
        RuntimeError: for dtypes and shapes that do not go together.
    """
    (tokens, depth), width = x.shape, rows.shape[-1]
    if depth % 2:
        raise RuntimeError(f"Expected an even number of rows, but got {depth}; they are multiplied in pairs.")
    x = operand("latents", x, torch.bfloat16, (tokens, depth))
    rows = operand("B", rows, torch.bfloat16, (depth, width))
    result = x.new_empty(tokens, width, dtype=torch.float32)
    function = native_function("narrow_product", torch.float32, rows.dtype)
    function(tokens, depth, width, scale, *map(address, (x, rows, result)), torch.get_num_threads())
    return result
