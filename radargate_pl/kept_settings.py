"""Settings that a run fixes at its start and keeps: the day of its prompts, and what closes its answers (layer 6)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from radargate_pl.chat_template import today
from radargate_pl.run_folder import CONFIG, is_gate_folder

# What versions before these settings did, whose folders do not name them.
BEFORE = {"date": None, "answer_end": "eos"}
AT_THE_START = {"date": today, "answer_end": lambda: "template"}


def keep_settings(config: Any, checkpoint: Path | None) -> None:
    """Write settings that nobody gave into a config: those of the run it goes on with, else those of a new run.

    Args:
        config: of one command, parsed; its ``data`` is changed in place.
        checkpoint: what ``--ckpt_path`` stands for; None if nothing.
    """
    arguments = config.get("data") and config.data.get("init_args")
    if not arguments:
        return
    kept = {} if checkpoint is None else kept_by(checkpoint)
    for name, start in AT_THE_START.items():
        if name in arguments and arguments[name] is None:
            given = kept.get(name)
            arguments[name] = start() if given is None else given


def kept_by(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint or gate folder came from.

    Args:
        checkpoint: a file in ``RUN/checkpoints``, or a gate folder.
    """
    if is_gate_folder(checkpoint):
        found = _read(checkpoint / "gate_config.json")
        if "answer_end" not in found:
            return dict(BEFORE)
        beside = _data_of(checkpoint.parent / CONFIG)
        return {**beside, **({"date": found["prompt_date"]} if found.get("prompt_date") else {})}
    return _data_of(checkpoint.parent.parent / CONFIG)


def _data_of(path: Path) -> dict[str, Any]:
    data = _read(path).get("data")
    arguments = data.get("init_args") if isinstance(data, Mapping) else None
    if not isinstance(arguments, Mapping):
        return {}
    return {name: arguments.get(name, before) for name, before in BEFORE.items()}


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return found if isinstance(found, Mapping) else {}
