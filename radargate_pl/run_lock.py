"""One command at a time writes into a run folder: a lock that the kernel takes back when its holder dies (layer 0)."""

import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from radargate_pl.notices import say_once

LOCK_FILE = ".run.lock"
# Written to at some time or other: what cannot be written to is found before anything is trained.
_WRITTEN = ("", "checkpoints", "gate", "experts", "predict", "test")
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: "set[RunLock]" = set()


class RunLock:
    """Holds a run folder until ``release`` or the end of the process, however it ends.

    The lock file of a process that was killed is no obstacle: the lock itself (flock) is the kernel's, the file only
    tells who has it. Forked children share it and keep it as long as they live, for they may still write.

    Args:
        folder: the run folder; made if there is none.
        command: ``fit``, ``validate``, ``test`` or ``predict``, for the message to who comes second.

    Raises:
        ValueError: another process writes into the folder; names it.
        OSError: the folder, or one in it that is written to, does not take files.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.path = folder, folder / LOCK_FILE
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._take(command)
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._made = missing
        _held.add(self)
        try:
            _check_writable(folder)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Give the folder back; the lock file goes, and folders that were made for nothing else."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            self.path.unlink()
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # forked children share the lock: closing is not enough
        self.forget()
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()  # only where it is empty

    def forget(self) -> None:
        """Close this process's copy of the lock, which another process goes on to hold."""
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, command: str) -> int | None:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_there(descriptor, self.path):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(_present(command)).encode(), 0)
                    return descriptor
                os.close(descriptor)  # whoever had it has just ended and taken the file along
            except BlockingIOError:
                holder = os.pread(descriptor, 4096, 0)
                os.close(descriptor)
                raise ValueError(_refusal(self.folder, holder)) from None
            except OSError as error:
                os.close(descriptor)
                with suppress(OSError):
                    self.path.unlink()
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                say_once(
                    f"The file system of the run folder {self.folder} knows no locks ({error.strerror}): nothing "
                    "notices two commands that write into it at the same time."
                )
                return None


def forget_locks() -> None:
    """Close a forked child's copies: a loader's worker writes nothing, and may outlive a killed parent by seconds."""
    for lock in tuple(_held):
        lock.forget()


def _present(command: str) -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"command": command, "host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _is_there(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _refusal(folder: Path, holder: bytes) -> str:
    who = "another process"
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(holder)
        who = f"`radargate {found['command']}` (process {found['pid']} on {found['host']}, since {found['since']})"
    return (
        f"The run folder {folder} (trainer.default_root_dir) is in use: {who} writes into it; nothing was touched. "
        "Wait until it has ended, end it (SIGTERM lets a fit save first), or take another folder: "
        f"--trainer.default_root_dir {folder}-2"
    )


def _check_writable(folder: Path) -> None:
    for name in _WRITTEN:
        place = folder / name
        if not os.path.lexists(place):
            continue
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(bytes(4096))
        except OSError as error:
            raise _unwritable(place, error) from error


def _unwritable(place: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"Expected the run folder (trainer.default_root_dir) to take files, but {place} does not: "
        f"{error.strerror or error}. Nothing was begun; free some space, change its rights or take another folder",
    )
