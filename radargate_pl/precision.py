"""Modules that stay in float32 whatever the trainer's precision."""

from collections.abc import Callable
from typing import Self

from torch import Tensor

from radargate_pl.remembered import CountsChanges


class Float32Module(CountsChanges):
    """A module that refuses casts to a narrower float dtype; moves between devices go through.

    Lightning casts the whole model under ``bf16-true``, and does so after it has restored a checkpoint: gates cast and
    cast back would lose the bits they were saved with, and AdamW steps of 1e-4 vanish in bfloat16.

    Attributes:
        keeps_float32: whether this module is protected at all (a frozen expert bank is not).
    """

    keeps_float32: bool = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.keeps_float32:
            return super()._apply(fn, recurse)

        def without_narrowing(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrower = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(device=moved.device) if narrower else moved

        return super()._apply(without_narrowing, recurse)
