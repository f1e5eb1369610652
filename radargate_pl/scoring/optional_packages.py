"""Packages that only some tasks need, and what to say when one is missing."""

import importlib
from types import ModuleType

EXTRA = "radargate-pl[benchmarks]"


def need(module: str, what: str) -> ModuleType:
    """Import a package of the extra ``benchmarks``.

    Args:
        module: name to import.
        what: what it is needed for, in words.

    Raises:
        ValueError: if it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Expected the package {module.partition('.')[0]} for {what}, but {error.name} is not installed. "
            f"Run: pip install '{EXTRA}'"
        ) from error
