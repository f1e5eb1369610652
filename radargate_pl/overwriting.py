"""``--overwrite true``: the old run stands aside until the new one has taken its first step (layer 6).

Three hidden folders in the run folder tell how far it has come, so that a kill at any moment loses nothing:
``.overwritten-*`` holds the old run while the new one starts, ``.put-back-*`` is moved back, ``.discarded-*`` deleted.
"""

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from radargate_pl.folders import find_replaced

ASIDE, RETURNING, DISCARDED = ".overwritten-", ".put-back-", ".discarded-"
# What runs write, by name; everything else in the folder is somebody's own and stays.
_OURS = (
    *("summary.json", "metrics.csv", "convergence.json", "angles.csv", "events.out.tfevents.*", "non_finite*.json"),
    *("config.yaml", "config.[0-9]*.yaml"),
    *(f"config.{command}{end}.yaml" for command in ("validate", "test", "predict") for end in ("", ".[0-9]*")),
    *("checkpoints/*.ckpt", "checkpoints/*.ckpt.sha256", "checkpoints/.*.tmp"),
    *("predict/*/predictions.jsonl", "predict/*/predictions.[0-9]*.jsonl"),
    *("test/*/answers.*.rank*.jsonl", "test/*/earlier/*/results.json", "test/*/earlier/*/predictions.jsonl"),
    *("test/*/results.json", "test/*/predictions.jsonl"),
)
# Folders that are ours if they hold the first file: then these files in them.
_OUR_FOLDERS = {
    "gate": ("gate_config.json", "gate.safetensors", "README.md"),
    **dict.fromkeys(
        ("experts/*", "gate/experts/*"),
        ("expert.json", "adapter_config.json", "adapter_model.safetensors", "README.md"),
    ),
}
_REPLACEMENT = re.compile(r"\.(.+)\.(?:new|old)-[a-z0-9_]{8}")  # see radargate_pl.folders
_FOLDERS = ("checkpoints", "experts", "gate", "predict", "test")


class Overwriting:
    """Moves the old run out of the way; discards it at the end of the block, or puts it back if the block fails.

    Args:
        folder: the run folder, which this process has locked.
        config: the new run's ``model`` and ``data``, as plain values.

    Raises:
        ValueError: the folder is no run's, the new run reads from what would go, or somebody's own files lie where it
            will write its gate or experts.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        _check_is_run(folder)
        check_inputs(folder, config)
        _check_replaceable(folder)
        self.aside = folder / f"{ASIDE}{secrets.token_hex(4)}"

    def __enter__(self) -> Self:
        """Move the old run aside."""
        files = list(files_of_run(self.folder))
        if files:
            # Killed in the middle, the next command moves back what is there already.
            returning = self.folder / self.aside.name.replace(ASIDE, RETURNING)
            _move(self.folder, returning, files)
            returning.rename(self.aside)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Where no first step has settled it yet: a command that went well discards the old run."""
        if kind is None:
            discard(self.aside)
        elif self.aside.is_dir():
            _put_back(self.aside)
            rank_zero_info(f"{self.folder}: the earlier run is back, since the new one took no step.")


class DiscardOverwritten(Callback):
    """Deletes the old run once the new one has taken a step.

    Args:
        aside: where it was moved to.
    """

    def __init__(self, aside: Path) -> None:
        self.aside = aside

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """After the first step, not the first micro-batch."""
        if trainer.is_global_zero and trainer.global_step:
            discard(self.aside)


def discard(aside: Path) -> None:
    """Delete a run that stands aside, if it does: by its name first, so that a kill leaves no half of a run.

    Args:
        aside: ``.overwritten-*``.
    """
    if aside.is_dir():
        shutil.rmtree(aside.rename(aside.with_name(aside.name.replace(ASIDE, DISCARDED))), ignore_errors=True)


def settle(folder: Path) -> None:
    """Finish what a killed command has begun: a run that stands aside comes back, half-deleted ones go.

    Args:
        folder: the run folder, which this process has locked.
    """
    settle_replacements(folder)
    for rest in folder.glob(f"{DISCARDED}*"):
        shutil.rmtree(rest, ignore_errors=True)
    for rest in folder.glob(f"{RETURNING}*"):
        _return(rest)
        rank_zero_info(f"{folder}: the earlier run is back; a killed command had begun to move it.")
    for aside in folder.glob(f"{ASIDE}*"):
        _put_back(aside)
        rank_zero_info(f"{folder}: the earlier run is back; the one that was to replace it was killed before a step.")


