"""Walks a configuration against the schemas of the classes it names; see ``config_schema``."""

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from radargate_pl.config_names import keys_like, keys_named
from radargate_pl.config_places import ConfigError, Located, shortened
from radargate_pl.config_schema import (
    ForeignNameError,
    Schema,
    all_classes,
    class_options,
    class_schema,
    describe,
    find_class,
    leaf_problem,
    near_names,
    nearest,
    number_key,
    options_of,
    takes_null,
    takes_number_keys,
    unfilled_variable,
)
from radargate_pl.config_sources import SPEC_KEYS


class ConfigCheck:
    """Collects mistakes over several sources, which are given in the order in which they are merged.

    Args:
        root: Schema of the subcommand's parser.
        linked: Key that the program sets itself, to the key it follows.
    """

    def __init__(self, root: Schema, linked: Mapping[str, str]) -> None:
        self.root = root
        self.linked = {_short(target): source for target, source in linked.items()}
        self.mistakes: list[str] = []
        self._classes: dict[str, tuple[type, int] | None] = {}  # key without init_args -> the class in effect there
        self._given: set[str] = set()

    def read(self, source: Located) -> None:
        """Checks one file, or one option of the command line."""
        self._group(self.root, source, "")

    def require_all(self) -> None:
        """After the last source: notes required arguments that nobody gave."""
        for name in sorted(self.root.required - self._given):
            hints = [base.__name__ for base, _ in class_options(self.root.keys.get(name))]
            what = f" (a {' or '.join(hints)}, by class_path)" if hints else ""
            self.mistakes.append(f"configuration: {name}{what} is required and not given")
        for path, found in self._classes.items():
            if found is not None:
                schema = class_schema(*found)
                for name in sorted(schema.required):
                    key = f"{path}.{name}"
                    if key not in self._given and key not in self.linked:
                        self.mistakes.append(
                            f"configuration: {path}: {schema.title} needs '{name}', which is not given"
                        )

    def raise_mistakes(self) -> None:
        """Reports everything found.

        Raises:
            ConfigError: With every mistake, if there is any.
        """
        if self.mistakes:
            raise ConfigError(self.mistakes)

    def _complain(self, node: Located, path: str, problem: str) -> None:
        self.mistakes.append(f"{node.where}: {'--' if node.from_command_line else ''}{path}: {problem}")

    def _group(self, schema: Schema, node: Located, path: str) -> None:
        if not isinstance(node.value, dict):
            if node.value is not None:
                self._complain(node, path, f"expected keys of {schema.title}, found {node.shown()}")
            return
        for key, child in node.value.items():
            inner = f"{path}.{key}" if path else str(key)
            if key not in schema.keys:
                owner = f"{schema.title} has no argument" if schema.title else "there is no key"
                near = self._near(str(key), schema)
                self._complain(child, inner, f"{owner} '{key}'. {nearest(str(key), schema.keys, near)}")
                continue
            short = _short(inner)
            self._given.add(short)
            if not takes_null(schema, key, child):
                what = describe(schema.keys[key])
                self._complain(child, inner, f"expected {what}, found null. Leave the key out for its default.")
            elif short in self.linked:
                self._complain(
                    child, inner, f"is set by the program: it always equals {self.linked[short]}. Remove it."
                )
            elif isinstance(schema.keys[key], Schema):
                self._group(schema.keys[key], child, inner)
            else:
                self._value(schema.keys[key], child, inner, schema.defaults.get(key))

    def _near(self, name: str, schema: Schema) -> list[str]:
        """Keys that were meant: of that name anywhere in the tree, else alike in this group, else alike anywhere."""
        everywhere = list(self._all_keys(self.root, ""))
        return keys_named(name, everywhere) or near_names(name, schema.keys) or keys_like(name, everywhere)

    def _all_keys(self, schema: Schema, path: str) -> Iterator[str]:
        for key, hint in schema.keys.items():
            inner = f"{path}.{key}" if path else key
            if inner not in self.linked:
                yield inner
            if isinstance(hint, Schema):
                yield from self._all_keys(hint, inner)
                continue
            classes = list(class_options(hint))
            found = self._in_effect(inner, classes, schema.defaults.get(key)) if classes else None
            if found is not None:
                yield from self._all_keys(class_schema(*found), inner)
            for group in options_of(hint):
                if isinstance(group, type) and is_dataclass(group):
                    yield from self._all_keys(class_schema(group, 0), inner)

    def _value(self, typehint: Any, node: Located, path: str, default: Any) -> None:
        classes = list(class_options(typehint))
        if isinstance(node.value, dict):
            if classes and (SPEC_KEYS.issuperset(node.value) or self._in_effect(path, classes, default)):
                self._class(classes, node, path, default)
                return
            group = next((option for option in options_of(typehint) if is_dataclass(option)), None)
            if isinstance(group, type):
                self._group(class_schema(group, 0), node, path)
                return
        if isinstance(node.value, list):
            elements = [found for option in options_of(typehint) for found in _element_classes(option)]
            if elements and all(isinstance(child.value, dict) and "class_path" in child.value for child in node.value):
                for index, child in enumerate(node.value):
                    self._class(elements, child, f"{path}.{index}", None)
                return
        problem = _not_as_written(typehint, node, path)
        if problem is None and node.from_command_line and isinstance(node.value, dict):
            return  # --trainer.callbacks.monitor changes the callback added last; jsonargparse knows which
        problem = problem or _leaf_problem(typehint, node) or _foreign(all_classes(typehint), node)
        if problem is None and not (classes and isinstance(node.value, str) and self._is_class(classes, node)):
            return
        if classes and isinstance(node.value, str):
            self._class(classes, Located({"class_path": node}, node.where), path, default)
        elif problem is not None:
            self._complain(node, path, problem)

    def _is_class(self, classes: Sequence[tuple[type, int]], node: Located) -> bool:
        try:
            return isinstance(find_class(node.value, [base for base, _ in classes]), type)
        except ValueError:
            return False

    def _in_effect(self, path: str, classes: Sequence[tuple[type, int]], default: Any) -> tuple[type, int] | None:
        if _short(path) in self._classes:
            return self._classes[_short(path)]
        name = default.get("class_path") if hasattr(default, "get") else None
        if isinstance(name, str):
            return find_class(name, [base for base, _ in classes]), classes[0][1]
        return None

    def _class(self, classes: Sequence[tuple[type, int]], node: Located, path: str, default: Any) -> None:
        is_spec = SPEC_KEYS.issuperset(node.value)
        if "class_path" in node.value:
            name = node.value["class_path"]
            self._name_class(classes, name, path)
        found = self._in_effect(path, classes, default)
        if found is None:
            if _short(path) not in self._classes:
                what = " or ".join(describe(base) for base, _ in classes)
                self._complain(node, path, f"names no class; give class_path, a {what}")
            return
        self._classes[_short(path)] = found
        arguments = node if not is_spec else node.value.get("init_args")
        if arguments is not None:
            self._group(class_schema(*found), arguments, f"{path}.init_args" if is_spec else path)

    def _name_class(self, classes: Sequence[tuple[type, int]], name: Located, path: str) -> None:
        found: Any = None
        try:
            if not isinstance(name.value, str):
                raise ValueError(f"class_path: expected the name of a class, found {name.shown()}.")
            found = find_class(name.value, [base for base, _ in classes])
        except ValueError as error:
            self._complain(name, path, str(error))
        positionals = next((count for base, count in classes if isinstance(found, type) and issubclass(found, base)), 0)
        self._classes[_short(path)] = (found, positionals) if isinstance(found, type) else None


