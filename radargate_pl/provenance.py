"""Where a result comes from: versions, git state, memory (layer 5)."""

import os
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from radargate_pl import __version__

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "jsonargparse", "reasoning-gym")


def installed_versions() -> dict[str, str]:
    """Versions of Python, this package and those that decide about numbers; absent packages are left out."""
    versions = {"python": sys.version.split()[0], "radargate_pl": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Commit of the repository a folder lies in, and whether files differ from it.

    Args:
        folder: any folder.

    Returns:
        ``commit`` and ``dirty``; ``None`` outside of a repository or without git.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def peak_memory_bytes() -> int:
    """Largest memory so far in bytes: allocated on the GPU if there is one in use, else resident in this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def global_seed() -> int | None:
    """The seed given to ``seed_everything``, if any."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
