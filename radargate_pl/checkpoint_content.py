"""Is a checkpoint file, whole by its checksum, one of ours, and one that a run can go on from? (layer 5)."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radargate_pl.checkpoint import FORMAT_VERSION, SECTION
from radargate_pl.gate_fields import check_numbers


def check_content(path: Path, command: str) -> None:
    """Refuse a file that holds something else than a checkpoint of radargate, before anything is built.

    Args:
        path: a ``.ckpt`` file; read as data, no code in it is run.
        command: ``fit``, ``validate``, ``test`` or ``predict``; only a fit needs optimiser and loops.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:160]
        raise ValueError(_refusal(path, f"it cannot be read as data ({reason})")) from error
    problem = _problem(content) or (_missing_for_fit(content) if command == "fit" else "")
    if problem:
        raise ValueError(_refusal(path, problem))
    check_numbers(content["state_dict"], str(path))


def _refusal(path: Path, problem: str) -> str:
    return (
        f"Expected {path} to be a checkpoint written by radargate, but {problem}. Nothing in it was used; give a file "
        "from checkpoints/ of a run folder, or --ckpt_path auto for the newest whole one."
    )


def _problem(content: Any) -> str:
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    section, state = content.get(SECTION, {}), content.get("state_dict")
    if SECTION not in content:
        return f"it has no section {SECTION!r}, only {', '.join(sorted(map(str, content))[:8])}"
    version = section.get("format_version") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(version, int) or isinstance(version, bool) or version < 1:
        return f"its section {SECTION!r} is damaged"
    if version > FORMAT_VERSION:
        return f"it has format_version {version} and was written by a newer radargate: upgrade this one"
    if problem := _damaged_field(section):
        return problem
    if not isinstance(state, Mapping) or not all(isinstance(name, str) and _is_dense(state[name]) for name in state):
        return "its weights (state_dict) are no tensors"
    if not _holds_mappings(content.get("loops", {})):
        return "its loops are damaged"
    return ""


def _damaged_field(section: Mapping[str, Any]) -> str:
    prints = section.get("fingerprints")
    if not isinstance(prints, Mapping) or not isinstance(prints.get("backbone"), str):
        return "its fingerprints are damaged"
    experts = prints.get("experts")
    if not isinstance(experts, Mapping) or not all(isinstance(word, str) for word in (*experts, *experts.values())):
        return "its fingerprints are damaged"
    if not isinstance(section.get("gate"), str):
        return "its gate is not named"
    if not isinstance(section.get("combine", ""), str):
        return f"its combine is {str(section['combine'])[:60]}"
    return "" if _is_identity(section.get("identity")) else "its identity is damaged"


def _is_identity(text: object) -> bool:
    """Whether this is what `backbone_identity` wrote, or nothing, as in files of earlier versions."""
    if text is None:
        return True
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("config", {}), dict)


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _holds_mappings(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values())


def _missing_for_fit(content: Mapping[str, Any]) -> str:
    for name in ("optimizer_states", "lr_schedulers"):
        parts = content.get(name)
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            return f"it has no {name}, which a fit that goes on needs"
    if "fit_loop" not in content.get("loops", {}):
        return "it has no loops, which a fit that goes on needs"
    for name in ("global_step", "epoch"):
        value = content.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return f"its {name} is {value!r}"
    return ""