def _leaf_problem(typehint: Any, node: Located) -> str | None:
    return None if node.value is None and node.from_command_line else leaf_problem(typehint, node)


def _foreign(bases: Sequence[type], node: Located) -> str | None:
    """Why a name inside a value, of which jsonargparse would call whatever it finds, is not taken."""
    if isinstance(node.value, list):
        return next((found for child in node.value if (found := _foreign(bases, child))), None)
    name = node.value
    if isinstance(node.value, dict):
        below = () if "class_path" in node.value else bases
        inside = next((found for child in node.value.values() if (found := _foreign(below, child))), None)
        if inside is not None or "class_path" not in node.value:
            return inside
        name = node.value["class_path"].value
        if not bases:
            return f"takes no class_path ({shortened(str(name), 40)})"
    if not bases or not isinstance(name, str):
        return None
    try:
        find_class(name, bases)
    except ForeignNameError as error:
        return str(error)
    except ValueError:
        pass
    return None


def _element_classes(typehint: Any) -> list[tuple[type, int]]:
    """The classes a list type holds; none for other types."""
    arguments = typing.get_args(typehint)
    return list(class_options(arguments[0])) if len(arguments) == 1 else []


def _not_as_written(typehint: Any, node: Located, path: str) -> str | None:
    """What stands in the value and is read otherwise than it looks: names that are numbers, variables of a shell."""
    number = None if takes_number_keys(typehint) else number_key(node)
    if number is not None:
        return f"the key {number} is a number; as a name write it in quotes: '{number}'"
    variable = None if "prompt" in path else unfilled_variable(node)
    if variable is not None:
        value = shortened(str(node.plain()), 60)
        return (
            f"{variable} is not filled in here; give the value on the command line in double quotes, where the shell "
            f'does it: --{_short(path)} "{value}"'
        )
    if node.from_command_line and isinstance(node.value, dict) and "class_path" in node.value:
        return _foreign(all_classes(typehint), node)
    return None


def _short(path: str) -> str:
    """A key as it is typed on the command line: without ``init_args``."""
    return ".".join(part for part in path.split(".") if part != "init_args")
