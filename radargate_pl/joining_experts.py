"""Experts that join a fitted gate without training (layer 3)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from radargate_pl.adapters import resolve_adapters
from radargate_pl.notices import say_once


def with_new_experts(
    experts: str | list[str] | dict[str, str], new: Mapping[str, str], gate: partial[Any]
) -> dict[str, str]:
    """Put new experts behind a gate's own.

    Args:
        experts: those the gate was fitted with, as in `GatedNetwork`.
        new: name to path or hub id.
        gate: what makes the gate.

    Returns:
        Name to path of all.

    Raises:
        ValueError: when the gate is not made for experts that join, or a name is taken.
    """
    gate_class: Any = gate.func
    if not gate_class.takes_new_experts:
        raise ValueError(
            f"Expected a gate that experts can join without training (NexusGate, ArrowGate) for add_experts, but "
            f"{gate_class.__name__} is not made for that. Build or fit it over all of them."
        )
    before: dict[str, Path] = resolve_adapters(experts)
    taken = sorted(set(before) & set(new))
    if taken:
        raise ValueError(
            f"Expected add_experts to have new names, but {taken} are names of the gate's experts already."
        )
    return {name: str(folder) for name, folder in before.items()} | dict(new)


def without_new_experts(fingerprints: Mapping[str, Any], new: Mapping[str, str]) -> dict[str, Any]:
    """Return a network's fingerprints without those of the experts that joined."""
    experts = {name: value for name, value in fingerprints["experts"].items() if name not in new}
    return {**fingerprints, "experts": experts}


def with_new_rows(saved: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the rows of experts that joined, which a fresh gate made from their own files, behind the saved ones.

    Rotations that hold parameters of each expert start at no rotation: experts that join are stretched only, which is
    said once. Where one has a larger rank than the others, their further planes do not turn.

    Args:
        saved: the saved gate's tensors.
        fresh: those of the same gate, made anew over all experts.

    Returns:
        The saved tensors, larger where the fresh ones are.

    Raises:
        ValueError: when new experts have layers at which the gate was not fitted, or bring rows of another width.
    """
    without = sorted({key.partition(".gate.")[0] for key in fresh if key not in saved})
    if without:
        raise ValueError(
            f"Expected experts that join to have no layers but those the gate was fitted at, but they bring {without}. "
            "Fit a gate over all of them."
        )
    return {key: _extended(key, tensor, fresh[key].cpu()) if key in fresh else tensor for key, tensor in saved.items()}


def _extended(key: str, saved: Tensor, fresh: Tensor) -> Tensor:
    if saved.shape == fresh.shape or saved.dim() != fresh.dim():
        return saved
    rotates = ".gate.rotation." in key
    if not rotates and saved.shape[1:] != fresh.shape[1:]:
        raise ValueError(
            f"Expected experts that join to bring rows of shape {tuple(saved.shape[1:])} for {key}, but got "
            f"{tuple(fresh.shape[1:])}. Make their domain embeddings as those of the others were made."
        )
    if rotates:
        say_once(
            "The gate's rotation has parameters of each expert: the experts that joined are not rotated until it is "
            "fitted over all of them."
        )
    extended = fresh.clone()
    extended[tuple(slice(0, size) for size in saved.shape)] = saved
    return extended
