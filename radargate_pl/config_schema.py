"""Finds every mistake in a configuration at once, before anything is built.

The accepted keys and types are jsonargparse's own (read off a parser made for each class), so they cannot drift from
what the command line takes. Added here: all mistakes instead of the first, the file and line of each, the nearest keys
*of that class*, and no page of usage.
"""

import collections.abc
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from radargate_pl.config_places import Located

_MANY = 14  # beyond so many keys only the nearest are listed


class ForeignNameError(ValueError):
    """The name is there, but not of what is asked for."""


@dataclass(frozen=True)
class Schema:
    """What one class, or one group of options, accepts.

    Args:
        title: Name for messages.
        keys: Name to type, or to the schema of a nested group.
        required: Names without a default.
        defaults: Name to default.
    """

    title: str
    keys: Mapping[str, Any]
    required: frozenset[str]
    defaults: Mapping[str, Any]


def parser_schema(parser: ArgumentParser, title: str) -> Schema:
    """Reads names, types and defaults off a parser's options; dotted names become nested schemas."""
    types_of: dict[str, Any] = {}
    required, defaults = set(), {}
    for action in parser._actions:  # the only list of options there is
        typehint = getattr(action, "_typehint", None) or action.type
        if not action.option_strings or (typehint is None and action.nargs != 0):
            continue
        if action.dest in ("help", "config") or action.dest.endswith((".help", "print_config")):
            continue
        types_of[action.dest] = typehint or bool
        defaults[action.dest] = action.default
        if action.required:
            required.add(action.dest)
    required |= set(getattr(parser, "_extra_required_keys", ()))
    return _nested(title, types_of, required, defaults)


def _nested(title: str, flat: Mapping[str, Any], required: set[str], defaults: Mapping[str, Any]) -> Schema:
    keys: dict[str, Any] = {name: hint for name, hint in flat.items() if "." not in name}
    for head in dict.fromkeys(name.split(".")[0] for name in flat if "." in name):
        tails = {name[len(head) + 1 :]: name for name in flat if name.startswith(head + ".")}
        keys[head] = _nested(
            head.capitalize() if title == "" else head,
            {tail: flat[name] for tail, name in tails.items()},
            {tail for tail, name in tails.items() if name in required},
            {tail: defaults[name] for tail, name in tails.items()},
        )
    return Schema(title, keys, frozenset(name for name in required if "." not in name), defaults)


