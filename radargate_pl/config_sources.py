"""Where settings come from: YAML files and the command line, each value with its file and line.

Files are merged here, deeply and in order, rather than by jsonargparse: jsonargparse carries ``init_args`` of the same
name over when only ``class_path`` changes, so that a gate would inherit arguments nobody gave it.
Here a changed class starts from its own defaults.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from radargate_pl.config_places import COMMAND_LINE, ConfigError, Located, few
from radargate_pl.config_yaml import NotYamlError, parse_yaml

SPEC_KEYS = frozenset({"class_path", "init_args", "dict_kwargs"})
_CONFIG_FLAGS = ("-c", "--config")


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
    """``model.network.dropout`` and ``0.1`` as nested mappings; a mapping or list typed as text becomes one.

    Raises:
        ConfigError: It is one, but no configuration can hold it; see `parse_yaml`.
    """
    node = Located(text, COMMAND_LINE)
    if text is not None and text.lstrip()[:1] in ("{", "["):
        with suppress(NotYamlError):  # text after all, such as a prompt
            node = _typed(key, text) or node
    for part in reversed(key.removesuffix("+").split(".")):
        node = Located({part: node}, COMMAND_LINE)
    return node


def _typed(key: str, text: str) -> Located | None:
    try:
        return parse_yaml(text, COMMAND_LINE)
    except NotYamlError:
        raise
    except ConfigError as error:
        raise ConfigError(
            [f"{COMMAND_LINE}: --{key}: {mistake.partition(': ')[2]}" for mistake in error.mistakes]
        ) from error


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
    if not name:
        raise ConfigError([f"{COMMAND_LINE}: --config needs the path of a YAML file"])
    path = Path(name)
    if path.exists() and not path.is_dir():  # a pipe such as /dev/stdin is as good as a file
        return path
    shipped = {
        f"configs/{file.relative_to(folder)}": file for folder in shipped_configs() for file in folder.rglob("*.yaml")
    }
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        inside = few(sorted(str(file) for file in path.glob("*.yaml")))
        raise ConfigError([f"{COMMAND_LINE}: --config {name}: is a folder; give a file{inside and ': ' + inside}."])
    there = dict.fromkeys([*shipped, *map(str, path.parent.glob("*.yaml"))])
    near = get_close_matches(name, there, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else f" Shipped with the package: {', '.join(sorted(shipped))}."
    raise ConfigError([f"{COMMAND_LINE}: --config {name}: no such file.{hint}"])


def shipped_configs() -> Iterator[Path]:
    """The folder ``configs`` inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    return (folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())
