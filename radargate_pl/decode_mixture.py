"""The updates of several mixture layers that read one input, for a few tokens without gradients (layer 2).

A decode step is bound by the number of its small operations and by the weights it reads, not by arithmetic. Layers with
equally many experts and the same kind of gate are computed side by side ("members", padded with zeros to the widest),
from matrices fused once and into buffers made once. `mix` and the gates state the formulas; tests compare the two.

Symbols in comments: M members, T tokens, K kept experts, E experts, r rank, D the largest ``out``, made even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from radargate_pl.decode_buffers import MASKED_RANKS, Buffers, Layout, buffers_for
from radargate_pl.decode_kinds import Kind
from radargate_pl.experts import ExpertBank
from radargate_pl.gates import StretchGate
from radargate_pl.ops import RMS_EPS, gate_dtype
from radargate_pl.rotations import RadarRotation

if TYPE_CHECKING:
    from radargate_pl.moe import MoELinear

MOST_KEPT = 64  # kept outputs of all tokens together; above, one GEMM over all experts is cheaper
COLLAPSED_SHARE = 0.8  # of the weights read through the latents, from which S = x W_sum is preferred


class Step(NamedTuple):
    """What a number of tokens needs: buffers that plans share, and results, which wait for members yet to be called.

    Attributes:
        buffers: see `Buffers`.
        mixed: the updates of all members, (M * T, 1, D).
        updates: the same, (..., out) each.
        flat: shape of the input, (T, in).
        rows: shape of the weights, (M * T, 1, K).
    """

    buffers: Buffers
    mixed: Tensor
    updates: tuple[Tensor, ...]
    flat: tuple[int, int]
    rows: tuple[int, int, int]


class DecodeMixture:
    """Computes the updates of its members; built without gradients from layers of one `Kind`.

    Latents come from all of A, or, where ``S = x W_sum`` reads less than going through all latents, only from the kept
    experts' A. Kept outputs come from masked latents and all of B (few experts), or from the kept experts' B.

    Args:
        layers: the members.
        kind: theirs.
    """

    def __init__(self, layers: Sequence[MoELinear], kind: Kind) -> None:
        self.kind = kind
        self.dtype = gate_dtype(kind.dtype)
        banks = [layer.bank for layer in layers]
        self.widths = [bank.out_features for bank in banks]
        self.width = max(self.widths) + max(self.widths) % 2
        ranks, members = kind.experts * kind.rank, len(layers)
        is_narrow = kind.dtype != self.dtype
        self.gathers_A = is_large(kind) and (collapses(kind, self.widths) or not kind.rotation_rank)
        self.collapses = self.gathers_A and kind.rotation_rank > 0
        # A shared A is a single one. The banks' own tensors: only what is fused is copied.
        self.lora_A = [layer.bank.lora_A.detach().expand(kind.experts, -1, -1) for layer in layers]
        lora_A = [part.flatten(0, 1) for part in self.lora_A]
        gates = [cast(StretchGate, layer.gate) for layer in layers]
        fused: list[Tensor] = [gate.scorer.weight for gate in gates]
        # Banks in a narrower dtype have latents of that dtype: a product of their own.
        self.narrow_A = torch.cat(lora_A) if is_narrow else None
        if self.collapses:
            fused += [total_map(bank, self.dtype) for bank in banks]
        elif not is_narrow and not self.gathers_A:
            fused += lora_A
        self.fused = torch.cat([part.detach().to(self.dtype) for part in fused]).T
        scaled = [_padded(bank._scaled_B(self.dtype).mT, self.width) for bank in banks]
        self.lora_B = torch.cat(scaled)  # (M * E, r, D)
        self.stacked_B = self.lora_B.view(members, ranks, self.width)
        self.member_B = [part[:, :width] for part, width in zip(self.stacked_B, self.widths, strict=True)]
        self.temperature = _per_member([gate_factor(gate, "temperature") for gate in gates], self.fused)
        self.output_scale = _per_member([gate_factor(gate, "output_scale") for gate in gates], self.fused)
        self.first_row = torch.arange(members, device=kind.device).view(-1, 1, 1) * kind.experts
        if kind.rotation_rank:
            self._store_rotation([cast(RadarRotation, gate.rotation) for gate in gates])
        self._steps: dict[torch.Size, Step | None] = {}

    def _store_rotation(self, rotations: Sequence[RadarRotation]) -> None:
        is_normed = self.kind.angle_norm == "rms"
        widths = self.fused.new_tensor(self.widths).view(-1, 1, 1)
        # |v|^2 / D + eps = (|v|^2 + D eps) / D: the D of both norms goes into Q.
        self.flat_floor = (widths * RMS_EPS).sqrt().unsqueeze(-1)
        self.floor = self.flat_floor.unsqueeze(-1) if is_normed else None
        P = [F.pad(rotation.P.detach(), (0, 0, 0, self.width - rotation.P.shape[0])) for rotation in rotations]
        Q = [_padded(rotation.Q.detach(), self.width // 2) for rotation in rotations]
        self.P = torch.stack([part.mT for part in P]).contiguous().mT  # (M, D, r_a), quicker column by column
        # Each angle twice, for cos a = sin(a + pi / 2) and sin a side by side: one sine gives the complex turns.
        self.Q = (torch.stack(Q) * (widths if is_normed else 1)).repeat_interleave(2, dim=-1)  # (M, r_a, D)
        self.quarter = self.Q.new_tensor([math.pi / 2, 0.0]).repeat(self.width // 2)

    def updates(self, x: Tensor) -> Sequence[Tensor] | None:
        """Compute ``sum_i g_i R_i v_i`` of every member: x (..., in) to (..., out) each.

        The results are overwritten by the next call. ``None`` where the general path is cheaper.
        """
        shape = x.shape
        if shape not in self._steps:
            self._steps[shape] = self._new_step(shape)
        step = self._steps[shape]
        if step is None:
            return None
        buffers, mixed = step.buffers, step.mixed
        x = x.reshape(step.flat)
        torch.mm(x if self.narrow_A is None else x.to(self.dtype), self.fused, out=buffers.fused)
        if self.narrow_A is not None and buffers.narrow is not None:
            buffers.narrow.copy_(F.linear(x, self.narrow_A))
        weights = self._weights(buffers)
        if not self.kind.rotation_rank:
            self._sum(x, weights, buffers, mixed)
            return step.updates
        self._lift(x, buffers)
        self._turn(buffers)
        torch.bmm(weights.view(step.rows), buffers.turned, out=mixed)
        return step.updates

    def _new_step(self, shape: torch.Size) -> Step | None:
        tokens, width = shape.numel() // shape[-1], self.width
        kept = tokens * self.kind.kept
        # Nothing here gets wider than the weights: masked latents have 2 T K rows of all ranks.
        is_wide = 2 * kept > max(shape[-1], width)
        if kept > MOST_KEPT or is_wide or (self.gathers_A and kept > self.kind.experts):
            return None
        with torch.inference_mode(False):
            buffers = buffers_for(Layout(self.kind, tuple(self.widths), tokens, self.gathers_A))
            mixed = self.fused.new_empty(len(self.widths) * tokens, 1, width)
            by_member = mixed.view(-1, *shape[:-1], width)
            updates = tuple(part[..., :out] for part, out in zip(by_member, self.widths, strict=True))
        return Step(buffers, mixed, updates, (tokens, shape[-1]), (len(self.widths) * tokens, 1, self.kind.kept))

    def _weights(self, buffers: Buffers) -> Tensor:
        """Weights of the kept experts, (M, T, K), and which these are into the buffers."""
        logits = buffers.logits
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.kind.kept == self.kind.experts:
            weights = logits.softmax(-1)
        else:
            shares = None if self.kind.renormalizes else logits.softmax(-1)
            torch.sort(logits, dim=-1, descending=True, stable=True, out=buffers.sorted)
            weights = buffers.best.softmax(-1) if shares is None else shares.gather(-1, buffers.kept)
            if not buffers.is_masked:
                torch.add(buffers.kept, self.first_row, out=buffers.rows)
        return weights if self.output_scale is None else weights * self.output_scale

    def _sum(self, x: Tensor, weights: Tensor, buffers: Buffers, mixed: Tensor) -> None:
        """Without rotation: one product with all of B, or with the kept experts' B."""
        if not buffers.is_masked:
            packed = self._kept_latents(x, buffers) * weights.unsqueeze(-1)
            lora_B = self.lora_B.index_select(0, buffers.flat_rows)
            kept_ranks = self.kind.kept * self.kind.rank
            packed, lora_B = packed.view(-1, 1, kept_ranks), lora_B.view(-1, kept_ranks, self.width)
            torch.bmm(packed, lora_B, out=mixed)
            return
        if self.kind.kept < self.kind.experts:
            weights = buffers.spread.zero_().scatter_(-1, buffers.kept, weights)
        torch.mul(buffers.latents, weights.unsqueeze(-1), out=buffers.packed)
        torch.bmm(buffers.flat_packed, self.stacked_B, out=mixed.view(len(self.widths), -1, self.width))

    def _lift(self, x: Tensor, buffers: Buffers) -> None:
        """Outputs v of the kept experts, and all others' sum S - v beside them."""
        if buffers.is_masked:
            if self.kind.kept < self.kind.experts:
                torch.eq(buffers.every, buffers.kept_column, out=buffers.mask_of_kept)
                torch.ne(buffers.every, buffers.kept_column, out=buffers.mask_of_others)
            torch.mul(buffers.latents_row, buffers.mask_column, out=buffers.packed)
            torch.bmm(buffers.flat_packed, self.stacked_B, out=buffers.lifted)
            return
        kept_latents = self._kept_latents(x, buffers).view(-1, 1, self.kind.rank)
        torch.bmm(kept_latents, self.lora_B.index_select(0, buffers.flat_rows), out=buffers.flat_v)
        if not self.collapses:
            for latents, lora_B, total in zip(buffers.all_latents, self.member_B, buffers.totals, strict=True):
                torch.mm(latents, lora_B, out=total)
        for total, v, others in buffers.other_parts:
            torch.sub(total, v, out=others)

    def _kept_latents(self, x: Tensor, buffers: Buffers) -> Tensor:
        """Latents of the kept experts, (M, T, K, r)."""
        if not self.gathers_A:
            return torch.gather(buffers.latents, 2, buffers.kept_latents, out=buffers.h)
        tokens, columns = len(x), x.unsqueeze(-1)
        for lora_A, kept, h in zip(self.lora_A, buffers.kept_experts, buffers.h_columns, strict=True):
            gathered = lora_A.index_select(0, kept.reshape(-1)).view(tokens, -1, x.shape[1])
            if tokens == 1:
                torch.bmm(gathered, columns, out=h)
            else:  # a batch of products with one column takes three times as long
                torch.bmm(columns.mT, gathered.mT, out=h.mT)
        return buffers.h

    def _turn(self, buffers: Buffers) -> None:
        """Rotate by ``a = c ((v * (S - v)) P) Q``; see `RadarRotationFunction`."""
        torch.mul(buffers.v, buffers.others, out=buffers.product)
        torch.bmm(buffers.flat_product, self.P, out=buffers.z)
        if self.floor is not None:
            torch.linalg.vector_norm(buffers.pair, dim=-1, keepdim=True, out=buffers.norms)
            torch.hypot(buffers.norms, self.floor if buffers.is_masked else self.flat_floor, out=buffers.norms)
            buffers.rows_of_z.div_(buffers.norm_v).div_(buffers.norm_others)
        if self.kind.angle_bound is None:
            torch.baddbmm(self.quarter, buffers.z, self.Q, out=buffers.turns)
        else:
            torch.bmm(buffers.z, self.Q, out=buffers.turns)
            buffers.turns.div_(self.kind.angle_bound).tanh_().mul_(self.kind.angle_bound).add_(self.quarter)
        buffers.turns.sin_()
        torch.mul(buffers.v_planes, buffers.turn_planes, out=buffers.turned_planes)


