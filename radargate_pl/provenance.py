"""Where a result comes from: command line without secrets, versions, git state, memory (layer 5)."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from radargate_pl import __version__

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "jsonargparse", "reasoning-gym")
REDACTED = "<redacted>"
# Words of a name, so that api_key and --hf-token are secrets while max_new_tokens, tokenizer and monkey are not.
_SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials"}
_SECRET_VALUE = re.compile(
    r"(hf_|sk-|ghp_|github_pat_|glpat-|xox[bp]-|AKIA)[A-Za-z0-9_\-]{12,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def is_secret_name(name: str) -> bool:
    """Whether a key's last part names a secret.

    Args:
        name: a key such as ``--trainer.logger.api_key``.

    Example:
        >>> is_secret_name("--logger.api_key"), is_secret_name("--model.max_new_tokens")
        (True, False)
    """
    last = name.lstrip("-").rpartition(".")[2]
    return bool(_SECRET_WORDS & set(re.split(r"[_\-]", last.lower())))


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without its secrets: values of arguments named like one, and values that look like one.

    Args:
        arguments: words of the command line.

    Example:
        >>> redact_arguments(["fit", "--hf_token", "abc", "--url=https://me:pw@host/x"])
        ['fit', '--hf_token', '<redacted>', '--url=https://<redacted>@host/x']
    """
    shown, hides_next = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        if hides_next and not word.startswith("--"):
            shown.append(REDACTED)
        elif word.startswith("--") and equals and is_secret_name(name):
            shown.append(f"{name}={REDACTED}")
        else:
            shown.append(_SECRET_VALUE.sub(REDACTED, word))
        hides_next = word.startswith("--") and not equals and is_secret_name(word)
    return shown


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
