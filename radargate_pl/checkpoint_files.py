"""Checkpoint files: each with its SHA-256 beside it, and which of them are whole (layer 5)."""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from radargate_pl.atomic_files import link_or_copy, save_atomically, write_text
from radargate_pl.fingerprints import sha256_of_file

SUFFIX = ".sha256"
DIGEST = re.compile(r"([0-9a-f]{64})  \S")


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, with ``NAME.sha256`` (as sha256sum writes it) beside it.

    Args:
        path: the file; an older one is replaced.
        checkpoint: tensors, dicts, lists, strings and numbers.

    Raises:
        OSError: if the disk refuses; the older file is whole then.
    """
    digest = ""

    def write(file: Any) -> None:
        nonlocal digest
        watched = _WatchedFile(file)
        try:
            torch.save(checkpoint, cast(BinaryIO, watched))
        except RuntimeError:  # torch's own, "unexpected pos", may hide what the disk said
            if watched.error is not None:
                raise watched.error from None
            raise
        file.flush()
        digest = sha256_of_file(Path(file.name))
        _announce(path, digest)

    save_atomically(path, write)
    write_text(digest_file(path), _line(digest, path))


class _WatchedFile:
    """Remembers what the disk refused."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def second_name(path: Path, target: Path) -> None:
    """Give a checkpoint a second name in its folder (``last.ckpt``), its digest too.

    Args:
        path: a checkpoint written by `write_checkpoint`, or by another plugin for checkpoints.
        target: the second name; an older file of that name is replaced.
    """
    known = _digests(path)
    digest = known[-1] if known else sha256_of_file(path)  # a plugin for checkpoints writes none
    _announce(target, digest)
    link_or_copy(path, target)
    write_text(digest_file(target), _line(digest, target))


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and its digest."""
    path.unlink(missing_ok=True)
    digest_file(path).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save left in a folder of checkpoints: temporary files, digests without a checkpoint."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"*.ckpt{SUFFIX}"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """Tell what is wrong with a checkpoint file; ``None`` if it is whole.

    A file without a digest beside it (copied by itself) must open.
    """
    if not path.stat().st_size:
        return "it is empty"
    expected = _digests(path)
    if expected:
        found = sha256_of_file(path)
        return None if found in expected else f"its SHA-256 is {found[:12]}..., {digest_file(path).name} says otherwise"
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch, zipfile and pickle raise for damaged bytes
        return f"it does not open ({type(error).__name__}), and there is no {digest_file(path).name}"
    return None


def first_whole(candidates: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """Return the first checkpoint that is whole, and what was wrong with those before it."""
    problems: list[str] = []
    for path in candidates:
        if path.is_file():
            problem = damage(path)
            if problem is None:
                return path, problems
            problems.append(f"{path}: {problem}")
    return None, problems


def digest_file(path: Path) -> Path:
    """The file beside a checkpoint that holds its SHA-256."""
    return path.with_name(path.name + SUFFIX)


def _announce(path: Path, digest: str) -> None:
    """Put the digest of the file to come beside that of the file there: killed in between, either is known."""
    old = _digests(path)[-1:] if path.exists() else []
    write_text(digest_file(path), "".join(_line(known, path) for known in (*old, digest)))


def _digests(path: Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return DIGEST.findall(digest_file(path).read_text(encoding="utf-8"))
    return []


def _line(digest: str, path: Path) -> str:
    return f"{digest}  {path.name}\n"
