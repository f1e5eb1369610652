"""The parser of the commands that are no fit, test or predict (layer 6; standard library only)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class WordParser(argparse.ArgumentParser):
    """Says what is wrong in one line, not below a page of usage; takes no abbreviations.

    Args:
        options: those of ``argparse.ArgumentParser``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2.

        Args:
            message: what is wrong.
        """
        self.exit(2, f"{self.prog}: error: {message} (--help says more)\n")


def check_output(path: Path, inputs: Sequence[Path | None] = (), *, option: str = "--output") -> None:
    """Raise unless a file can be written there, before anything long is begun.

    Args:
        path: the file to write.
        inputs: files that are read, which no output may replace.
        option: how the path was given, for messages.

    Raises:
        ValueError: if it is a folder, one of the inputs, or lies below a file.
    """
    if path.is_dir():
        raise ValueError(f"Expected {option} to be a file, but {path} is a folder; name a file in it.")
    above = next(place for place in path.absolute().parents if place.exists())
    if not above.is_dir():
        raise ValueError(f"Expected {option} to be a file in a folder, but {above} is a file.")
    for given in inputs:
        if given is not None and path.exists() and given.exists() and path.samefile(given):
            raise ValueError(f"Expected {option} to be another file than {given}, which is read; nothing was written.")
