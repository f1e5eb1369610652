"""PEFT adapters into experts: found, checked against the backbone, read. Tensors in the file are the truth."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from radargate_pl.adapter_checks import backbone_misfits, config_misfits, dead_layers, record_misfits
from radargate_pl.adapter_config import CONFIG_FILE, fingerprinted_fields, read_lora_config, scaling_of
from radargate_pl.domains import DOMAIN_FILE, read_domain
from radargate_pl.expert_files import EXPERT_FILE, WEIGHTS_FILE, read_expert_record, read_tensors, save_adapter
from radargate_pl.fingerprints import fingerprint_state, fingerprint_tensors
from radargate_pl.hub import hub_error, is_hub_id
from radargate_pl.layer_patterns import check_patterns
from radargate_pl.near_paths import lies_here, nearest_paths
from radargate_pl.targets import paths_of_config, target_linears

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adapter", "load_adapters", "resolve_adapters", "save_adapter", "target_linears"]

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class Adapter:
    """One LoRA as read from its folder, in the dtype of the file.

    Attributes:
        name: of the expert.
        folder: where it lies.
        fingerprint: SHA-256 of its tensors and of what scales them.
        scaling: module path inside the backbone to the factor after B.
        lora_A: module path to (r, in).
        lora_B: module path to (out, r).
        shared_A: whether it was saved as one of several experts with one A; those read together hold the same tensors.
        domain: embedding of its training data, (m,) float32, where `radargate_pl.domains` made one.
        base_model: name of the backbone as PEFT wrote it, where no `expert.json` knows its fingerprint.
    """

    name: str
    folder: Path
    fingerprint: str
    scaling: dict[str, float]
    lora_A: dict[str, Tensor]
    lora_B: dict[str, Tensor]
    shared_A: bool
    domain: Tensor | None = None
    base_model: str | None = None


def resolve_adapters(experts: str | Sequence[str] | Mapping[str, str]) -> dict[str, Path]:
    """Find the adapter folders, in the order that gives the experts their ids.

    Args:
        experts: a folder of PEFT folders (sorted by name; or one PEFT folder), a list of paths or hub ids, or a dict
            of name to path or hub id. Names are folder names, with `_` for characters outside `A-Za-z0-9_-`.

    Returns:
        Expert name to folder.

    Raises:
        ValueError: something is missing or two names are equal; one line per problem.
    """
    problems: list[str] = []
    folders = _resolve(experts, problems)
    _raise(problems)
    return folders


def load_adapters(
    experts: str | Sequence[str] | Mapping[str, str], model: nn.Module, *, backbone_fingerprint: str | None = None
) -> list[Adapter]:
    """Read adapters and check each against the backbone.

    Args:
        experts: as in `resolve_adapters`.
        model: the backbone, without any adapter on it.
        backbone_fingerprint: of the loaded backbone; adapters whose `expert.json` names another one are refused.

    Raises:
        ValueError: anything is wrong with any of them; one line per problem of all of them.
    """
    problems: list[str] = []
    adapters = []
    for name, folder in _resolve(experts, problems).items():
        try:
            adapters.append(_load(name, folder, model, backbone_fingerprint))
        except ValueError as error:
            problems += [f"adapter {name!r} ({folder}): {line}" for line in str(error).splitlines()]
    _raise(problems)
    _share_tensors(adapters)
    for adapter in adapters:
        _say_what_is_odd(adapter, getattr(getattr(model, "config", None), "_name_or_path", ""))
    return adapters


def fingerprint_of(folder: Path) -> str:
    """SHA-256 of an adapter's tensors and of what scales them.

    Args:
        folder: a PEFT folder.

    Raises:
        ValueError: it is none, or damaged.
    """
    return fingerprint_tensors([folder / WEIGHTS_FILE], fingerprinted_fields(read_lora_config(folder)))


def _say_what_is_odd(adapter: Adapter, backbone: str) -> None:
    """One line each for what is no mistake for certain: an expert that does nothing, another base model's name."""
    dead = dead_layers(adapter.lora_B, adapter.scaling)
    if len(dead) == len(adapter.lora_B):
        rank_zero_warn(
            f"expert {adapter.name!r} ({adapter.folder}) changes nothing: all of its B are zero, or its lora_alpha is. "
            "It was never trained, or its trained weights were not what was saved."
        )
    elif dead:
        rank_zero_info(f"expert {adapter.name!r} changes nothing in {len(dead)} layers (zero B), e.g. {dead[0]}")
    named = adapter.base_model
    if named and backbone and Path(named).name.lower() != Path(str(backbone)).name.lower():
        rank_zero_info(f"expert {adapter.name!r} names the base model {named}; it is used over {backbone}")


def _raise(problems: list[str]) -> None:
    if problems:
        shown = [*problems[:5], *([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])]
        lines = "".join(f"\n  - {problem}" for problem in shown)
        raise ValueError(
            f"Expected experts to be LoRA adapters for this backbone, but found {len(problems)} problem(s):{lines}"
        )


