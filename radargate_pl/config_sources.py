"""Where settings come from: YAML files and the command line, each value with its file and line.

Files are merged here, deeply and in order, rather than by jsonargparse: jsonargparse carries ``init_args`` of the same
name over when only ``class_path`` changes, so that a gate would inherit arguments nobody gave it.
Here a changed class starts from its own defaults.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

SPEC_KEYS = frozenset({"class_path", "init_args", "dict_kwargs"})
COMMAND_LINE = "command line"
_CONFIG_FLAGS = ("-c", "--config")


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
        value: A scalar; for a mapping ``dict[str, Located]``; for a list ``list[Located]``.
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


class _Loader(yaml.SafeLoader):
    """Reads numbers as jsonargparse does: ``1e-4`` is a float and a date stays text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path, name: str) -> Located:
    """Reads one config file.

    Args:
        path: The file.
        name: What the user wrote, for messages.

    Raises:
        ConfigError: Not readable, not YAML, a key given twice, or not a mapping at the top.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        mistakes: list[str] = []
        node = Located({}, f"{name}:1") if root is None else _locate(loader, root, name, mistakes)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{name}: cannot be read: {error}"]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        detail = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{place}: not valid YAML: {detail}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{name}: not valid YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(node.value, dict):
        mistakes.append(f"{node.where}: expected keys such as 'trainer:' and 'model:', found {node.plain()!r}")
    if mistakes:
        raise ConfigError(mistakes)
    return node


def _locate(loader: _Loader, node: yaml.Node, name: str, mistakes: list[str]) -> Located:
    where = f"{name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return Located([_locate(loader, child, name, mistakes) for child in node.value], where)
    if not isinstance(node, yaml.MappingNode):
        return Located(loader.construct_object(node), where)
    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.value in lines:
            mistakes.append(
                f"{name}:{line}: the key '{key_node.value}' is given twice, first in line {lines[key_node.value]}"
            )
        lines.setdefault(key_node.value, line)
    loader.flatten_mapping(node)  # resolves "<<: *anchor"
    values = {}
    for key_node, value_node in node.value:
        child = _locate(loader, value_node, name, mistakes)
        values[loader.construct_object(key_node)] = Located(child.value, f"{name}:{key_node.start_mark.line + 1}")
    return Located(values, where)


@dataclass
class CommandLine:
    """The words typed after ``radargate``, sorted.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``; None if none was typed.
        files: The values of ``--config``, in order.
        settings: ``(dotted key, text)`` of every other option; text is None for a flag.
        rest: Every word but the subcommand and the config files, in order.
    """

    subcommand: str | None
    files: list[str]
    settings: list[tuple[str, str | None]]
    rest: list[str]


def read_command_line(args: Sequence[str], subcommands: Sequence[str]) -> CommandLine:
    """Sorts the words of the command line; knows no option but ``--config``."""
    words = list(args)
    line = CommandLine(None, [], [], [])
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if name in _CONFIG_FLAGS:
            if not equals and not words:
                raise ConfigError([f"{COMMAND_LINE}: {name} needs the path of a YAML file"])
            line.files.append(text if equals else words.pop(0))
        elif not word.startswith("-"):
            if line.subcommand is None:
                line.subcommand = word
                if word not in subcommands:
                    return line
            else:
                line.rest.append(word)
        else:
            line.rest.append(word)
            if not equals and words and not _is_option(words[0]) and line.subcommand is not None:
                line.rest.append(words[0])
                text, equals = words.pop(0), "="
            if word.startswith("--"):
                line.settings.append((name[2:], text if equals else None))
    return line


def _is_option(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and word[1:2].isalpha())


def setting_tree(key: str, text: str | None) -> Located:
    """``model.network.dropout`` and ``0.1`` as nested mappings; a mapping or list typed as text becomes one."""
    value: Any = text
    if text is not None and text.lstrip()[:1] in ("{", "["):
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            value = text
    node = _typed(value)
    for part in reversed(key.removesuffix("+").split(".")):
        node = Located({part: node}, COMMAND_LINE)
    return node


def _typed(value: Any) -> Located:
    if isinstance(value, dict):
        return Located({key: _typed(child) for key, child in value.items()}, COMMAND_LINE)
    if isinstance(value, list):
        return Located([_typed(child) for child in value], COMMAND_LINE)
    return Located(value, COMMAND_LINE)


def merge(base: Located, over: Located) -> Located:
    """``over`` on top of ``base``: mappings key by key, anything else replaced; a changed class drops its arguments."""
    above = over
    if isinstance(over.value, str) and isinstance(base.value, dict) and "class_path" in base.value:
        above = Located({"class_path": over}, over.where)
    if not (isinstance(base.value, dict) and isinstance(above.value, dict)):
        return above
    kept = dict(base.value)
    if changes_class(base, above):
        kept = {}
    for key, child in above.value.items():
        kept[key] = merge(kept[key], child) if key in kept else child
    return Located(kept, above.where)


def changes_class(base: Located, over: Located) -> bool:
    """Whether both name a class and the names differ; ``RadarGate`` and ``radargate_pl.gates.RadarGate`` do not."""
    names = [node.value["class_path"].value for node in (base, over) if "class_path" in node.value]
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        return False
    first, second = names
    if "." in first and "." in second and first.split(".")[0] != second.split(".")[0]:
        return True
    return first.split(".")[-1] != second.split(".")[-1]


def drop_replaced(merged: Located, line: CommandLine) -> None:
    """Removes from the merged files the arguments of each class that the command line replaces."""
    for key, text in line.settings:
        parts = key.removesuffix(".class_path").split(".")
        node = _descend(merged, parts)
        if node is not None and text and "class_path" in node.value and "{" not in text:
            named = Located({"class_path": Located(text, COMMAND_LINE)}, COMMAND_LINE)
            if changes_class(node, named):
                node.value = {"class_path": node.value["class_path"]}


def _descend(node: Located, parts: Sequence[str]) -> Located | None:
    for part in parts:
        if not isinstance(node.value, dict):
            return None
        if part not in node.value and isinstance(node.value.get("init_args"), Located):
            node = node.value["init_args"]
        if not isinstance(node.value, dict) or part not in node.value:
            return None
        node = node.value[part]
    return node if isinstance(node.value, dict) else None


def find_config(name: str) -> Path:
    """The file of a ``--config`` value: as written, or from the configs that come with the package.

    Raises:
        ConfigError: There is none; names the files that lie nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {
        f"configs/{file.relative_to(folder)}": file for folder in shipped_configs() for file in folder.rglob("*.yaml")
    }
    if name in shipped:
        return shipped[name]
    there = dict.fromkeys([*shipped, *map(str, path.parent.glob("*.yaml"))])
    near = get_close_matches(name, there, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else f" Shipped with the package: {', '.join(sorted(shipped))}."
    raise ConfigError([f"{COMMAND_LINE}: --config {name}: no such file.{hint}"])


def shipped_configs() -> Iterator[Path]:
    """The folder ``configs`` inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    return (folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())
