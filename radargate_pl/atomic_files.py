"""Files that are whole or not there: written beside their target, flushed to disk, renamed (standard library only)."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_unfinished: set[Path] = set()


def remove_unfinished() -> None:
    """Remove the temporary files of saves that are under way, for a process that is about to end in the middle."""
    for path in tuple(_unfinished):
        with suppress(OSError):
            path.unlink()


def save_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let ``write`` fill a temporary file in the folder of ``path``, then rename it to ``path``.

    A reader finds the old file or the new one, never half of one, also when the disk fills up or the process is killed.
    The temporary file lies in the same folder because a rename is atomic only within one file system.

    Args:
        path: the file to write; its folder is made if need be.
        write: called once with the open temporary file.

    Raises:
        OSError: if the disk refuses (full, read-only); the message names ``path`` and says that it was left alone.
    """
    temporary = _beside(path)
    _unfinished.add(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, _refusal(path, error)) from error
    finally:
        with suppress(OSError):  # renamed away when all went well; on a full disk it is this file that takes the room
            temporary.unlink()
        _unfinished.discard(temporary)
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all.

    Args:
        path: the file to write.
        text: its content.
    """
    save_atomically(path, lambda file: _write_all(file, text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all; NaN and infinity become null.

    Args:
        path: the file to write.
        value: dicts, lists, strings, numbers, booleans and None.
    """
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return ``value`` as indented JSON, as `write_json` writes it.

    Args:
        value: dicts, lists, strings, numbers, booleans and None.
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def link_or_copy(source: Path, target: Path) -> None:
    """Give the finished file ``source`` a second name, replacing ``target`` in one step.

    A hard link costs no space; both names stay valid when the other is replaced, because files are only ever renamed
    over. File systems without hard links get a copy.

    Args:
        source: an existing file.
        target: the second name, in the same folder.

    Raises:
        OSError: if there is no room for the copy; ``target`` keeps its old content.
    """
    temporary = _beside(target)
    with suppress(OSError):
        temporary.unlink()
    try:
        os.link(source, temporary)
    except OSError:
        with source.open("rb") as content:
            save_atomically(target, lambda file: shutil.copyfileobj(content, file))
        return
    os.replace(temporary, target)
    with suppress(OSError):  # when both were the same file already, rename leaves the temporary name behind
        temporary.unlink()
    _flush_folder(target.parent)


def _beside(path: Path) -> Path:
    """A name of its own: processes of several machines, or threads of one, may write the same file at once."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _write_all(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def _refusal(path: Path, error: OSError) -> str:
    kept = "the file that was there is whole and unchanged" if path.exists() else "nothing was left behind"
    way = "Raise the limit on file sizes (ulimit -f)" if error.errno == errno.EFBIG else "Free some space"
    return f"Could not write {path}: {error.strerror or error}; {kept}. {way} or choose another folder"


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the file system can open folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _finite(value: Any) -> Any:
    """``value`` with every NaN and infinity as None: JSON has neither, and other readers refuse Python's spelling."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
