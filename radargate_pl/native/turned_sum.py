"""The functions of turned_sum.cpp, on tensors (layer 1).

``sum_j g_j R_j v_j`` over the kept experts of every token, with ``v_j = h_j B_j`` turned by ``a = c ((v_j * w) P) Q``,
``w = S - v_j`` and ``c = 1 / (rms(v_j) rms(w))``, or 1 without norm. Symbols: T tokens, K kept experts, E experts, r
rank, r_a rotation rank.

Source: arXiv 2505.23184, eq. 4-8, 17-18; gradient eq. 38-39.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from radargate_pl.native.library import native_library
from radargate_pl.ops import RMS_EPS

# Of what is computed, and of the stored rows.
NAMES = {
    (torch.float32, torch.float32): "float32",
    (torch.float32, torch.bfloat16): "bfloat16",
    (torch.float64, torch.float64): "float64",
}


def is_native(dtype: torch.dtype, stored: Tensor) -> bool:
    """Tell whether the native functions compute in a dtype from rows like these; builds them the first time.

    Args:
        dtype: of what is computed.
        stored: stacked rows; real ones on a CPU, no fake tensor, but that of a compiler.
    """
    is_real = torch.compiler.is_compiling() or type(stored) is Tensor
    return is_real and stored.device.type == "cpu" and (dtype, stored.dtype) in NAMES and _is_built()


@torch.compiler.assume_constant_result
def _is_built() -> bool:
    return native_library() is not None


def turned_sum(
    total: Tensor,
    latents: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    is_normed: bool,
) -> Tensor:
    """Mix the rotated outputs of the kept experts, (T, out).

    Args:
        total: ``S``, (T, out), float32 or float64, as everything but ``indices`` and ``B``.
        latents: scaled latents of the kept experts, (T, K, r).
        weights: their weights, (T, K).
        indices: which they are, (T, K) int64; ``None``: expert j in place j.
        B: stacked (E * r, out), float32, float64 or bfloat16.
        P: (out, r_a).
        Q: (r_a, out // 2).
        is_normed: whether angles are scale-free.
    """
    mixed = torch.empty_like(total, memory_format=torch.contiguous_format)
    _call("turned_sum", total, latents, weights, indices, B, P, Q, is_normed, results=(mixed,))
    return mixed


def turned_sum_gradients(
    grad: Tensor,
    total: Tensor,
    latents: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    is_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``total``, ``latents``, ``weights``, ``P`` and ``Q`` for that of the mixture.

    Args:
        grad: (T, out); the others as in `turned_sum`.
        total: see there.
        latents: see there.
        weights: see there.
        indices: see there.
        B: see there.
        P: see there.
        Q: see there.
        is_normed: see there.
    """
    like = (total, latents, weights, P.mT, Q)
    found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like]
    results = (grad.contiguous(), *found)
    _call("turned_sum_gradients", total, latents, weights, indices, B, P, Q, is_normed, results=results)
    of_total, of_latents, of_weights, of_P, of_Q = found
    return of_total, of_latents, of_weights, of_P.mT.contiguous(), of_Q


def gathered_sums(factors: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Sum each token's rows times its factors: (T, K, r), (T, K) and (E * r, width) to (T, width)."""
    tokens, kept, rank = factors.shape
    result = factors.new_empty(tokens, rows.shape[1])
    pointers = _pointers(factors, indices, rows, result)
    native_function("gathered_sums", factors.dtype, rows.dtype)(
        tokens, kept, rank, rows.shape[1], *pointers, torch.get_num_threads()
    )
    return result


def gathered_dots(wide: Tensor, indices: Tensor, rows: Tensor, rank: int) -> Tensor:
    """Multiply each token by its rows: (T, width), (T, K) and (E * r, width) to (T, K, r)."""
    (tokens, width), kept = wide.shape, indices.shape[1]
    result = wide.new_empty(tokens, kept, rank)
    pointers = _pointers(wide, indices, rows, result)
    native_function("gathered_dots", wide.dtype, rows.dtype)(
        tokens, kept, rank, width, *pointers, torch.get_num_threads()
    )
    return result


def _call(
    name: str,
    total: Tensor,
    latents: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    is_normed: bool,
    results: tuple[Tensor, ...],
) -> None:
    sizes = (*latents.shape, total.shape[1], P.shape[1])
    pointers = _pointers(total, latents, weights, indices, B, P.mT, Q, *results)
    native_function(name, total.dtype, B.dtype)(*sizes, is_normed, RMS_EPS, *pointers, torch.get_num_threads())


def _pointers(*tensors: Tensor | None) -> list["_Pointer"]:
    return [_Pointer(tensor) for tensor in tensors]


class _Pointer:
    """A tensor's memory for as long as the call lasts; contiguous, copied if need be."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = None if tensor is None else tensor.contiguous()
        self._as_parameter_ = ctypes.c_void_p(None if self.tensor is None else self.tensor.data_ptr())


INTEGER, POINTER = ctypes.c_int64, ctypes.c_void_p
ARGUMENTS = {
    "turned_sum": (*[INTEGER] * 5, ctypes.c_bool, ctypes.c_double, *[POINTER] * 8, ctypes.c_int),
    "turned_sum_gradients": (*[INTEGER] * 5, ctypes.c_bool, ctypes.c_double, *[POINTER] * 13, ctypes.c_int),
    "gathered_sums": (*[INTEGER] * 4, *[POINTER] * 4, ctypes.c_int),
    "gathered_dots": (*[INTEGER] * 4, *[POINTER] * 4, ctypes.c_int),
    "decode_step": (POINTER, INTEGER, POINTER, INTEGER, ctypes.c_int),
}


def native_function(name: str, dtype: torch.dtype, stored: torch.dtype) -> Callable[..., None]:
    """Return a function of the library for what is computed in one dtype from rows stored in another."""
    function: Callable[..., None] = getattr(native_library(), f"{name}_{NAMES[dtype, stored]}")
    function.argtypes, function.restype = ARGUMENTS[name], None  # type: ignore[attr-defined]
    return function
