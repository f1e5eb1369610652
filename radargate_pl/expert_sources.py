"""Where the fast mixture finds the outputs of frozen experts: in the latents, or in the layer input (layer 2)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from radargate_pl.experts import ExpertBank


class Rows(NamedTuple):
    """A stacked matrix (E * rank, width); rows ``i * rank`` onwards are those of expert i."""

    matrix: Tensor
    rank: int

    def only(self, expert: int) -> "Rows":
        """Return the rows of one expert."""
        return Rows(self.matrix[expert * self.rank : (expert + 1) * self.rank], self.rank)

    def sums(self, factors: Tensor, indices: Tensor | None) -> Tensor:
        """Sum each token's rows times its factors (T, K, rank), over all experts or those of ``indices`` (T, K)."""
        if indices is None:
            return factors.flatten(1) @ self.matrix
        return F.embedding_bag(self._places(indices), self.matrix, per_sample_weights=factors.flatten(1), mode="sum")

    def dots(self, wide: Tensor, indices: Tensor | None) -> Tensor:
        """Multiply each token (T, width) by its rows: (T, K, rank)."""
        if indices is None:
            return (wide @ self.matrix.mT).unflatten(1, (-1, self.rank))
        places = self._places(indices)
        tokens, count = places.shape
        starts = torch.arange(0, tokens * count, count, device=places.device)
        owners = torch.arange(tokens, device=places.device).repeat_interleave(count)
        # What embedding_bag itself calls for the gradient of its factors; without it there is no gathered dot product.
        found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            wide, self.matrix, places.flatten(), starts, owners, 0
        )
        return found.view(tokens, -1, self.rank)

    def _places(self, indices: Tensor) -> Tensor:
        rows = torch.arange(self.rank, device=indices.device)
        return (indices.unsqueeze(-1) * self.rank + rows).flatten(1)


class LatentSource:
    """The source is the latents of all experts, (T, E, r)."""

    def __init__(self, bank: ExpertBank, dtype: torch.dtype) -> None:
        self.bank, self.dtype = bank, dtype
        self.B = Rows(bank.lora_B.mT.flatten(0, 1).to(dtype), bank.rank)
        # Remembered, since a list becomes a tensor on a device only by waiting for it.
        self.scaling = bank.cached("scaling", lambda: bank.lora_B.new_tensor(bank.scaling, dtype=dtype), dtype)
        self.frozen: tuple[Tensor, ...] = (bank.lora_B,)

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

    def gradient(self, latents: Tensor, indices: Tensor | None, of_total: Tensor | None, of_kept: Tensor) -> Tensor:
        """Gradient of the latents from those of ``S`` and of the kept scaled latents."""
        if of_total is None:
            gradient = latents.new_zeros(latents.shape, dtype=self.dtype)
        else:
            gradient = (of_total @ self.B.matrix.mT).view(latents.shape)
        if indices is None:
            gradient += of_kept
        else:
            for slot, expert in zip(of_kept.unbind(1), indices.unbind(1), strict=True):
                place = expert[:, None, None].expand(-1, 1, gradient.shape[-1])
                gradient.scatter_(1, place, gradient.gather(1, place) + slot.unsqueeze(1))
        return gradient.mul_(self.scaling.unsqueeze(-1)).to(latents.dtype)

    def plain(self, latents: Tensor, weights: Tensor) -> Tensor:
        """``sum_i g_i v_i`` in operations that can be differentiated again, for weights (T, E)."""
        return self.bank.weighted_sum(latents, weights)


class InputSource(LatentSource):
    """The source is the layer input, (T, in)."""

    def __init__(self, bank: ExpertBank, dtype: torch.dtype) -> None:
        super().__init__(bank, dtype)
        self.A = Rows(bank.lora_A.flatten(0, 1).to(dtype), bank.rank)
        self.frozen = (bank.lora_A, bank.lora_B)

    @property
    def W_sum(self) -> Tensor:
        """``sum_i s_i A_i^T B_i^T``, (in, out)."""
        return self.bank.cached("W_sum", self._folded, self.dtype)

    def _folded(self) -> Tensor:
        scaling = self.scaling.repeat_interleave(self.bank.rank).unsqueeze(-1)
        return (self.A.matrix * scaling).mT @ self.B.matrix

    def kept(self, x: Tensor, indices: Tensor | None) -> Tensor:
        """Scaled latents of the kept experts, (T, K, r)."""
        return self.A.dots(x.to(self.dtype), indices) * self.scaling[indices].unsqueeze(-1)

    def total(self, x: Tensor) -> Tensor:
        """``S``, (T, out)."""
        return x.to(self.dtype) @ self.W_sum

    def gradient(self, x: Tensor, indices: Tensor | None, of_total: Tensor | None, of_kept: Tensor) -> Tensor:
        """Gradient of the input from those of ``S`` and of the kept scaled latents."""
        gradient = self.A.sums(of_kept * self.scaling[indices].unsqueeze(-1), indices)
        if of_total is not None:
            gradient.addmm_(of_total, self.W_sum.mT)
        return gradient.to(x.dtype)

    def plain(self, x: Tensor, weights: Tensor) -> Tensor:
        """``sum_i g_i v_i`` in operations that can be differentiated again, for weights (T, E)."""
        return self.bank.weighted_sum(self.bank.project(x), weights)
