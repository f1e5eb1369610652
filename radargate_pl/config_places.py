"""A setting with the place it comes from, and the mistakes that name such places (layer 6)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

COMMAND_LINE = "command line"
_LONG = 120


class ConfigError(Exception):
    """One or several mistakes in a configuration, worded for the person who wrote it.

    Args:
        mistakes: One sentence or more for each mistake, starting with the place.
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


@dataclass
class Located:
    """A value and its place.

    Args:
        value: A scalar; for a mapping ``dict[str, Located]``; for a list ``list[Located]``. Keys that are whole
            numbers stay numbers: a few arguments ask for them.
        where: ``file:line`` or ``command line``.
    """

    value: Any
    where: str

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    @property
    def from_command_line(self) -> bool:
        """Whether somebody typed it, so that a scalar is still text."""
        return self.where == COMMAND_LINE

    def shown(self) -> str:
        """The value as messages quote it: at most 120 characters."""
        return shortened(repr(self.plain()))


def shortened(text: str, limit: int = _LONG) -> str:
    """The text in one line of at most ``limit`` characters and what was left out.

    >>> shortened("one two", 4)
    'one ... (7 characters)'
    """
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit].rstrip()} ... ({len(line)} characters)"


def few(items: Iterable[str], limit: int = 5) -> str:
    """The first of many in one sentence.

    >>> few(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    found = list(items)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more
