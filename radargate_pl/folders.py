"""Folders that are either whole or absent: temporary folder, then rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into; it takes the place of `folder` only once everything is written.

    Whatever goes wrong inside (a full disk, an interrupt) leaves the old `folder` as it was.

    Args:
        folder: the folder to make or to replace.

    Yields:
        A temporary folder beside it, on the same disk.

    Raises:
        OSError: it could not be written.
    """
    from safetensors import SafetensorError

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.new-"))
    try:
        yield temporary
        _finish(temporary)
        _move(temporary, folder)
    except (OSError, SafetensorError) as error:
        before = " What was there before is unchanged." if folder.exists() else ""
        raise OSError(f"Could not write the folder {folder}: {error}.{before}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder_made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`; if it is not there, let `make` fill it, once, also when several processes ask together.

    Args:
        folder: the wanted folder; its existence means that it is complete.
        make: called with an empty temporary folder to fill.
    """
    if folder.is_dir():
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():  # another process may have made it while this one waited
            with replacing_folder(folder) as temporary:
                make(temporary)
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finish(folder: Path) -> None:
    """Ordinary permissions (mkdtemp and transformers make private ones) and all bytes on disk.

    Without the second a power loss after the rename can leave empty files with the right names.
    """
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _move(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    # A folder that is not empty cannot be renamed over; the old one stays beside it until the new one is in place.
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old-"))
    folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)
