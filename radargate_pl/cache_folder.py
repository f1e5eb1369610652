"""Where this package keeps what it fetched or made (standard library only)."""

import os
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
