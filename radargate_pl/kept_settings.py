"""Settings that a run fixes at its start and keeps: the day of its prompts, and what closes its answers (layer 6)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from radargate_pl.chat_template import today, turn_end
from radargate_pl.checkpoint import load_checkpoint
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
    token = kept.get("end")
    if token is not None and arguments.get("answer_end", token) is None:
        kept["answer_end"] = _rule_for(token, arguments["tokenizer"])
    for name, start in AT_THE_START.items():
        if name in arguments and arguments[name] is None:
            given = kept.get(name)
            arguments[name] = start() if given is None else given


def kept_by(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint or gate folder came from.

    Args:
        checkpoint: a file in ``RUN/checkpoints``, or a gate folder.

    Returns:
        ``date`` and ``answer_end``; where it lies in no run folder, ``date`` and ``end``, the token or its id.

    Raises:
        ValueError: for a file that is damaged, naming it.
    """
    if is_gate_folder(checkpoint):
        found = _read(checkpoint / "gate_config.json")
        if "answer_end" not in found:
            return dict(BEFORE)
        beside = _data_of(checkpoint.parent / CONFIG) or {"end": found["answer_end"]}
        return {**beside, **({"date": found["prompt_date"]} if found.get("prompt_date") else {})}
    return _data_of(checkpoint.parent.parent / CONFIG) or _held_by(checkpoint)


def _held_by(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint that was copied out of its run folder says itself."""
    loops = load_checkpoint(str(checkpoint)).get("loops", {})
    loaders = _inside(_inside(_inside(loops, "fit_loop"), "state_dict"), "combined_loader")
    contents = [_inside(loader, "contents") for loader in loaders] if isinstance(loaders, list) else []
    facts = [_inside(part, "encoding") for part in contents]
    known = [part for part in facts if isinstance(part, Mapping) and {"date", "answer_end"} <= part.keys()]
    return {"date": known[0]["date"], "end": known[0]["answer_end"]} if known else dict(BEFORE)


def _inside(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _rule_for(token: str | int, tokenizer: str) -> str:
    """Which rule makes this token the end of an answer."""
    from radargate_pl.backbones import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    end = turn_end(loaded)
    return "template" if end is not None and token in (end, loaded.convert_ids_to_tokens(end)) else "eos"


def _data_of(path: Path) -> dict[str, Any]:
    data = _read(path).get("data")
    arguments = data.get("init_args") if isinstance(data, Mapping) else None
    if not isinstance(arguments, Mapping):
        return {}
    return {name: arguments.get(name, before) for name, before in BEFORE.items()}


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected {path} to be whole, but it is damaged: {reason}. Restore it.") from error
    return found if isinstance(found, Mapping) else {}