def _resolve(experts: str | Sequence[str] | Mapping[str, str], problems: list[str]) -> dict[str, Path]:
    if isinstance(experts, str):
        return _in_folder(Path(experts).expanduser(), problems)
    if isinstance(experts, Mapping):
        pairs: list[tuple[str, str]] = list(experts.items())
        problems += [
            f"Expected expert names of letters, digits, _ and -, but got {name!r}."
            for name, _ in pairs
            if not NAME.fullmatch(name)
        ]
    else:
        pairs = [(_name(where), where) for where in experts]
    folders: dict[str, Path] = {}
    for name, where in pairs:
        if name in folders:
            problems.append(
                f"Expected different names, but {where!r} and {str(folders[name])!r} are both called {name!r}. "
                "Name them: experts: {name: path or hub id}."
            )
            continue
        try:
            folders[name] = _located(where)
        except ValueError as error:
            problems.append(f"adapter {name!r}: {error}")
    return folders


def _in_folder(parent: Path, problems: list[str]) -> dict[str, Path]:
    if not parent.is_dir():
        problems.append(
            f"There is no folder {str(parent)!r}. Give a folder of PEFT folders, a list, or {{name: path or hub id}}."
        )
        return {}
    if (parent / CONFIG_FILE).is_file():
        return {_name(parent.resolve().name): parent}
    folders: dict[str, Path] = {}
    # Names with a dot in front are half-written or hidden folders.
    for folder in sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if not (folder / CONFIG_FILE).is_file():
            problems += _no_adapter(folder)
        elif _name(folder.name) in folders:
            problems.append(f"Two folders in {str(parent)!r} give the name {_name(folder.name)!r}: rename one.")
        else:
            folders[_name(folder.name)] = folder
    if not folders and not problems:
        inside = parent / "experts"
        hint = f" Did you mean {str(inside)!r}?" if inside.is_dir() else ""
        problems.append(f"The folder {str(parent)!r} holds no PEFT folders.{hint}")
    return folders


def _no_adapter(folder: Path) -> list[str]:
    """What is wrong with a folder among adapters that is none; nothing if it holds no part of one (event files)."""
    inside = sorted((path.parent for path in folder.glob(f"*/{CONFIG_FILE}")), key=_number_at_the_end)
    if inside:
        return [f"The folder {str(folder)!r} has no {CONFIG_FILE}, but {str(inside[-1])!r} has: give that one by name."]
    if any(folder.glob("adapter_*")) or any(folder.glob("*.safetensors")):
        return [f"The folder {str(folder)!r} has no {CONFIG_FILE}: move it elsewhere, or restore the file."]
    rank_zero_info(f"{folder} holds no adapter and is left out")
    return []


def _number_at_the_end(folder: Path) -> tuple[int, str]:
    digits = re.search(r"\d+$", folder.name)
    return int(digits[0]) if digits else -1, folder.name


def _name(where: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", Path(where).name)


def _located(where: str) -> Path:
    """The folder of one adapter, fetched if it is a hub id."""
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(where) or "/" not in where or lies_here(where):
        raise ValueError(f"Expected a PEFT folder or a hub id, but there is no folder {where!r}.{nearest_paths(where)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, EXPERT_FILE, DOMAIN_FILE]))
    except (OSError, ValueError) as error:
        raise hub_error("adapter", where, error) from error


def _load(name: str, folder: Path, model: nn.Module, backbone_fingerprint: str | None) -> Adapter:
    problems: list[str] = []
    config = _tried(read_lora_config, folder, problems)
    tensors = _tried(read_tensors, folder, problems)
    record = _tried(read_expert_record, folder, problems)
    if config is None or tensors is None:
        raise ValueError("\n".join(problems))
    lora_A, lora_B = tensors
    check_patterns(config, model)
    problems += backbone_misfits(model, lora_A, lora_B)
    problems += config_misfits(config, lora_A, paths_of_config(model, config))
    fingerprint = fingerprint_of(folder)
    if record is not None:
        problems += record_misfits(record, fingerprint, backbone_fingerprint)
    domain = _tried(partial(read_domain, backbone_fingerprint=backbone_fingerprint), folder, problems)
    if problems:
        raise ValueError("\n".join(problems))
    hash_of_A = None if record is None else record["shared_A"]
    shared_A = hash_of_A is not None and hash_of_A == fingerprint_state(lora_A)  # reads every page
    scaling = {path: scaling_of(config, path) for path in lora_A}
    base_model = config.base_model_name_or_path if record is None else None
    return Adapter(name, folder, fingerprint, scaling, lora_A, lora_B, shared_A, domain, base_model)


def _tried(read: Callable[[Path], T], folder: Path, problems: list[str]) -> T | None:
    try:
        return read(folder)
    except ValueError as error:
        problems += str(error).splitlines()
        return None


def _share_tensors(adapters: list[Adapter]) -> None:
    """Give adapters that were saved with one A the same tensor objects again."""
    first: dict[str, dict[str, Tensor]] = {}
    for adapter in adapters:
        if adapter.shared_A:
            adapter.lora_A = dict(first.setdefault(fingerprint_state(adapter.lora_A), adapter.lora_A))
