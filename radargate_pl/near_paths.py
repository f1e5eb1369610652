"""Was a name that could be a hub id meant as a path? (standard library only)."""

import difflib
from pathlib import Path


def lies_here(name: str) -> bool:
    """Whether the first part of `owner/name` is a folder here, so that a path was meant and mistyped.

    Args:
        name: What the user gave.
    """
    first = Path(name).parts[:1]
    return len(Path(name).parts) > 1 and Path(*first).is_dir()


def nearest_paths(name: str) -> str:
    """The nearest names beside a path that does not exist, as a sentence; empty where there are none.

    Args:
        name: What the user gave.
    """
    path = Path(name).expanduser()
    while not path.parent.is_dir() and path.parent != path:
        path = path.parent
    try:
        there = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, there, n=3) or (sorted(there)[:5] if path.parent != Path() else [])
    return (
        f" There {'is' if len(near) == 1 else 'are'}: {', '.join(str(path.parent / one) for one in near)}."
        if near
        else ""
    )
