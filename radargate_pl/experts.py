"""The LoRA experts of one linear layer, evaluated from their rank-sized latents (layer 1)."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.expert_shapes import check_experts
from radargate_pl.ops import gate_dtype, gram_map, one_hot_like, pack_latents
from radargate_pl.precision import Float32Module
from radargate_pl.remembered import Prepared, Remembered

LAYER_NORM_EPS = 1e-8
BLOCK = 8  # experts in one GEMM, where an expert that joins must leave the results of the others alone


class ExpertBank(Float32Module):
    r"""All experts that exist at one layer, frozen: ``v_i = scaling_i * (x A_i^T) B_i^T``.

    Everything a gate needs (the total, norms, Grams, LayerNorm statistics of all outputs side by side) is computed
    exactly from the latents ``h_i = x A_i^T``, which are ``r`` wide; a full output is made only of kept experts.
    Experts of other layers ("absent" here) are not in the bank: they cost nothing and count nowhere. The experts are
    stacked as ``lora_A`` (E, r, in) and ``lora_B`` (E, out, r), padded with zeros to the largest rank, in their dtype.

    Args:
        lora_A: expert name to A, (r_i, in).
        lora_B: expert name to B, (out, r_i).
        scaling: expert name to alpha / r (or alpha / sqrt(r)).
        library: names of all experts of the network, which give the ids; ``None`` means the names of ``lora_A``.

    Attributes:
        library: names of all experts of the network.
        names: experts present here, in library order.
        ids: their positions in the library.
        scaling: their scalings.
        ranks: their own ranks; ``rank`` is the largest.
        shares_A: whether several experts have one A (HydraLoRA).
        in_blocks: whether experts are evaluated eight at a time beside zeros: the shape of a GEMM, and with it the last
            bit of the others' weighted sums, stays when an expert joins. For gates that one can join.
        domains: expert of the library to the embedding of its training data, (m,); ``None`` when not given.

    Raises:
        ValueError: when no expert is given, names differ between the arguments, or shapes do not fit together.

    Source: PEFT's LoRA layout; identities of arXiv 2505.23184 eq. 1-5 and B.2.
    """

    trainable = False
    keeps_float32 = False

    def __init__(
        self,
        lora_A: Mapping[str, Tensor],
        lora_B: Mapping[str, Tensor],
        scaling: Mapping[str, float],
        *,
        library: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.library = tuple(lora_A) if library is None else tuple(library)
        check_experts(lora_A, lora_B, scaling, self.library)
        self.names = tuple(name for name in self.library if name in lora_A)
        self.ids = tuple(self.library.index(name) for name in self.names)
        self.scaling = tuple(float(scaling[name]) for name in self.names)
        self.ranks = tuple(lora_A[name].shape[0] for name in self.names)
        self.rank = max(self.ranks)
        self.domains: Mapping[str, Tensor] | None = None
        self.in_features = lora_A[self.names[0]].shape[1]
        self.out_features = lora_B[self.names[0]].shape[0]
        self.shares_A = len(self.names) > 1 and len({id(lora_A[name]) for name in self.names}) == 1
        self.in_blocks = False
        self._cache: dict[str, Remembered] = {}
        self.W_sum = Prepared()  # for graphs that start from the layer input; see `fast_mixture.fold_for_graph`
        self._store([lora_A[name] for name in self.names], [lora_B[name] for name in self.names])

    def _store(self, lora_A: list[Tensor], lora_B: list[Tensor]) -> None:
        stacked_A = torch.stack([self._pad(weight, 0) for weight in (lora_A[:1] if self.shares_A else lora_A)])
        # Stored (E, r, out) behind an (E, out, r) shape: the stacked matrix of every GEMM below is then a view, and the
        # rows of its transpose, which the fast mixture gathers, are contiguous.
        stacked_B = torch.stack([self._pad(weight, 1).mT for weight in lora_B]).mT
        self.lora_A = nn.Parameter(stacked_A, requires_grad=False)
        self.lora_B = nn.Parameter(stacked_B, requires_grad=False)

    def expert_weights(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (r_i, in) and B (out, r_i) of one expert without padding, as live tensors."""
        index = self.names.index(name)
        rank = self.ranks[index]
        return self.lora_A[0 if self.shares_A else index, :rank], self.lora_B[index, :, :rank]

    def _padded_B(self, index: int) -> Tensor:
        return self.lora_B[index]

    def _stacked_A(self, active: tuple[int, ...] | None) -> Tensor:  # (E * r, in), or (r, in) where A is shared
        everything = active is None or self.shares_A
        return self.lora_A.flatten(0, 1) if everything else self.lora_A[list(active or ())].flatten(0, 1)

    def _stacked_B(self, active: tuple[int, ...] | None) -> Tensor:  # (out, E * r)
        lora_B = self.lora_B.transpose(0, 1)
        return lora_B.flatten(1) if active is None else lora_B[:, list(active)].flatten(1)

    def cached(self, name: str, build: Callable[[], Tensor], *settings: object) -> Tensor:
        """Return what ``build`` makes of weights, scalings and these settings, remembered until one changes."""
        if torch.compiler.is_compiling():  # a graph cannot look at versions
            return build()
        remembered = self._cache.get(name)
        if remembered is None:
            remembered = self._cache[name] = Remembered()
        return remembered.get((self.lora_A, self.lora_B), build, (tuple(self.scaling), *settings))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cache.clear()
        self.W_sum.value = None
        return super()._apply(fn, recurse)

    @property
    def num_experts(self) -> int:
        """Number of experts present at this layer (E)."""
        return len(self.names)

    def project(self, x: Tensor, active: tuple[int, ...] | None = None) -> Tensor:
        """Compute the latents ``h_i = x A_i^T`` of all experts, or of the ``active`` ones, in one GEMM.

        Args:
            x: layer input, (..., in), any float dtype.
            active: local expert indices in rising order; ``None`` means all.

        Returns:
            (..., E, r) (or (..., len(active), r)) in the experts' dtype; without the scaling.
        """
        stacked = self._stacked_A(active)
        if self.in_blocks and active is None and not self.shares_A:
            size = BLOCK * self.rank
            padded = F.pad(stacked, (0, 0, 0, -stacked.shape[0] % size))
            parts = [F.linear(x.to(stacked.dtype), block) for block in padded.split(size)]
            parts[-1] = parts[-1][..., : stacked.shape[0] - size * (len(parts) - 1)]
            latents = torch.cat(parts, -1)
        else:
            latents = F.linear(x.to(stacked.dtype), stacked)
        chosen = self.num_experts if active is None else len(active)
        return latents.unflatten(-1, (-1, self.rank)).expand(*x.shape[:-1], chosen, self.rank)

    def total(self, latents: Tensor) -> Tensor:
        """Compute ``S = sum_i v_i`` from the latents of all experts: (..., E, r) to (..., out), float32."""
        if self.num_experts == 1:  # the very operations of `lift_expert`, so that S - v_1 is exactly zero
            return self.lift_expert(latents, 0)
        if len(set(self.scaling)) == 1:
            return self._lift_packed(latents.flatten(-2)) * self.scaling[0]
        return self._lift_packed(pack_latents(latents, self._scaling_like(latents)))

    def lift(self, latents: Tensor, indices: Tensor, active: tuple[int, ...] | None = None) -> Tensor:
        """Compute each token's output of its own expert, ``v_i`` with ``i = indices``.

        One GEMM over latents masked to the chosen expert: gathering ``lora_B`` per token would move r times more
            memory.

        Args:
            latents: (..., E, r), or (..., len(active), r).
            indices: local expert index of each token, (...) int64; one that is not active gives zero.
            active: local indices the latents belong to; ``None`` means all.

        Returns:
            (..., out), float32.
        """
        mask = one_hot_like(indices, self.num_experts, latents.dtype)
        if active is not None:
            mask = mask[..., list(active)]
        lifted = self._lift_packed(pack_latents(latents, mask), active)
        if len(set(self.scaling)) == 1:
            return lifted * self.scaling[0]
        return lifted * self._scaling_like(lifted)[indices].unsqueeze(-1)

    def lift_expert(self, latents: Tensor, index: int) -> Tensor:
        """Compute the output ``v_i`` of one expert for all tokens: (..., E, r) to (..., out), float32."""
        lifted = F.linear(latents[..., index, :], self._padded_B(index).to(latents.dtype))
        return lifted.to(gate_dtype(latents.dtype)) * self.scaling[index]

    def weighted_sum(self, latents: Tensor, weights: Tensor, active: tuple[int, ...] | None = None) -> Tensor:
        """Compute ``sum_i g_i v_i`` as one GEMM without making any ``v_i``.

        Args:
            latents: (..., E, r), or (..., len(active), r).
            weights: weights of all experts, (..., E), float32.
            active: local indices the latents belong to; ``None`` means all.

        Returns:
            (..., out), float32.
        """
        if active is not None:
            weights = weights[..., list(active)]
        chosen = self.scaling if active is None else tuple(self.scaling[index] for index in active)
        if len(chosen) == 1:  # weight and scale after B like PEFT, equal to it bit for bit
            return self._lift_packed(latents.flatten(-2), active) * chosen[0] * weights
        if len(set(chosen)) > 1:  # relative to the first: those scaled like it do not notice another scaling
            weights = weights * (weights.new_tensor(chosen) / chosen[0])
        # The scale after B, as PEFT does: bfloat16 latents are not rounded once more.
        return self._lift_packed(pack_latents(latents, weights), active) * chosen[0]

    def norms(self, latents: Tensor) -> Tensor:
        """Compute the norms ``|v_i| = sqrt(h_i B_i^T B_i h_i^T)`` of all experts: (..., E, r) to (..., E), float32."""
        squared = self._squared_norms(latents)
        positive = squared > 0  # the root has no finite gradient at zero
        return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)

    def gram(self, latents: Tensor, indices: Tensor | None = None, active: tuple[int, ...] | None = None) -> Tensor:
        """Compute inner products ``<v_a, v_b>`` of the chosen experts from the cross Gram of ``lora_B``.

        Args:
            latents: (..., E, r), or (..., len(active), r).
            indices: chosen experts, (..., K) int64; ``None`` means all that the latents belong to.
            active: local indices the latents belong to; ``None`` means all.

        Returns:
            (..., K, K), float32, or float64 for float64 latents.
        """
        here = tuple(range(self.num_experts)) if active is None else active
        latents = latents.to(gate_dtype(latents.dtype)) * self._scaling_like(latents)[list(here)].unsqueeze(-1)
        if indices is None:
            indices = torch.arange(len(here), device=latents.device).expand(latents.shape[:-1])
        elif active is not None:
            place = {index: position for position, index in enumerate(active)}
            indices = torch.tensor([place.get(i, 0) for i in range(self.num_experts)], device=indices.device)[indices]
        stacked = self._stacked_B(active).to(latents.dtype)
        through = gram_map(stacked)
        rows = []
        for slot in indices.unbind(-1):
            mask = one_hot_like(slot, len(here), latents.dtype)
            projected = through(pack_latents(latents, mask)).unflatten(-1, latents.shape[-2:])
            rows.append((projected * latents).sum(-1).gather(-1, indices))
        return torch.stack(rows, dim=-2)

    def layer_norm_logits(self, latents: Tensor, theta: Tensor) -> Tensor:
        """Compute ``LayerNorm(concat(v_1..v_E)) theta^T`` from the latents, without making any ``v_i``.

        ``logits = (h M - mu t) / sqrt(var + 1e-8)`` with ``M_i = B_i^T theta_i^T``, ``t = theta 1``, mean ``mu = h b``
        and variance ``sum_i |v_i|^2 / (E out) - mu^2``; no affine part (it folds into theta).

        Args:
            latents: (..., E, r).
            theta: one row of E blocks of ``out`` numbers per expert, (E, E * out), float32.

        Returns:
            (..., E), float32.

        Source: arXiv 2505.23184, appendix B.2.
        """
        blocks = theta.unflatten(-1, (self.num_experts, self.out_features))  # (E, E, out)
        wide = latents.to(gate_dtype(latents.dtype))
        lora_B = self._scaled_B(wide.dtype)
        mean = (wide.flatten(-2) @ lora_B.mean(1).flatten()).unsqueeze(-1) / self.num_experts
        size = self.num_experts * self.out_features
        variance = self._squared_norms(latents).sum(-1, keepdim=True) / size - mean.square()
        projected = wide.flatten(-2) @ torch.einsum("idr,eid->ire", lora_B, blocks).flatten(0, 1)
        return (projected - mean * theta.sum(-1)) * torch.rsqrt(variance.clamp_min(0) + LAYER_NORM_EPS)

    def _squared_norms(self, latents: Tensor) -> Tensor:
        wide = latents.to(gate_dtype(latents.dtype))
        blocks = self.cached("gram_blocks", self._gram_blocks)  # (E, r, r)
        return (torch.einsum("...er,ers->...es", wide, blocks.to(wide.dtype)) * wide).sum(-1)

    def _gram_blocks(self) -> Tensor:
        lora_B = self._scaled_B(gate_dtype(self._padded_B(0).dtype))
        return lora_B.mT @ lora_B

    def _scaled_B(self, dtype: torch.dtype) -> Tensor:
        lora_B = torch.stack([self._padded_B(i) for i in range(self.num_experts)]).to(dtype)
        return lora_B * self._scaling_like(lora_B)[:, None, None]

    def _lift_packed(self, packed: Tensor, active: tuple[int, ...] | None = None) -> Tensor:
        if not self.in_blocks or active is not None:
            stacked = self._stacked_B(active)
            return F.linear(packed, stacked.to(packed.dtype)).to(gate_dtype(packed.dtype))
        blocks = self.cached("blocks", self._B_in_blocks).to(packed.dtype)
        width = blocks.shape[-1]
        *full, last = packed.split(width, -1)
        parts = [*full, F.pad(last, (0, width - last.shape[-1]))]
        lifted = [F.linear(part.contiguous(), block) for part, block in zip(parts, blocks, strict=True)]
        return reduce(torch.add, (part.to(gate_dtype(packed.dtype)) for part in lifted))

    def _B_in_blocks(self) -> Tensor:  # (blocks, out, BLOCK * r)
        stacked, width = self._stacked_B(None), BLOCK * self.rank
        return torch.stack(F.pad(stacked, (0, -stacked.shape[1] % width)).split(width, dim=1))

    def _pad(self, weight: Tensor, dim: int) -> Tensor:
        missing = self.rank - weight.shape[dim]
        if missing == 0:
            return weight
        return F.pad(weight, (0, 0, 0, missing) if dim == 0 else (0, missing))

    def _scaling_like(self, tensor: Tensor) -> Tensor:
        # Kept as Python floats, never as a buffer: `.to(bfloat16)` would round a scaling like 32 / sqrt(6).
        return torch.tensor(self.scaling, dtype=gate_dtype(tensor.dtype), device=tensor.device)

    def extra_repr(self) -> str:
        """Summarise the bank for ``print(model)``."""
        sizes = f"rank={self.rank}, in={self.in_features}, out={self.out_features}"
        return f"experts={self.num_experts}, {sizes}, trainable={self.trainable}"
