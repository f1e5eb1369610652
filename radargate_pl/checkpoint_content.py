"""Is a checkpoint file, whole by its checksum, one of ours, and one that a run can go on from? (layer 5)."""

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
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
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
    prints = section.get("fingerprints")
    if not isinstance(prints, Mapping) or not isinstance(prints.get("experts"), Mapping) or "backbone" not in prints:
        return "its fingerprints are damaged"
    if not isinstance(section.get("gate"), str):
        return "its gate is not named"
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        return "its weights (state_dict) are no tensors"
    return ""


def _missing_for_fit(content: Mapping[str, Any]) -> str:
    for name, kind in (("optimizer_states", list), ("lr_schedulers", list), ("loops", dict)):
        if not isinstance(content.get(name), kind):
            return f"it has no {name}, which a fit that goes on needs"
    for name in ("global_step", "epoch"):
        value = content.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return f"its {name} is {value!r}"
    return ""
