"""Built-in backbones in the cache: made once, with the SHA-256 of each file, and made anew where one has changed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from radargate_pl.cache_folder import umask
from radargate_pl.fingerprints import sha256_of_file
from radargate_pl.folders import folder_made_once, replacing_folder

CHECKSUMS = "SHA256SUMS"
SMALL = 32 * 2**20  # bytes: what is read whenever a backbone is looked for; weights are read when they are loaded
logger = logging.getLogger(__name__)


def whole_folder(folder: Path, make: Callable[[Path], None], *, with_weights: bool) -> Path:
    """Return a folder whose files are those that were made; a damaged one is made anew.

    Folders made before checksums were kept are taken as they are.

    Args:
        folder: in the cache.
        make: fills an empty folder.
        with_weights: look at large files too.

    Raises:
        ValueError: it is damaged and cannot be made anew; names the folder.
    """

    def make_with_checksums(new: Path) -> None:
        make(new)
        lines = [f"{sha256_of_file(path)}  {path.name}\n" for path in sorted(new.iterdir())]
        (new / CHECKSUMS).write_text("".join(lines), encoding="utf-8")

    folder_made_once(folder, make_with_checksums)
    if names := damaged_files(folder, with_weights=with_weights):
        from filelock import FileLock

        try:
            with FileLock(folder.parent / f".{folder.name}.lock", mode=0o666 & ~umask()):
                if damaged_files(folder, with_weights=True):  # another process may have mended it meanwhile
                    logger.warning("%s is damaged (%s) and is made anew.", folder, ", ".join(names))
                    with replacing_folder(folder) as new:
                        make_with_checksums(new)
        except OSError as error:
            raise ValueError(f"{damaged(folder)} ({', '.join(names)}), and that failed: {error}") from error
    return folder


def damaged_files(folder: Path, *, with_weights: bool) -> list[str]:
    """Names of the files that are gone or not what was written, by the checksums beside them; none without these.

    Args:
        folder: of a built-in backbone.
        with_weights: look at large files too.
    """
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        digest, _, name = line.partition("  ")
        path = folder / Path(name).name
        is_asked = not path.is_file() or with_weights or path.stat().st_size <= SMALL
        if is_asked and (not path.is_file() or sha256_of_file(path) != digest):
            found.append(path.name)
    return found


def damaged(folder: Path) -> str:
    """What to do about a built-in backbone that cannot be read.

    Args:
        folder: in the cache.
    """
    return f"The built-in backbone in {folder} is damaged. Delete that folder: the next start makes it anew"
