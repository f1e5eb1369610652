"""From a stored ``class_path`` and ``init_args`` back to the gate they describe (layer 3)."""

import functools
import importlib
from typing import Any

from radargate_pl.gates import Gate
from radargate_pl.rotations import Rotation


def factory_of(spec: dict[str, Any], *, trust_code: bool = False) -> functools.partial[Any]:
    """Return what makes a gate (or rotation) from its site, as `radargate_pl.arguments.spec_of` described it.

    Args:
        spec: ``class_path`` and ``init_args``; an argument that is such a description itself becomes a factory too.
        trust_code: allow classes from outside this package.

    Raises:
        ValueError: for a class from elsewhere that is not trusted, one that does not exist, or one that is no gate or
            rotation.
    """
    found = _class_at(spec["class_path"], trust_code=trust_code)
    arguments = {
        name: factory_of(value, trust_code=trust_code) if isinstance(value, dict) and "class_path" in value else value
        for name, value in spec["init_args"].items()
    }
    return functools.partial(found, **arguments)


def _class_at(class_path: str, *, trust_code: bool) -> type:
    module, _, name = class_path.rpartition(".")
    if not trust_code and module.split(".")[0] != "radargate_pl":
        raise ValueError(
            f"Expected a gate of radargate_pl, but the folder names {class_path}. Pass trust_code=True if you "
            "trust that class: its code will run."
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Expected the gate {class_path} to exist, but {error}. Use the version of radargate-pl (and the "
            "package of the gate, if it is not ours) that wrote the folder."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Gate | Rotation)):
        raise ValueError(f"Expected {class_path} to be a Gate, but it is not.")
    return found
