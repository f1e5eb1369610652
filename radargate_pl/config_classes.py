"""A class chosen in place of another one starts from its own defaults (layer 6)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import _typehints


@contextmanager
def own_defaults() -> Iterator[None]:
    """Parse inside without handing arguments from one class to the next.

    jsonargparse lets a class that replaces another keep every argument of the same name, defaults too: since the gate
    of `GatedNetwork` is a RadarGate where none is given, NexusGate would start with RadarGate's ``top_k``, not with its
    own. It has no setting for that; the function that decides is replaced while parsing.
    """
    original = _typehints.discard_init_args_on_class_path_change
    _typehints.discard_init_args_on_class_path_change = _discard_all
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = original


def _discard_all(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    if prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
        for key in list(vars(prev_val["init_args"])):
            prev_val["init_args"].pop(key)
