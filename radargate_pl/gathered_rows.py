"""The rows of a stacked matrix that belong to each token's kept experts (layer 1)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from radargate_pl.native.gathered_rows import gathered_dots, gathered_sums


class GatheredRows(NamedTuple):
    """A stacked matrix (E * rank, width); rows ``i * rank`` onwards are those of expert i.

    Attributes:
        matrix: in the dtype of what it is multiplied with, or, for native code, narrower.
        rank: rows of one expert.
        is_native: whether native code reads it; see `native.functions.is_native`.
    """

    matrix: Tensor
    rank: int
    is_native: bool

    def only(self, expert: int) -> "GatheredRows":
        """Return the rows of one expert."""
        return self._replace(matrix=self.matrix[expert * self.rank : (expert + 1) * self.rank])

    def sums(self, factors: Tensor, indices: Tensor | None) -> Tensor:
        """Sum each token's rows times its factors (T, K, rank), over all experts or those of ``indices`` (T, K)."""
        if indices is None:
            return factors.flatten(1) @ self.matrix.to(factors.dtype)
        if self.is_native:
            return gathered_sums(factors, indices, self.matrix)
        return F.embedding_bag(self._places(indices), self.matrix, per_sample_weights=factors.flatten(1), mode="sum")

    def dots(self, wide: Tensor, indices: Tensor | None) -> Tensor:
        """Multiply each token (T, width) by its rows: (T, K, rank)."""
        if indices is None:
            return (wide @ self.matrix.to(wide.dtype).mT).unflatten(1, (-1, self.rank))
        if self.is_native:
            return gathered_dots(wide, indices, self.matrix, self.rank)
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
