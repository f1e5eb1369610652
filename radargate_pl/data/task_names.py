"""Names of tasks: safe as folder, key and log name, and never two tasks under one."""

import re
from collections.abc import Iterable

LONGEST = 120  # bytes; folders, checkpoints' keys and logs add their own


def clean_name(name: str) -> str:
    """A task name that is safe as folder name, state-dict key and log name: other characters become `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


class TaskNames:
    """Cleans the names that records carry, and remembers which was which."""

    def __init__(self) -> None:
        self._raw: dict[str, str] = {}

    def clean(self, name: str, where: str) -> str:
        """The clean form of a name.

        Args:
            name: As the record has it, in any script.
            where: Its file and line.

        Raises:
            ValueError: If another name became the same.
        """
        clean = clean_name(name)
        other = self._raw.setdefault(clean, name)
        if other != name:
            raise ValueError(
                f"Expected different tasks to have names that differ in letters a-z, digits, _ and -, but {other!r} "
                f"and {name!r} ({where}) both become {clean!r}. Write other names into their field task, or a file for "
                "each and {name: file} in tasks."
            )
        return clean


def check_lengths(names: Iterable[str]) -> None:
    """Refuse names that no file system takes, before anything is trained.

    Args:
        names: Clean ones.

    Raises:
        ValueError: Naming the first that is too long.
    """
    for name in names:
        if len(name.encode()) > LONGEST:
            raise ValueError(
                f"Expected names of tasks of at most {LONGEST} characters, since they name folders, but "
                f"{name[:40]!r}... has {len(name)}. Give it another one: tasks: {{name: file}}."
            )
