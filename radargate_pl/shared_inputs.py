"""Layers that read one input read it once while a model decodes (layer 2).

q, k and v of an attention (gate and up of an MLP) are called with one and the same tensor. For a few tokens without
gradients, the first of them that is called computes the updates of all. Who belongs together is watched in one decode
step, by the identity of the input and never by the order of the calls; a wrong guess costs time, nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from radargate_pl.decode_kinds import Kind, hooks_of, kind_of, settings_of
from radargate_pl.decode_mixture import DecodeMixture
from radargate_pl.native_decode import NativeDecodeMixture, suits_native
from radargate_pl.ops import is_transformed
from radargate_pl.remembered import Snapshot

if TYPE_CHECKING:
    from radargate_pl.moe import MoELinear

FEW_TOKENS = 16  # above, the general path is as quick: it reads the weights once for all tokens
MOST_MISTAKES = 3  # after so many wrong guesses every layer goes alone


class Reading(NamedTuple):
    """An input a layer was called with, and its version then (`None` where writes are not counted)."""

    layer: MoELinear
    x: Tensor
    version: int | None


class Together:
    """Layers computed together, and what their plan was made from.

    Args:
        layers: the layers, of one kind.
        kind: theirs.
    """

    def __init__(self, layers: Sequence[MoELinear], kind: Kind) -> None:
        self.layers = tuple(layers)
        self.uses = 0
        parts = [part for layer in layers for part in (layer.bank, layer.gate)]
        self._snapshot = Snapshot(parts, [setting for layer in layers for setting in settings_of(layer)])
        self._hooks = [hooks for layer in layers for hooks in hooks_of(layer)]
        # Lightning validates in inference mode: a plan made there would not notice later changes.
        with torch.inference_mode(False), torch.no_grad():
            form = NativeDecodeMixture if suits_native(layers, kind) else DecodeMixture
            self.plan: NativeDecodeMixture | DecodeMixture | None = form(layers, kind)

    def is_current(self) -> bool:
        """Whether there is a plan, and all parameters and settings are those it was made from."""
        return self.plan is not None and self._snapshot.is_current() and not any(self._hooks)


class SharedInput:
    """What the mixture layers inside one module do about the inputs they share; one object for all of them.

    It serves one thread; others take the general path, as do layers with a recorder, and gates, rotations and
    combinations that `kind_of` does not know.
    """

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[type[SharedInput], tuple[()]]:
        """Copy and pickle as a fresh one."""
        return SharedInput, ()

    def forget(self) -> None:
        """Drop everything that was made from parameters, and what was seen."""
        self._groups: dict[MoELinear, Together] = {}
        self._readings: list[Reading] = []
        # Updates computed for an input that their layers have not asked for yet.
        self._ready: dict[MoELinear, Tensor] = {}
        self._x: Tensor | None = None
        self._version: int | None = None
        self._content: Tensor | None = None  # instead of a version in inference mode, where writes are not counted
        self._mistakes = 0
        self._wasted = 0  # plans in a row of one use each: weights that are written, or gathered, at every step
        self._has_plans = False
        self._thread: int | None = None

    def update(self, layer: MoELinear, x: Tensor) -> Tensor | None:
        """Return the update of a layer, (..., out) float32, for the caller to use at once; ``None``: general path.

        Args:
            layer: the layer that was called.
            x: its input, (..., in).
        """
        if torch.is_grad_enabled():
            self.drop_plans()
            return None
        if self._thread is not None and self._thread != threading.get_ident():
            return None
        if layer.recorder is not None or not _is_decoding(layer, x):
            self._drop_results()
            return None
        if self._ready:
            if self._x is not x or not self._is_unchanged(x):
                self._separate()  # somebody did not ask for what was computed with the others
            elif layer in self._ready:
                return self._take(layer)
        group = self._group_of(layer, x)
        if group is None or group.plan is None or x.dtype != group.plan.kind.dtype:
            return None
        updates = group.plan.updates(x)
        if updates is None:
            return None
        group.uses += 1
        for member, update in zip(group.layers, updates, strict=True):
            self._ready[member] = update
        if self._x is not x:
            self._x, self._version = x, _version(x)
            self._content = x.clone() if self._version is None else None
        return self._take(layer)

    def drop_plans(self) -> None:
        """Drop what was made from parameters, and keep what was seen.

        With gradients an optimiser may step next, and a fused one leaves no trace in the versions.
        """
        if self._has_plans:
            for group in self._groups.values():
                group.plan = None
            self._has_plans = False
            self._drop_results()

    def _drop_results(self) -> None:
        self._ready, self._x, self._content = {}, None, None

    def _take(self, layer: MoELinear) -> Tensor:
        update = self._ready.pop(layer)
        if not self._ready:
            self._x = self._content = None
        return update

    def _is_unchanged(self, x: Tensor) -> bool:
        return torch.equal(x, self._content) if self._content is not None else _version(x) == self._version

    def _separate(self) -> None:
        self._drop_results()
        self._mistakes += 1
        self._groups, self._readings = {}, []

    def _group_of(self, layer: MoELinear, x: Tensor) -> Together | None:
        group = self._groups.get(layer)
        if group is not None and group.is_current():
            return group
        if kind_of(layer) is None or self._wasted > MOST_MISTAKES:
            return None
        self._thread = threading.get_ident()
        if group is not None:  # parameters changed, readers did not
            self._wasted = self._wasted + 1 if group.plan is not None and group.uses == 1 else 0
            self._make_groups(group.layers)
            return self._groups.get(layer)
        if self._mistakes >= MOST_MISTAKES:
            self._make_groups([layer])
        elif any(reading.layer is layer for reading in self._readings):  # a new step: everyone has read
            for readers in _readers_of_one_input(self._readings):
                self._make_groups(readers)
            self._readings = []
        else:
            self._readings.append(Reading(layer, x, _version(x)))
        return self._groups.get(layer)

    def _make_groups(self, readers: Sequence[MoELinear]) -> None:
        alike: dict[Kind, list[MoELinear]] = {}
        for reader in readers:
            self._groups.pop(reader, None)
            kind = kind_of(reader)
            if kind is not None:
                alike.setdefault(kind, []).append(reader)
        for kind, layers in alike.items():
            group, self._has_plans = Together(layers, kind), True
            self._groups.update(dict.fromkeys(layers, group))


def _is_decoding(layer: MoELinear, x: Tensor) -> bool:
    return (
        0 < x.numel() <= FEW_TOKENS * x.shape[-1]
        and type(x) is Tensor
        and layer.mixture != "plain"
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and not is_transformed()
    )


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _readers_of_one_input(readings: Sequence[Reading]) -> list[list[MoELinear]]:
    groups: dict[tuple[int, int | None], list[MoELinear]] = {}
    for reading in readings:
        groups.setdefault((id(reading.x), reading.version), []).append(reading.layer)
    return list(groups.values())
