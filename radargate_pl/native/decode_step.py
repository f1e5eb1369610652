"""decode_step.cpp: the updates of several mixture layers that read one input, for a few tokens (layer 1)."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from radargate_pl.native.functions import address, native_function, operand
from radargate_pl.ops import RMS_EPS


class Member(NamedTuple):
    """One layer; tensors in the dtype of what is computed, A and B as they are stored, all contiguous.

    Attributes:
        theta: the scorer's weight, (E, in).
        A: stacked (E * r, in).
        B: stacked (E * r, out).
        scaling: of the experts, (E,).
        P: transposed, (r_a, out); ``None`` without rotation.
        Q: (r_a, out // 2); ``None`` without rotation.
        W_sum: transposed, (out, in), from which ``S`` is made; ``None``: from all latents.
        kept: experts kept for a token, at most E.
        renormalizes: whether kept weights are shares of their own sum.
        is_normed: whether angles are scale-free.
        temperature: divides the logits.
        output_scale: multiplies the weights.
        angle_bound: of the angles, in radians; ``None`` for none.
    """

    theta: Tensor
    A: Tensor
    B: Tensor
    scaling: Tensor
    P: Tensor | None
    Q: Tensor | None
    W_sum: Tensor | None
    kept: int
    renormalizes: bool
    is_normed: bool
    temperature: float
    output_scale: float
    angle_bound: float | None


class DecodeStep:
    """Computes ``sum_j g_j R_j v_j`` of every member for a few tokens.

    Memory of the members' tensors is read at every call, and must stay where it is.

    Args:
        members: layers with one input.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(members)
        first = members[0]
        self._dtype, self._stored = first.theta.dtype, first.A.dtype
        structure = _structure(ctypes.c_double if self._dtype == torch.float64 else ctypes.c_float)
        self._records = (structure * len(members))(*[structure(**_fields(member)) for member in members])
        self._function = native_function("decode_step", self._dtype, self._stored)
        self._updates: dict[torch.Size, tuple[Tensor, ...]] = {}

    def updates(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the update (..., out) of every member for x (..., in); overwritten by the next call."""
        updates = self._updates.get(x.shape)
        if updates is None:
            with torch.inference_mode(False):
                made = [self._new_update(member, x) for member in self._members]
            updates = self._updates[x.shape] = tuple(made)
        for record, update in zip(self._records, updates, strict=True):
            record.updates = update.data_ptr()
        x = operand("the input", x, self._stored, x.shape)
        tokens = x.numel() // x.shape[-1]
        self._function(self._records, len(updates), x.data_ptr(), tokens, torch.get_num_threads())
        return updates

    def _new_update(self, member: Member, x: Tensor) -> Tensor:
        return torch.empty(*x.shape[:-1], member.B.shape[1], dtype=self._dtype)


def _fields(member: Member) -> dict[str, object]:
    """What the record of a member holds, by name; checked, since C++ takes the addresses as they are."""
    (experts, width), (height, out), dtype = member.theta.shape, member.B.shape, member.theta.dtype
    turns = 0 if member.P is None else len(member.P)
    shapes = {
        **{"theta": (experts, width), "A": (height, width), "B": (height, out), "scaling": (experts,)},
        **{"P": (turns, out), "Q": (turns, out // 2), "W_sum": (out, width)},
    }
    places = {}
    for name, shape in shapes.items():
        tensor = getattr(member, name)
        stored = member.A.dtype if name in ("A", "B") else dtype
        if tensor is not None and operand(name, tensor, stored, shape).data_ptr() != tensor.data_ptr():
            raise RuntimeError(f"Expected {name} of a layer to be contiguous, but its strides are {tensor.stride()}.")
        places[name] = address(tensor)
    sizes = {"experts": experts, "rank": height // experts, "in_": width, "out": out, "turns": turns}
    numbers = {name: getattr(member, name) for name in ("kept", "is_normed", "renormalizes")}
    factors = {name: getattr(member, name) for name in ("temperature", "output_scale")}
    return {**sizes, **numbers, **factors, "eps": RMS_EPS, "angle_bound": member.angle_bound or 0.0, **places}


def _structure(real: type) -> type[ctypes.Structure]:
    """The same as `Member` in decode_step.cpp, field by field."""
    integers = ("experts", "rank", "in_", "out", "turns", "kept", "is_normed", "renormalizes")
    pointers = ("theta", "A", "B", "scaling", "P", "Q", "W_sum", "updates")
    fields = [
        *((name, ctypes.c_int64) for name in integers),
        *((name, real) for name in ("eps", "temperature", "output_scale", "angle_bound")),
        *((name, ctypes.c_void_p) for name in pointers),
    ]
    return type("Member", (ctypes.Structure,), {"_fields_": fields})
