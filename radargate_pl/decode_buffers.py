"""What `DecodeMixture` writes to, made once for each number of tokens (layer 2)."""

from __future__ import annotations

import threading
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from radargate_pl.decode_kinds import Kind
from radargate_pl.ops import gate_dtype

MASKED_RANKS = 128  # up to so many ranks of all experts, masked latents times all of B beat gathering B


class Layout(NamedTuple):
    """What the buffers depend on.

    Attributes:
        kind: of the members.
        widths: their ``out``.
        tokens: T.
        gathers_A: whether only the kept experts' latents are made.
    """

    kind: Kind
    widths: tuple[int, ...]
    tokens: int
    gathers_A: bool


class Buffers:
    """Tensors of intermediate results, and every view of them that a step needs.

    All layers of a network with one layout write to the same: what they touch then stays in the processor's cache.

    Args:
        layout: what to make them for.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout, kind = layout, layout.kind
        self._dtype, self._width = gate_dtype(kind.dtype), max(layout.widths) + max(layout.widths) % 2
        self._members, self._ranks = len(layout.widths), kind.experts * kind.rank
        is_all = kind.kept == kind.experts or layout.tokens * kind.kept > kind.experts
        self.is_masked = not layout.gathers_A and (self._ranks <= MASKED_RANKS or is_all)
        self._make_fused()
        if kind.kept < kind.experts:
            self._make_selection()
        if kind.rotation_rank:
            self._make_lifted()
            self._make_turned()
        elif self.is_masked:
            self.spread = self._empty(self._members, layout.tokens, kind.experts)
            self.packed = self._empty(*self.spread.shape, kind.rank)
            self.flat_packed = self.packed.flatten(2)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._layout.kind.device)

    def _make_fused(self) -> None:
        layout, kind, members = self._layout, self._layout.kind, self._members
        logits, latents = members * kind.experts, members * self._ranks
        is_narrow, collapses = kind.dtype != self._dtype, layout.gathers_A and kind.rotation_rank > 0
        rest = sum(layout.widths) if collapses else 0 if layout.gathers_A or is_narrow else latents
        self.fused = self._empty(layout.tokens, logits + rest)
        self.logits = self.fused[:, :logits].unflatten(1, (members, kind.experts)).transpose(0, 1)
        self.narrow = self._empty(layout.tokens, latents) if is_narrow else None
        made = self.fused[:, logits:] if self.narrow is None else self.narrow
        if collapses:
            self.totals = made.split(layout.widths, 1)
            return
        self.totals = tuple(self._empty(layout.tokens, width) for width in layout.widths)
        if not layout.gathers_A:
            self.latents = made.unflatten(1, (members, kind.experts, kind.rank)).transpose(0, 1)  # (M, T, E, r)
            self.all_latents = self.latents.flatten(2).unbind(0)

    def _make_selection(self) -> None:
        kind, shape = self._layout.kind, (self._members, self._layout.tokens, self._layout.kind.experts)
        self.sorted = (self._empty(*shape), self._empty(*shape, dtype=torch.int64))
        self.best, self.kept = (part[..., : kind.kept] for part in self.sorted)
        self.kept_experts = self.kept.unbind(0)
        self.rows = self._empty(*self.kept.shape, dtype=torch.int64)
        self.flat_rows = self.rows.view(-1)
        self.h = self._empty(*self.kept.shape, kind.rank)
        self.h_columns = self.h.view(*shape[:2], -1, 1).unbind(0)
        self.kept_latents = self.kept.unsqueeze(-1).expand(self.h.shape)

    def _make_lifted(self) -> None:
        layout, kind = self._layout, self._layout.kind
        kept = (layout.tokens, kind.kept, self._width)
        if self.is_masked:
            self._make_masked()
            self.pair = self.lifted.view(self._members, 2, *kept)
            self.v, self.others = self.pair.unbind(1)
            return
        # The columns that pad S - v stay zero: nothing writes to them.
        self.pair = self._empty(2, self._members, *kept).zero_()
        self.v, self.others = self.pair
        self.flat_v = self.v.view(-1, 1, self._width)
        self.other_parts = [
            (total.unsqueeze(1), v[..., : total.shape[1]], others[..., : total.shape[1]])
            for total, v, others in zip(self.totals, self.v, self.others, strict=True)
        ]

    def _make_masked(self) -> None:
        kind = self._layout.kind
        mask = self._empty(self._members, 2, self._layout.tokens, kind.kept, kind.experts)
        self.mask_of_kept, self.mask_of_others = mask.unbind(1)
        if kind.kept < kind.experts:
            self.every, self.kept_column = torch.arange(kind.experts, device=kind.device), self.kept.unsqueeze(-1)
        else:
            self.mask_of_kept.copy_(torch.eye(kind.experts))
            self.mask_of_others.copy_(1 - torch.eye(kind.experts))
        self.mask_column, self.latents_row = mask.unsqueeze(-1), self.latents[:, None, :, None]
        self.packed = self._empty(*mask.shape, kind.rank)
        self.flat_packed = self.packed.view(self._members, -1, self._ranks)
        self.lifted = self._empty(*self.flat_packed.shape[:2], self._width)

    def _make_turned(self) -> None:
        kind, shape = self._layout.kind, self.v.shape  # (M, T, K, D)
        self.product = self._empty(*shape)
        self.flat_product = self.product.view(shape[0], -1, shape[-1])
        self.z = self._empty(*self.flat_product.shape[:2], kind.rotation_rank)
        self.rows_of_z = self.z.view(*shape[:3], -1)
        self.norms = self._empty(*self.pair.shape[:-1], 1)
        self.norm_v, self.norm_others = self.norms.unbind(1 if self.is_masked else 0)
        self.turns = self._empty(*self.flat_product.shape)
        turned = self._empty(*shape)
        self.turn_planes, self.v_planes = _planes(self.turns).view(*shape[:3], -1), _planes(self.v)
        self.turned_planes, self.turned = _planes(turned), turned.view(-1, *shape[2:])


_shared: WeakValueDictionary[tuple[int, Layout], Buffers] = WeakValueDictionary()


def buffers_for(layout: Layout) -> Buffers:
    """Return the buffers of a layout that all plans of this thread share."""
    key = threading.get_ident(), layout
    buffers = _shared.get(key)
    if buffers is None:
        buffers = _shared[key] = Buffers(layout)
    return buffers


def _planes(v: Tensor) -> Tensor:
    """Neighbouring pairs as complex numbers."""
    return torch.view_as_complex(v.unflatten(-1, (-1, 2)))
