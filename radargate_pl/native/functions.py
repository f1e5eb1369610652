"""How tensors reach the native functions: checked here, since C++ takes addresses and looks at nothing (layer 1)."""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from radargate_pl.native.library import native_library

# Of what is computed, and of the stored rows.
NAMES = {
    (torch.float32, torch.float32): "float32",
    (torch.float32, torch.bfloat16): "bfloat16",
    (torch.float64, torch.float64): "float64",
}
INTEGER, POINTER = ctypes.c_int64, ctypes.c_void_p
_TURNED = (*[INTEGER] * 5, ctypes.c_bool, ctypes.c_double)
ARGUMENTS = {
    "turned_sum": (*_TURNED, *[POINTER] * 8, ctypes.c_int),
    "turned_sum_gradients": (*_TURNED, *[POINTER] * 13, ctypes.c_int),
    "gathered_sums": (*[INTEGER] * 4, *[POINTER] * 4, ctypes.c_int),
    "gathered_dots": (*[INTEGER] * 4, *[POINTER] * 4, ctypes.c_int),
    "narrow_product": (*[INTEGER] * 3, ctypes.c_float, *[POINTER] * 3, ctypes.c_int),  # of bfloat16 alone
    "decode_step": (POINTER, INTEGER, POINTER, INTEGER, ctypes.c_int),
}


def is_native(dtype: torch.dtype, stored: Tensor) -> bool:
    """Tell whether there are native functions that compute in a dtype from rows like these; builds them the first time.

    Args:
        dtype: of what is computed.
        stored: stacked rows; real ones on a CPU, no fake tensor, but that of a compiler.
    """
    is_real = torch.compiler.is_compiling() or type(stored) is Tensor
    return is_real and stored.device.type == "cpu" and (dtype, stored.dtype) in NAMES and _is_built()


@torch.compiler.assume_constant_result
def _is_built() -> bool:
    return native_library() is not None


def native_function(name: str, dtype: torch.dtype, stored: torch.dtype) -> Callable[..., None]:
    """Return a function of the library for what is computed in one dtype from rows stored in another.

    Args:
        name: key of `ARGUMENTS`.
        dtype: of what is computed.
        stored: of the rows.

    Raises:
        RuntimeError: for dtypes that no function knows.
    """
    if (dtype, stored) not in NAMES:
        raise RuntimeError(f"Expected dtypes of native code, one of {list(NAMES)}, but got {(dtype, stored)}.")
    function: Callable[..., None] = getattr(native_library(), f"{name}_{NAMES[dtype, stored]}")
    function.argtypes, function.restype = ARGUMENTS[name], None  # type: ignore[attr-defined]
    return function


def operand(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return a tensor as C++ can read it, copied if need be; hold on to it until the call is over.

    Args:
        name: for the message.
        tensor: the operand.
        dtype: that it must have.
        shape: that it must have.

    Raises:
        RuntimeError: naming what differs.
    """
    if tensor.dtype != dtype or tensor.shape != tuple(shape) or tensor.device.type != "cpu":
        raise RuntimeError(
            f"Expected {name} of the mixture to be {dtype} of shape {tuple(shape)} on the CPU, but got {tensor.dtype} "
            f"of shape {tuple(tensor.shape)} on {tensor.device}. Gate, rotation and experts compute in one dtype."
        )
    return tensor.contiguous().resolve_neg()


def experts_of(indices: Tensor, shape: Sequence[int], experts: int) -> Tensor:
    """Return indices of experts as C++ can read them.

    Args:
        indices: int64.
        shape: that they must have.
        experts: number of experts.

    Raises:
        RuntimeError: for another dtype or shape.
        IndexError: for an expert that is none.
    """
    indices = operand("indices", indices, torch.int64, shape)
    if indices.numel():
        lowest, highest = torch.aminmax(indices)
        if lowest < 0 or highest >= experts:
            raise IndexError(f"Expected indices from 0 to {experts - 1}, but got {int(lowest)} to {int(highest)}.")
    return indices


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor lies; ``None`` for none."""
    return None if tensor is None else tensor.data_ptr()
