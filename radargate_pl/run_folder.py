"""The run folder: what may be started in it, its stored config, and which checkpoint a ``--ckpt_path`` means (layer 6).

``trainer.default_root_dir`` is the run folder. A fit starts only where no other run lies; validate, test and predict
may go on in the folder of the model they evaluate. Nothing of an earlier run is overwritten unless asked for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from radargate_pl.atomic_files import write_text
from radargate_pl.checkpoint_files import damage, first_whole
from radargate_pl.redaction import redact

CONFIG = "config.yaml"
NEWEST = ("auto", "best", "last")

_FOLDERS = ("checkpoints", "experts", "gate", "predict", "test")
_HELD = (*(f"{folder}/*" for folder in _FOLDERS), "metrics.csv", "convergence.json")

# Settings of one command rather than of the run: a stored config is good for all four commands.
_ONLY_THIS_COMMAND = ("config", "ckpt_path", "overwrite", "preview", "verbose", "return_predictions", "weights_only")


def stored_config(config: Mapping[str, Any]) -> str:
    """The text of ``config.yaml``: the resolved config without secrets and without what concerns one command only."""
    kept = {key: value for key, value in config.items() if key not in _ONLY_THIS_COMMAND}
    return yaml.safe_dump(redact(kept), sort_keys=False, allow_unicode=True, width=120)


def write_config(folder: Path, command: str, text: str) -> Path:
    """Stores the config of a run; an older one that differs is kept under the next free number.

    A fit writes ``config.yaml``. Another command writes it where there is none, and otherwise, if its config differs,
    ``config.<command>.yaml``: the config beside the checkpoints stays that of the fit.

    Args:
        folder: The run folder; made if there is none.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        text: See ``stored_config``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    if command != "fit" and path.exists() and path.read_text(encoding="utf-8") != text:
        path = folder / f"config.{command}.yaml"
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return path
        number = 1
        while (kept := path.with_suffix(f".{number}.yaml")).exists():
            number += 1
        path.rename(kept)
    write_text(path, text)
    return path


def config_changes(before: Any, now: Any, name: str = "") -> list[str]:
    """One line for every setting in which two configs differ: name, earlier value, present value."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        return [
            line
            for key in keys
            for line in config_changes(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name}: {before} before, {now} now"]


def stored_changes(folder: Path, text: str) -> list[str]:
    """What is different in the config of a run that goes on, by its ``config.yaml``; empty where there is none."""
    path = folder / CONFIG
    if not path.exists():
        return []
    return config_changes(yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text))


def holds_run(folder: Path) -> list[str]:
    """Names of results of an earlier run in the folder: checkpoints, gates, experts, metrics."""
    return sorted({str(found.relative_to(folder).parts[0]) for pattern in _HELD for found in folder.glob(pattern)})


def check_run_folder(folder: Path, command: str, model: Any, checkpoint: Path | None, is_resuming: bool) -> None:
    """Refuses to mix two runs in one folder.

    Args:
        folder: The run folder.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        model: The ``model`` section of the config, as plain values.
        checkpoint: What ``--ckpt_path`` stands for; None if nothing.
        is_resuming: Whether ``--ckpt_path auto`` was given: to go on in this very folder, or to start if it is empty.

    Raises:
        ValueError: The folder holds another run; names the ways out.
    """
    found = holds_run(folder)
    if not found or is_resuming or (checkpoint is not None and folder.resolve() in checkpoint.resolve().parents):
        return
    if command != "fit" and _same_model(folder, model):
        return
    ways = [f"another folder:  --trainer.default_root_dir {folder}-2"]
    if command == "fit":
        ways += [
            "go on with it:   --ckpt_path auto",
            "replace it:      --overwrite true (deletes the results named above)",
        ]
    else:
        ways += [f"evaluate it:     --config {folder / CONFIG}, or --ckpt_path best", "delete or move the folder"]
    listed = "\n".join(f"  {number}. {way}" for number, way in enumerate(ways, start=1))
    raise ValueError(
        f"The run folder {folder} (trainer.default_root_dir) already holds another run ({', '.join(found)}); "
        f"nothing was overwritten. Three ways out:\n{listed}"
    )


def _same_model(folder: Path, model: Any) -> bool:
    path = folder / CONFIG
    if not path.exists():
        return False
    stored = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return bool(stored.get("model") == yaml.safe_load(stored_config({"model": model}))["model"])


def resolve_checkpoint(ckpt_path: str, folder: Path, command: str) -> Path | None:
    """The checkpoint file or gate folder that ``--ckpt_path`` means.

    Args:
        ckpt_path: A file, a run folder, a gate folder, ``auto``, ``best`` or ``last``. ``auto`` is the newest
            checkpoint of this run folder for fit, if there is one, and ``best`` for the other commands. A damaged file
            is skipped with a warning, and the one before it taken.
        folder: This run's folder.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        A ``.ckpt`` file or a folder with ``gate_config.json``; None for ``auto`` where fit has nothing to resume.

    Raises:
        ValueError: There is no such thing, or none that is whole; says what there is.
    """
    if ckpt_path not in NEWEST:
        path = Path(ckpt_path)
        if path.is_file():
            if problem := damage(path):
                raise ValueError(
                    f"--ckpt_path {ckpt_path}: the file is damaged: {problem}. {_offer(path.parent.parent)}"
                )
            return path
        if is_gate_folder(path):
            return path
        if not path.is_dir():
            raise ValueError(f"--ckpt_path {ckpt_path}: there is no such file or folder. {_offer(folder)}")
        folder, kind = path, "auto"
    else:
        kind = ckpt_path
    whole, problems = first_whole(_candidates(folder / "checkpoints", kind, command))
    for problem in problems:
        rank_zero_warn(f"Damaged checkpoint skipped: {problem}.")
    if whole is not None:
        return whole
    if ckpt_path == "auto" and command == "fit" and not problems:
        return None
    if kind == "auto" and is_gate_folder(folder / "gate"):
        return folder / "gate"
    raise ValueError(f"--ckpt_path {ckpt_path}: no checkpoint for it in {folder}. {_offer(folder)}")


def _candidates(folder: Path, kind: str, command: str) -> list[Path]:
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    if kind == "best":
        return [best]
    newest = sorted(folder.glob("step=*.ckpt"), reverse=True)
    return [last, *newest, best] if kind == "last" or command == "fit" else [best, last, *newest]


def is_gate_folder(path: Path) -> bool:
    """Whether the folder holds a saved gate."""
    return (path / "gate_config.json").is_file()


def _offer(folder: Path) -> str:
    there = sorted(str(path) for path in folder.glob("checkpoints/*.ckpt"))
    if not there:
        return f"{folder} holds no checkpoints; a run folder, a .ckpt file or a gate folder is expected."
    return f"There are: {', '.join(there)}."