@functools.cache
def class_schema(cls: type, positionals: int) -> Schema:
    """What ``cls`` accepts besides its first arguments, which the program gives."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={positionals} if positionals else None, fail_untyped=False, sub_configs=True)
    return parser_schema(parser, cls.__name__)


def class_options(typehint: Any, positionals: int = 0) -> Iterator[tuple[type, int]]:
    """The base classes a type asks for by ``class_path``, and how many of their arguments the program gives."""
    origin, args = typing.get_origin(typehint), typing.get_args(typehint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            yield from class_options(option, positionals)
    elif origin is collections.abc.Callable and args:  # a bare Callable says not what it makes
        given = len(args[0]) if isinstance(args[0], list) else 0
        yield from class_options(args[-1], given)
    elif inspect.isclass(typehint) and not is_dataclass(typehint) and _is_configurable(typehint):
        yield typehint, positionals


def _is_configurable(cls: type) -> bool:
    plain = cls.__module__.split(".")[0] in ("builtins", "pathlib", "datetime", "enum", "typing", "jsonargparse")
    return not plain and hasattr(cls, "__subclasses__") and cls.__name__ not in ("dtype", "device", "Tensor")


def all_classes(typehint: Any) -> list[type]:
    """The classes of a type and of whatever it holds: of ``dict[str, Gate]`` too."""
    inside = [base for arg in typing.get_args(typehint) for base in (all_classes(arg) if arg is not typehint else [])]
    return [*(base for base, _ in class_options(typehint)), *inside]


def options_of(typehint: Any) -> list[Any]:
    """The members of a union; other types alone."""
    if typing.get_origin(typehint) in (typing.Union, types.UnionType):
        return list(typing.get_args(typehint))
    return [typehint]


def named_classes(bases: Sequence[type]) -> dict[str, type]:
    """Every loaded, public and concrete class below ``bases``, by short name."""
    found: dict[str, type] = {}
    pending = list(bases)
    while pending:
        cls = pending.pop()
        pending.extend(type.__subclasses__(cls))
        private = cls.__name__.startswith("_") or "._" in cls.__module__ or "<locals>" in cls.__qualname__
        if not private and not inspect.isabstract(cls):
            found.setdefault(cls.__name__, cls)
    return found


def find_class(name: str, bases: Sequence[type]) -> Any:
    """The class that a ``class_path``, short or dotted, names.

    Raises:
        ValueError: Nothing of that name; names the nearest classes.
        ForeignNameError: Neither one of ``bases`` nor a function annotated to return one, such as ``os.system``.
    """
    known = named_classes(bases)
    if "." not in name:
        if name in known:
            return known[name]
        raise ValueError(f"no {_titles(bases)} called '{name}'. {nearest(name, known)}")
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import '{name}' ({error}). {nearest(attribute, known)}") from error
    if not _makes(found, tuple(bases)):
        raise ForeignNameError(f"'{name}' is not a {_titles(bases)}. {nearest(attribute, known)}")
    return found


def _makes(found: Any, bases: tuple[type, ...]) -> bool:
    """Whether it is one of the classes, or a function that says it returns one: nothing else may be called."""
    if not inspect.isfunction(found):
        return inspect.isclass(found) and issubclass(found, bases)
    try:
        made = typing.get_type_hints(found).get("return")
    except (NameError, TypeError, AttributeError):
        made = None
    return inspect.isclass(made) and issubclass(made, bases)


def _titles(bases: Sequence[type]) -> str:
    return " or ".join(base.__name__ for base in bases)


def near_names(name: str, known: Mapping[str, Any]) -> list[str]:
    """At most three of the names, those spelt much like this one."""
    lower = {key.lower(): key for key in known}
    return [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]


def nearest(name: str, known: Mapping[str, Any], near: Sequence[str] | None = None) -> str:
    """``Nearest: a, b.``; where nothing is near, what there is, or how much of it."""
    near = near_names(name, known) if near is None else near
    if near:
        return f"Nearest: {', '.join(near)}."
    if not known:
        return "It accepts none."
    if len(known) <= _MANY:
        return f"Accepted: {', '.join(sorted(known))}."
    return f"None of its {len(known)} names is near; --help lists them."


def drop_empty_groups(source: Located, root: Schema) -> None:
    """Removes groups such as ``trainer:`` with nothing below them, which would replace those of other files."""
    for key in [key for key, child in source.value.items() if child.value is None]:
        if isinstance(root.keys.get(key), Schema):
            del source.value[key]


def takes_null(schema: Schema, key: str, node: Located) -> bool:
    """Whether nothing, written ``null`` or left empty in a file, is a value of this key."""
    hint = schema.keys[key]
    if node.value is not None or node.from_command_line or isinstance(hint, Schema):
        return True
    if key not in schema.required and schema.defaults.get(key) is None:
        return True
    return any(option in (Any, None, type(None)) for option in options_of(hint))


def describe(typehint: Any) -> str:
    """A type in words: ``'x' or 'experts'``, ``int or null``, ``list of str``."""
    origin, args = typing.get_origin(typehint), typing.get_args(typehint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in sorted(args, key=lambda a: a is type(None))))
    if origin is Literal:
        return " or ".join(repr(option) for option in args)
    if typehint is type(None):
        return "null"
    if origin is collections.abc.Callable:
        return describe(args[-1]) if args else "function"
    if origin is not None and args:
        inner = [describe(arg) for arg in args if arg is not Ellipsis]
        mapping = isinstance(origin, type) and issubclass(origin, collections.abc.Mapping)
        return f"mapping of {inner[0]} to {inner[1]}" if mapping else f"{origin.__name__} of {', '.join(inner)}"
    return getattr(typehint, "__name__", None) or str(typehint)


def leaf_problem(typehint: Any, node: Located) -> str | None:
    """Why jsonargparse would refuse a value of this type; None if it would not."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=typehint)
    try:
        if node.from_command_line and isinstance(node.value, str):
            parser.parse_args([f"--value={node.value}"])
        else:
            parser.parse_object({"value": node.plain()})
    except (ArgumentError, TypeError, ValueError):
        choices = [str(choice) for option in options_of(typehint) for choice in _literals(option)]
        near = get_close_matches(str(node.value), choices, n=1)
        return f"expected {describe(typehint)}, found {node.shown()}." + (f" Nearest: {near[0]}." if near else "")
    return None


def number_key(node: Located) -> int | None:
    """The first key inside a value that is a whole number; None if all are names."""
    if not isinstance(node.value, dict | list):
        return None
    keys = [key for key in node.value if isinstance(key, int)] if isinstance(node.value, dict) else []
    children = node.value.values() if isinstance(node.value, dict) else node.value
    inside = (number_key(child) for child in children)
    return keys[0] if keys else next((found for found in inside if found is not None), None)


def unfilled_variable(node: Located) -> str | None:
    """The first ``${NAME}`` inside a value, or ``$NAME`` at the start of a path; nothing here fills them in."""
    if isinstance(node.value, dict | list):
        children = node.value.values() if isinstance(node.value, dict) else node.value
        return next((found for found in map(unfilled_variable, children) if found is not None), None)
    found = (
        re.search(r"\$\{[A-Z_][A-Z0-9_]*\}|^\$[A-Z_][A-Z0-9_]*(?=/)", node.value)
        if isinstance(node.value, str)
        else None
    )
    return found[0] if found else None


def takes_number_keys(typehint: Any) -> bool:
    """Whether a mapping of this type, or inside it, has keys that are no text."""
    origin, args = typing.get_origin(typehint), typing.get_args(typehint)
    is_mapping = isinstance(origin, type) and issubclass(origin, collections.abc.Mapping)
    return (is_mapping and args[0] is not str) or any(takes_number_keys(arg) for arg in args)


def _literals(typehint: Any) -> tuple[Any, ...]:
    return typing.get_args(typehint) if typing.get_origin(typehint) is Literal else ()
