"""Where this package keeps what it fetched or made (standard library only)."""

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """Return `RADARGATE_CACHE`, else `~/.cache/radargate`."""
    named = os.environ.get("RADARGATE_CACHE")
    try:
        return Path(named or "~/.cache/radargate").expanduser()
    except RuntimeError as error:  # containers whose user has neither HOME nor an entry in passwd
        raise ValueError(
            f"Expected a home folder for the cache {named or '~/.cache/radargate'}, but this user has none ({error}). "
            "Set RADARGATE_CACHE to a folder that can be written."
        ) from error


def umask() -> int:
    """Return this process's mask of file modes, without changing it for other threads as `os.umask` would."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022


def make_shared_folder(folder: Path) -> Path:
    """Make a folder of the cache; those that others may write into (mode 1777) hand their mode on.

    A cache for several users is one such folder. What a user makes below it would be closed to the others otherwise.

    Args:
        folder: below the cache folder.

    Raises:
        OSError: naming RADARGATE_CACHE, when it cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        for place in reversed(missing):
            mode = place.parent.stat().st_mode & 0o7777
            place.mkdir(exist_ok=True)
            if mode & 0o1022 == 0o1022:  # open to all, and nobody may remove another's files
                place.chmod(mode)
    except OSError as error:
        raise OSError(
            error.errno, f"the cache cannot be written ({error.strerror}); RADARGATE_CACHE names another", str(folder)
        ) from error
    return folder


def writable_by_others(path: Path) -> Path | None:
    """Return what on the way to a file others than this user and root could replace or write; ``None``: nothing.

    What lies below a folder that others cannot enter is out of their reach. In a folder with the sticky bit others
    cannot remove what is not theirs. Parts that do not exist yet are passed over.

    Args:
        path: of a file or folder; both its name and where links lead are looked at.
    """
    if not hasattr(os, "getuid"):
        return None
    ways = {Path(os.path.abspath(path)), Path(os.path.realpath(path))}
    return next((found for found in map(_writable_on, ways) if found is not None), None)


def _writable_on(way: Path) -> Path | None:
    culprit = None
    for place in (way, *way.parents):
        try:
            found = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return place
        if found.st_uid not in (os.getuid(), 0):
            return place
        if stat.S_ISLNK(found.st_mode):
            continue
        is_folder = stat.S_ISDIR(found.st_mode)
        if is_folder and not found.st_mode & 0o011:
            culprit = None
        elif found.st_mode & 0o022 and not (is_folder and found.st_mode & stat.S_ISVTX):
            culprit = culprit or place
    return culprit
