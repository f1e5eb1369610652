"""Where the fast mixture finds the outputs of frozen experts: in the latents, or in the layer input (layer 2)."""

import torch
from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gathered_rows import GatheredRows
from radargate_pl.native.functions import is_native


class LatentSource:
    """The source is the latents of all experts, (T, E, r).

    Args:
        bank: the layer's experts.
        dtype: of what is computed, float32 or float64.
        may_be_native: whether native code may gather the rows.
    """

    reads_widened_B = True  # all of it, in products

    def __init__(self, bank: ExpertBank, dtype: torch.dtype, may_be_native: bool) -> None:
        self.bank, self.dtype, self.may_be_native = bank, dtype, may_be_native
        self.B = self._rows(bank.lora_B.mT.flatten(0, 1), self.reads_widened_B)
        # Remembered, since a list becomes a tensor on a device only by waiting for it.
        self.scaling = bank.cached("scaling", lambda: bank.lora_B.new_tensor(bank.scaling, dtype=dtype), dtype)
        self.frozen: tuple[Tensor, ...] = (bank.lora_B,)

    def _rows(self, matrix: Tensor, is_widened: bool) -> GatheredRows:
        by_native = self.may_be_native and is_native(self.dtype, matrix)
        return GatheredRows(matrix.to(self.dtype) if is_widened or not by_native else matrix, self.bank.rank, by_native)

    def kept(self, latents: Tensor, indices: Tensor | None) -> Tensor:
        """Scaled latents of the kept experts, (T, K, r)."""
        if indices is None:
            return latents.to(self.dtype) * self.scaling.unsqueeze(-1)
        chosen = latents.gather(1, indices.unsqueeze(-1).expand(-1, -1, latents.shape[-1]))
        return chosen.to(self.dtype) * self.scaling[indices].unsqueeze(-1)

    def total(self, latents: Tensor) -> Tensor:
        """``S``, (T, out)."""
        if len(set(self.bank.scaling)) > 1:
            return self.kept(latents, None).flatten(1) @ self.B.matrix
        return (latents.flatten(1).to(self.dtype) @ self.B.matrix).mul_(self.bank.scaling[0])

    def gradient(self, indices: Tensor | None, of_total: Tensor | None, of_kept: Tensor) -> Tensor:
        """Gradient of the source from those of ``S`` and of the kept scaled latents, in ``dtype``."""
        shape = (len(of_kept), self.bank.num_experts, self.bank.rank)
        gradient = of_kept.new_zeros(shape) if of_total is None else (of_total @ self.B.matrix.mT).view(shape)
        if indices is None:
            gradient += of_kept
        else:
            for slot, expert in zip(of_kept.unbind(1), indices.unbind(1), strict=True):
                place = expert[:, None, None].expand(-1, 1, gradient.shape[-1])
                gradient.scatter_(1, place, gradient.gather(1, place) + slot.unsqueeze(1))
        return gradient.mul_(self.scaling.unsqueeze(-1))

    def plain(self, latents: Tensor, weights: Tensor) -> Tensor:
        """``sum_i g_i v_i`` in operations that can be differentiated again, for weights (T, E)."""
        return self.bank.weighted_sum(latents, weights)


class InputSource(LatentSource):
    """The source is the layer input, (T, in)."""

    reads_widened_B = False

    def __init__(self, bank: ExpertBank, dtype: torch.dtype, may_be_native: bool) -> None:
        super().__init__(bank, dtype, may_be_native)
        self.A = self._rows(bank.lora_A.flatten(0, 1), False)
        self.frozen = (bank.lora_A, bank.lora_B)

    @property
    def W_sum(self) -> Tensor:
        """``sum_i s_i A_i^T B_i^T``, (in, out)."""
        return self.bank.cached("W_sum", self._folded, self.dtype)

    def _folded(self) -> Tensor:
        scaling = self.scaling.repeat_interleave(self.bank.rank).unsqueeze(-1)
        return (self.A.matrix * scaling).mT @ self.B.matrix.to(self.dtype)

    def kept(self, x: Tensor, indices: Tensor | None) -> Tensor:
        """Scaled latents of the kept experts, (T, K, r)."""
        return self.A.dots(x.to(self.dtype), indices) * self.scaling[indices].unsqueeze(-1)

    def total(self, x: Tensor) -> Tensor:
        """``S``, (T, out)."""
        return x.to(self.dtype) @ self.W_sum

    def gradient(self, indices: Tensor | None, of_total: Tensor | None, of_kept: Tensor) -> Tensor:
        """Gradient of the source from those of ``S`` and of the kept scaled latents, in ``dtype``."""
        gradient = self.A.sums(of_kept * self.scaling[indices].unsqueeze(-1), indices)
        if of_total is not None:
            gradient.addmm_(of_total, self.W_sum.mT)
        return gradient

    def plain(self, x: Tensor, weights: Tensor) -> Tensor:
        """``sum_i g_i v_i`` in operations that can be differentiated again, for weights (T, E)."""
        return self.bank.weighted_sum(self.bank.project(x), weights)
