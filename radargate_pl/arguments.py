"""What a gate or rotation was built with, read back from the object itself (layer 1)."""

import inspect
from typing import Any

from torch import nn


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """Return every constructor argument but the first (the site), by name.

    Each argument must be stored under its own name. One that was a factory holds the module it made; a module that was
    chosen by a name in the config says it as its ``config_name``.
    """
    names = list(inspect.signature(type(module).__init__).parameters)[2:]
    values = {name: getattr(module, name) for name in names}
    return {name: getattr(value, "config_name", value) for name, value in values.items()}


def line_of(module: nn.Module) -> str:
    """Describe a module as built, in one line, e.g. ``RadarGate(top_k=2, scorer=x, ...)``."""
    arguments = arguments_of(module).items()
    shown = (f"{name}={line_of(value) if isinstance(value, nn.Module) else value}" for name, value in arguments)
    return f"{type(module).__name__}({', '.join(shown)})"


def spec_of(module: nn.Module) -> dict[str, Any]:
    """Return what builds the module again: ``class_path`` and ``init_args``, nested modules likewise."""
    init_args = {
        name: spec_of(value) if isinstance(value, nn.Module) else value for name, value in arguments_of(module).items()
    }
    return {"class_path": f"{type(module).__module__}.{type(module).__qualname__}", "init_args": init_args}
