"""Where the fast mixture finds the outputs of frozen experts: in the latents, or in the layer input (layer 2)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gathered_rows import GatheredRows
from radargate_pl.native.functions import is_native
from radargate_pl.native.narrow_product import can_multiply, narrow_product


class StackedExperts(NamedTuple):
    """What the sources of a bank are made from.

    Attributes:
        A: rows (E * r, in), as they are stored.
        B: rows (E * r, out), as they are stored.
        scaling: of each expert.
        scales: the same as a tensor (E,), in the dtype of what is computed, float32 or float64.
    """

    A: Tensor
    B: Tensor
    scaling: tuple[float, ...]
    scales: Tensor

    @classmethod
    def of(cls, bank: ExpertBank, dtype: torch.dtype) -> "StackedExperts":
        """Return those of a bank.

        Args:
            bank: the layer's experts.
            dtype: of what is computed.
        """
        # Remembered, since a list becomes a tensor on a device only by waiting for it.
        scales = bank.cached("scaling", lambda: bank.lora_B.new_tensor(bank.scaling, dtype=dtype), dtype)
        return cls(bank.lora_A.flatten(0, 1), bank.lora_B.mT.flatten(0, 1), tuple(bank.scaling), scales)


def folded(bank: ExpertBank, dtype: torch.dtype) -> Tensor:
    """Return ``W_sum = sum_i s_i A_i^T B_i^T``, (in, out), remembered until an expert changes.

    Args:
        bank: the layer's experts.
        dtype: of the result.
    """
    return bank.cached("W_sum", lambda: _folded(StackedExperts.of(bank, dtype)), dtype)


def _folded(experts: StackedExperts) -> Tensor:
    scales = experts.scales.repeat_interleave(len(experts.B) // len(experts.scaling)).unsqueeze(-1)
    return (experts.A * scales).mT @ experts.B.to(scales.dtype)


class LatentSource:
    """The source is the latents of all experts, (T, E, r).

    Args:
        experts: the layer's.
        may_be_native: whether native code may gather the rows.
    """

    def __init__(self, experts: StackedExperts, may_be_native: bool) -> None:
        self.scaling, self.scales, self.may_be_native = experts.scaling, experts.scales, may_be_native
        self.dtype = self.scales.dtype
        self.experts, self.rank = len(self.scaling), len(experts.B) // len(self.scaling)
        self.B = self._rows(experts.B)

    def _rows(self, matrix: Tensor) -> GatheredRows:
        by_native = self.may_be_native and is_native(self.dtype, matrix)
        return GatheredRows(matrix if by_native else matrix.to(self.dtype), self.rank, by_native)

    @functools.cached_property
    def widened_B(self) -> Tensor:
        """All rows in the dtype of what is computed, for products with them."""
        return self.B.matrix.to(self.dtype)

    def kept(self, latents: Tensor, indices: Tensor | None) -> Tensor:
        """Scaled latents of the kept experts, (T, K, r)."""
        if indices is None:
            return latents.to(self.dtype) * self.scales.unsqueeze(-1)
        chosen = latents.gather(1, indices.unsqueeze(-1).expand(-1, -1, latents.shape[-1]))
        return chosen.to(self.dtype) * self.scales[indices].unsqueeze(-1)

    def total(self, latents: Tensor) -> Tensor:
        """``S``, (T, out)."""
        if len(set(self.scaling)) > 1:
            return self.kept(latents, None).flatten(1) @ self.widened_B
        latents = latents.flatten(1)
        if self.B.is_native and self.dtype == torch.float32 and can_multiply(latents, self.B.matrix):
            return narrow_product(latents, self.B.matrix, self.scaling[0])
        return (latents.to(self.dtype) @ self.widened_B).mul_(self.scaling[0])

    def gradient(self, indices: Tensor | None, of_total: Tensor | None, of_kept: Tensor) -> Tensor:
        """Gradient of the source from those of ``S`` and of the kept scaled latents, in ``dtype``."""
        shape = (len(of_kept), self.experts, self.rank)
        gradient = of_kept.new_zeros(shape) if of_total is None else (of_total @ self.widened_B.mT).view(shape)
        if indices is None:
            gradient += of_kept
        else:
            for slot, expert in zip(of_kept.unbind(1), indices.unbind(1), strict=True):
                place = expert[:, None, None].expand(-1, 1, gradient.shape[-1])
                gradient.scatter_(1, place, gradient.gather(1, place) + slot.unsqueeze(1))
        return gradient.mul_(self.scales.unsqueeze(-1))


class InputSource(LatentSource):
    """The source is the layer input, (T, in).

    Args:
        experts: the layer's.
        may_be_native: whether native code may gather the rows.
        W_sum: returns what `folded` does; asked only where ``S`` is.
    """

    def __init__(self, experts: StackedExperts, may_be_native: bool, W_sum: Callable[[], Tensor]) -> None:
        super().__init__(experts, may_be_native)
        self.A, self.W_sum = self._rows(experts.A), W_sum

    def kept(self, x: Tensor, indices: Tensor | None) -> Tensor:
        """Scaled latents of the kept experts, (T, K, r)."""
        return self.A.dots(x.to(self.dtype), indices) * self.scales[indices].unsqueeze(-1)

    def total(self, x: Tensor) -> Tensor:
        """``S``, (T, out)."""
        return x.to(self.dtype) @ self.W_sum()

    def gradient(self, indices: Tensor | None, of_total: Tensor | None, of_kept: Tensor) -> Tensor:
        """Gradient of the source from those of ``S`` and of the kept scaled latents, in ``dtype``."""
        gradient = self.A.sums(of_kept * self.scales[indices].unsqueeze(-1), indices)
        if of_total is not None:
            gradient.addmm_(of_total, self.W_sum().mT)
        return gradient