def settle_replacements(folder: Path) -> None:
    """Finish what a kill in the middle of replacing a folder left: the old one comes back if the new one never came.

    Args:
        folder: the run folder, which this process has locked.
    """
    places = (folder, folder / "experts", folder / "gate/experts", *folder.glob("test/*/earlier"))
    for place in places:
        for rest in sorted(place.glob(".*")):
            found = _REPLACEMENT.fullmatch(rest.name)
            if found is None or (place == folder and found[1] != "gate") or not rest.is_dir():
                continue
            if find_replaced(place / found[1]):
                rank_zero_info(f"{place / found[1]}: back as it was; a process was killed while it replaced it.")
            if rest.is_dir():
                shutil.rmtree(rest, ignore_errors=True)


def files_of_run(folder: Path) -> Iterator[Path]:
    """Every file in a run folder that a run writes, each once."""
    found = [path for pattern in _OURS for path in folder.glob(pattern)]
    for pattern, (mark, *others) in _OUR_FOLDERS.items():
        found += [path.parent / name for path in folder.glob(f"{pattern}/{mark}") for name in (mark, *others)]
    yield from (path for path in dict.fromkeys(found) if path.is_file() or path.is_symlink())


def check_inputs(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to overwrite what the new run reads.

    Args:
        folder: the run folder.
        config: nested settings; every string that is a path counts.

    Raises:
        ValueError: naming the settings and their paths.
    """
    going = {path.resolve() for path in files_of_run(folder)}
    going |= {parent for path in tuple(going) for parent in path.parents if folder.resolve() in parent.parents}
    inside = [f"{key}: {text}" for key, text in _texts(config, "") if _is_among(text, going, folder)]
    if inside:
        raise ValueError(
            f"Expected the new run to read nothing that --overwrite true would replace in {folder}, but it reads "
            f"{'; '.join(inside[:5])}. Nothing was touched. Give it another folder, --trainer.default_root_dir "
            f"{folder}-2, or move what it reads"
        )


def _is_among(text: str, going: set[Path], folder: Path) -> bool:
    plain = text.split("*", 1)[0].split("?", 1)[0]  # of a pattern, the folder that it begins with
    with suppress(OSError, ValueError, RuntimeError):
        path = Path(plain).expanduser()
        path = (path if plain == text or plain.endswith("/") else path.parent).resolve()
        return path.exists() and (path in going or (path == folder.resolve() and Path(text).parts != ()))
    return False


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)


def _check_is_run(folder: Path) -> None:
    held = sorted(name for name in _FOLDERS if (folder / name).is_dir() and any((folder / name).iterdir()))
    if not held and not any(files_of_run(folder)):
        return
    for name, read, key in (("config.yaml", yaml.safe_load, "model"), ("summary.json", json.loads, "command")):
        with suppress(OSError, ValueError, yaml.YAMLError):
            content = read((folder / name).read_text(encoding="utf-8"))
            if isinstance(content, Mapping) and key in content:
                return
    raise ValueError(
        f"Expected --overwrite true to replace a run, but {folder} has neither the config.yaml nor the summary.json "
        f"of one, and holds {', '.join(held) or 'files'}. Nothing was touched. Give the run a folder of its own: "
        "--trainer.default_root_dir"
    )


def _check_replaceable(folder: Path) -> None:
    ours = set(files_of_run(folder))
    foreign = [path for name in ("gate", "experts") for path in sorted((folder / name).rglob("*")) if path not in ours]
    names = [str(path) for path in foreign if not path.is_dir()]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(
            f"Expected gate/ and experts/ of {folder} to hold only what runs write, for --overwrite true to replace "
            f"them, but found {', '.join(names[:5])}{more}. Nothing was touched; move them elsewhere"
        )


def _move(source: Path, target: Path, files: list[Path]) -> None:
    """Move files of one folder into another, by the same names; folders that this empties go."""
    for path in files:
        new = target / path.relative_to(source)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    emptied = {parent for path in files for parent in path.parents if source in parent.parents}
    for place in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):
            place.rmdir()


def _put_back(aside: Path) -> None:
    folder = aside.parent
    gone = folder / aside.name.replace(ASIDE, DISCARDED)
    _move(folder, gone, list(files_of_run(folder)))  # what the new run has written without a step
    returning = aside.rename(folder / aside.name.replace(ASIDE, RETURNING))
    shutil.rmtree(gone, ignore_errors=True)
    _return(returning)


def _return(returning: Path) -> None:
    _move(returning, returning.parent, [path for path in returning.rglob("*") if not path.is_dir()])
    shutil.rmtree(returning, ignore_errors=True)