def is_large(kind: Kind) -> bool:
    """Tell whether only the kept experts' latents may be made."""
    is_narrow = kind.dtype != gate_dtype(kind.dtype)
    return kind.experts * kind.rank > MASKED_RANKS and not is_narrow and kind.kept < kind.experts


def collapses(kind: Kind, widths: Sequence[int]) -> bool:
    """Tell whether ``S = x W_sum`` reads less than going through all latents, for members of these widths."""
    read = kind.experts * kind.rank * sum(kind.in_features + width for width in widths)
    return is_large(kind) and kind.in_features * sum(widths) <= COLLAPSED_SHARE * read


def _padded(matrix: Tensor, columns: int) -> Tensor:
    return F.pad(matrix, (0, columns - matrix.shape[-1]))


def total_map(bank: ExpertBank, dtype: torch.dtype) -> Tensor:
    """``W_sum^T = (sum_i A_i B_i)^T``, (out, in), scaling included."""
    lora_A = bank.lora_A.expand(bank.num_experts, -1, -1).to(dtype).flatten(0, 1)
    return bank._scaled_B(dtype).transpose(0, 1).flatten(1) @ lora_A


def gate_factor(gate: StretchGate, name: str) -> float | Tensor:
    """Return a gate's "temperature" or "output_scale", a number or what was learned."""
    learned = gate.log_temperature if name == "temperature" else gate.output_scale_weight
    if learned is None:
        return float(getattr(gate, name))
    return learned.detach().exp() if name == "temperature" else learned.detach()


def _per_member(factors: Sequence[float | Tensor], like: Tensor) -> Tensor | None:
    """Factors as (M, 1, 1), or ``None`` where all are one."""
    if all(not isinstance(factor, Tensor) and factor == 1 for factor in factors):
        return None
    return torch.cat([f.view(1) if isinstance(f, Tensor) else like.new_tensor([f]) for f in factors]).view(-1, 1, 1)
