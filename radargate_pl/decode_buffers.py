"""What `DecodeMixture` writes to, made once for each number of tokens (layer 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from radargate_pl.decode_mixture import DecodeMixture

MASKED_RANKS = 128  # up to so many ranks of all experts, masked latents times all of B beat gathering B


class Buffers:
    """What a plan writes to for one number of tokens, and every view of it, made once.

    Args:
        plan: the plan.
        tokens: T.
    """

    def __init__(self, plan: DecodeMixture, tokens: int) -> None:
        kind, self.plan, self.tokens = plan.kind, plan, tokens
        self.members, self.ranks = len(plan.banks), kind.experts * kind.rank
        too_many = tokens * kind.kept > kind.experts
        self.is_masked = not plan.gathers_A and (self.ranks <= MASKED_RANKS or too_many or kind.kept == kind.experts)
        self.lora_B = plan.lora_B.view(self.members, self.ranks, plan.width)
        self._make_fused()
        self._make_selection()
        self.mixed = self._empty(self.members * tokens, 1, plan.width)
        by_member = self.mixed.view(self.members, tokens, plan.width)
        if kind.rotation_rank:
            self._make_rotated()
        elif self.is_masked:
            self.spread = self._empty(self.members, tokens, kind.experts)
            self.packed = self._empty(self.members, tokens, kind.experts, kind.rank)
            self.flat_packed = self.packed.flatten(2)
            self.lifted = by_member
        self.updates = [part[:, :width] for part, width in zip(by_member, plan.widths, strict=True)]

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.plan.dtype, device=self.plan.kind.device)

    def _make_fused(self) -> None:
        plan, kind, logits = self.plan, self.plan.kind, self.members * self.plan.kind.experts
        self.fused = self._empty(self.tokens, plan.fused.shape[1])
        self.logits = self.fused[:, :logits].unflatten(1, (self.members, kind.experts)).transpose(0, 1)
        self.narrow = self._empty(self.tokens, self.members * self.ranks) if plan.narrow_A is not None else None
        rest = self.fused[:, logits:] if self.narrow is None else self.narrow
        self.totals = rest.split(plan.widths, 1) if plan.collapses else None
        if not plan.gathers_A:
            self.latents = rest.unflatten(1, (self.members, kind.experts, kind.rank)).transpose(0, 1)  # (M, T, E, r)

    def _make_selection(self) -> None:
        kind, shape = self.plan.kind, (self.members, self.tokens, self.plan.kind.experts)
        self.every = torch.arange(kind.experts, device=kind.device)
        if kind.kept == kind.experts:
            return
        self.sorted = (self._empty(*shape), self._empty(*shape, dtype=torch.int64))
        self.best, self.kept = (part[..., : kind.kept] for part in self.sorted)
        self.kept_column = self.kept.unsqueeze(-1)
        self.kept_latents = self.kept_column.expand(-1, -1, -1, kind.rank)
        self.rows = self._empty(*shape[:2], kind.kept, dtype=torch.int64)
        self.flat_rows = self.rows.view(-1)
        self.h = self._empty(*shape[:2], kind.kept, kind.rank)
        self.h_columns = self.h.view(self.members, self.tokens, -1, 1)

    def _make_rotated(self) -> None:
        plan, kind = self.plan, self.plan.kind
        kept = (self.tokens, kind.kept, plan.width)
        if self.is_masked:
            self._make_masked()
            self.pair = self.lifted.view(self.members, 2, *kept)
            self.v, self.others = self.pair.unbind(1)
        else:
            # The columns that pad S - v stay zero: nothing writes to them.
            self.pair = self._empty(2, self.members, *kept).zero_()
            self.v, self.others = self.pair
            self.flat_v = self.v.view(-1, 1, plan.width)
            self._make_totals()
        self.product = self._empty(self.members, *kept)
        self.flat_product = self.product.view(self.members, -1, plan.width)
        self.z = self._empty(self.members, self.tokens * kind.kept, kind.rotation_rank)
        self.rows_of_z = self.z.view(self.members, *kept[:2], -1)
        if plan.floor is not None:
            self.norms = self._empty(*self.pair.shape[:-1], 1)
            self.norm_v, self.norm_others = self.norms.unbind(1 if self.is_masked else 0)
            self.floor = plan.floor.unsqueeze(-1).unsqueeze(-1) if self.is_masked else plan.floor.unsqueeze(-1)
        self.turns = self._empty(self.members, self.tokens * kind.kept, plan.width)
        self.turn_planes = _planes(self.turns).view(self.members, *kept[:2], -1)
        self.v_planes = _planes(self.v)
        turned = self._empty(self.members, *kept)
        self.turned_planes, self.turned = _planes(turned), turned.view(-1, kind.kept, plan.width)

    def _make_masked(self) -> None:
        kind = self.plan.kind
        rows = (self.members, 2, self.tokens, kind.kept, kind.experts)
        self.mask = self._empty(*rows)
        self.mask_of_kept, self.mask_of_others = self.mask.unbind(1)
        if kind.kept == kind.experts:
            self.mask_of_kept.copy_(torch.eye(kind.experts))
            self.mask_of_others.copy_(1 - torch.eye(kind.experts))
        self.mask_column, self.latents_row = self.mask.unsqueeze(-1), self.latents[:, None, :, None]
        self.packed = self._empty(*rows, kind.rank)
        self.flat_packed = self.packed.view(self.members, -1, self.ranks)
        self.lifted = self._empty(self.members, self.flat_packed.shape[1], self.plan.width)

    def _make_totals(self) -> None:
        totals = self.totals
        if totals is None:
            totals = [self._empty(self.tokens, width) for width in self.plan.widths]
            parts = zip(self.latents.flatten(2), self.lora_B, totals, strict=True)
            self.total_parts = [(h, lora_B[:, : total.shape[1]], total) for h, lora_B, total in parts]
        pairs = zip(totals, self.v, self.others, strict=True)
        self.other_parts = [
            (total.unsqueeze(1), v[..., : total.shape[1]], others[..., : total.shape[1]]) for total, v, others in pairs
        ]


def _planes(v: Tensor) -> Tensor:
    return torch.view_as_complex(v.unflatten(-1, (-1, 2)))
