"""Built libraries in the cache, which nobody but this user or root can have written (layer 1).

Loading one runs it. So neither the file nor any folder above it may be another user's, or open to the writes of one.
What is checked is what is loaded: the file is opened once.
"""

import ctypes
import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from radargate_pl.atomic_files import save_atomically
from radargate_pl.cache_folder import cache_folder, writable_by_others
from radargate_pl.notices import say_once

DIGEST = hashlib.sha256().digest_size
WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_loaded_from: list[BinaryIO] = []  # the loader knows a library by the number of its handle, which none may have again


def library_folder() -> Path:
    """Return where libraries are kept: ``native`` in the cache; where others may write, a folder of this user alone."""
    folder = cache_folder() / "native"
    _close(folder)
    culprit = writable_by_others(folder)
    if culprit is None:
        return folder
    own = Path(tempfile.gettempdir()) / f"radargate-native-{os.getuid()}"
    with suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
    say_once(
        f"Others than this user may write to {culprit}, so that native code is not run from {folder}; it is kept in "
        f"{own}. Close it (chmod go-w {culprit}), or let RADARGATE_CACHE name a folder of yours."
    )
    return own


def load(place: Path) -> ctypes.CDLL | None:
    """Load a whole library; ``None`` where there is none, or where others than this user and root may have written it.

    The loader of a system does not notice half a file: it would die at the first page that is not there.

    Args:
        place: as `keep` wrote it.

    Raises:
        OSError: it is of a machine with another C library.
    """
    if writable_by_others(place) is not None:
        return None
    try:
        file = os.fdopen(os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)), "rb")
    except OSError:
        return None
    with file:
        content = file.read()
        if not _is_ours(os.fstat(file.fileno())) or not _is_whole(content):
            return None
        handle = Path(f"/proc/self/fd/{file.fileno()}")
        if handle.exists():
            _loaded_from.append(os.fdopen(os.dup(file.fileno()), "rb"))
            return ctypes.CDLL(f"/proc/self/fd/{_loaded_from[-1].fileno()}")
    with tempfile.TemporaryDirectory(prefix="radargate-native-") as folder:
        copy = Path(folder) / place.name
        copy.write_bytes(content)
        return ctypes.CDLL(str(copy))


def keep(place: Path, content: bytes) -> None:
    """Write a library for later processes, closed to others whatever the umask; nothing where that cannot be.

    Args:
        place: below `library_folder`.
        content: of the library.
    """
    if writable_by_others(place.parent) is not None:
        return
    with suppress(OSError):  # a cache that cannot be written: every process builds its own
        place.parent.mkdir(parents=True, exist_ok=True)
        _close(place.parent)
        save_atomically(place, lambda file: _write(file, content))


def _write(file: BinaryIO, content: bytes) -> None:
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), 0o644)
    file.write(content + hashlib.sha256(content).digest())


def _close(folder: Path) -> None:
    """Take the right to write from others, in a folder of this user; a common one (sticky) stays."""
    with suppress(OSError):
        found = folder.stat()
        if hasattr(os, "getuid") and found.st_uid == os.getuid() and not found.st_mode & stat.S_ISVTX:
            folder.chmod(stat.S_IMODE(found.st_mode) & ~WRITABLE)


def _is_ours(found: os.stat_result) -> bool:
    if not hasattr(os, "getuid"):
        return True
    return stat.S_ISREG(found.st_mode) and found.st_uid in (os.getuid(), 0) and not found.st_mode & WRITABLE


def _is_whole(content: bytes) -> bool:
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]
