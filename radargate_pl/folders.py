"""Folders that are either whole or absent: temporary folder, then rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from radargate_pl.cache_folder import make_shared_folder, umask


@contextmanager
def replacing_folder(folder: Path, ours: Collection[str] | None = None) -> Iterator[Path]:
    """Give an empty folder to write into; it takes the place of `folder` only once everything is written.

    Whatever goes wrong inside (a full disk, an interrupt) leaves the old `folder` as it was.

    Args:
        folder: the folder to make or to replace.
        ours: names that may be replaced or removed; everything else in the old folder is somebody's and stays. None
            where the whole folder is ours.

    Yields:
        A temporary folder beside it, on the same disk.

    Raises:
        OSError: it could not be written.
    """
    from safetensors import SafetensorError

    folder.parent.mkdir(parents=True, exist_ok=True)
    find_replaced(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.new-"))
    try:
        yield temporary
        if ours is not None and folder.is_dir():
            _keep_others(folder, temporary, ours)
        _finish(temporary)
        _move(temporary, folder)
    except (OSError, SafetensorError) as error:
        before = " What was there before is unchanged." if folder.exists() else ""
        raise OSError(f"Could not write the folder {folder}: {error}.{before}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_replaced(folder: Path) -> bool:
    """Put an older folder back where a process was killed between moving it away and moving the new one in.

    Args:
        folder: what was to be replaced.

    Returns:
        Whether there was such a folder.
    """
    if folder.exists() or not folder.parent.is_dir():
        return False
    moved = [
        path for path in folder.parent.glob(f".{escape(folder.name)}.old-*") if path.is_dir() and any(path.iterdir())
    ]
    if not moved:
        return False
    max(moved, key=lambda path: path.stat().st_mtime).rename(folder)
    return True


def _keep_others(old: Path, new: Path, ours: Collection[str]) -> None:
    for entry in old.iterdir():
        target = new / entry.name
        if entry.is_dir() and target.is_dir():  # experts/ beside a gate: those that are not written again
            _keep_others(entry, target, ())
        elif entry.name not in ours and not target.exists():
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, target, symlinks=True, copy_function=_link)
            else:
                _link(entry, target)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name of a file, which takes no room; a copy where the disk has none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def folder_made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`; if it is not there, let `make` fill it, once, also when several processes ask together.

    Args:
        folder: the wanted folder; its existence means that it is complete.
        make: called with an empty temporary folder to fill.
    """
    if folder.is_dir():
        return folder
    from filelock import FileLock

    make_shared_folder(folder.parent)
    with FileLock(folder.parent / f".{folder.name}.lock", mode=0o666 & ~umask()):
        if not folder.is_dir():  # another process may have made it while this one waited
            with replacing_folder(folder) as temporary:
                make(temporary)
    return folder


def _finish(folder: Path) -> None:
    """Ordinary permissions (mkdtemp and transformers make private ones) and all bytes on disk.

    Without the second a power loss after the rename can leave empty files with the right names.
    """
    mask = umask()
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() or (path.stat().st_nlink > 1 and path.is_file()):
            continue  # another's, kept as it is
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
