"""Reads YAML that anybody may have written: each value with its line, each mistake in one sentence (layer 6).

What is read is bounded (bytes, nodes after aliases are filled in, depth), so that no file takes memory or minutes.
"""

import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from radargate_pl.config_places import COMMAND_LINE, ConfigError, Located, shortened

MAX_BYTES = 2 * 1024**2
MAX_NODES = 100_000
MAX_DEPTH = 100
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
_MERGE = "tag:yaml.org,2002:merge"


class NotYamlError(ConfigError):
    """The text is no YAML at all."""


class _Loader(yaml.SafeLoader):
    """Reads numbers as jsonargparse does: ``1e-4`` is a float and a date stays text. Counts what it reads."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._name, self._nodes, self._depth = name, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            raise ConfigError([f"{_place(self._name, self.peek_event())}: {_too_much(self._nodes)}"])
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)
        if kind is yaml.ScalarNode and ":" in (value or "") and tag in _PLAIN_TAGS:
            return "tag:yaml.org,2002:str"  # YAML 1.1 reads a time such as 1:00:00 as a number to the base of 60
        return tag


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _place(name: str, item: yaml.Node | yaml.Event) -> str:
    return name if name == COMMAND_LINE or item.start_mark is None else f"{name}:{item.start_mark.line + 1}"


def _too_much(nodes: int) -> str:
    if nodes > MAX_NODES:
        return f"more than {MAX_NODES} values, aliases filled in; a configuration needs no more"
    return f"more than {MAX_DEPTH} levels of nesting"


def read_yaml(path: Path, name: str) -> Located:
    """Reads one config file, or a pipe.

    Args:
        path: The file.
        name: What the user wrote, for messages.

    Raises:
        ConfigError: Not readable, not YAML, a key given twice or no text, or not a mapping at the top.
    """
    node = parse_yaml(_text(path, name), name)
    if node is None:
        return Located({}, f"{name}:1")
    if not isinstance(node.value, dict):
        raise ConfigError([f"{node.where}: expected keys such as 'trainer:' and 'model:', found {node.shown()}"])
    return node


def parse_yaml(text: str, name: str) -> Located | None:
    """The values of a text with their lines; None where it holds nothing.

    Args:
        text: YAML or JSON.
        name: The file for messages; ``command line`` gives no lines.

    Raises:
        NotYamlError: Not YAML.
        ConfigError: Larger than a configuration can be, a key given twice or no text, a value that its
            tag does not fit, an alias inside its own anchor.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError([f"{name}: is larger than {MAX_BYTES} bytes; a configuration needs no more"])
    try:
        loader = _Loader(_json_without_tabs(text), name)
        root = loader.get_single_node()
        reading = _Reading(loader, name)
        node = None if root is None else reading.locate(root)
    except yaml.MarkedYAMLError as error:
        raise NotYamlError([_not_yaml(error, name)]) from error
    except yaml.reader.ReaderError as error:
        where = "" if name == COMMAND_LINE else f" in line {text.count(chr(10), 0, error.position) + 1}"
        raise NotYamlError([f"{name}: not valid YAML: {' '.join(str(error).split())}{where}"]) from error
    except yaml.YAMLError as error:
        raise NotYamlError([f"{name}: not valid YAML: {' '.join(str(error).split())}"]) from error
    if reading.mistakes:
        raise ConfigError(list(dict.fromkeys(reading.mistakes)))
    return node


def _not_yaml(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark and name != COMMAND_LINE else name
    detail = " ".join(part for part in (error.context, error.problem) if part)
    return f"{place}: not valid YAML: {shortened(detail, 300)}"


def _text(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{name}: cannot be read: {error}"]) from error
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{name}: is larger than {MAX_BYTES} bytes; a configuration needs no more. Is it data?"])
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # what PowerShell writes
        with suppress(UnicodeDecodeError):
            return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{name}: cannot be read: {error} (line {line}). Save it as UTF-8."]) from error


def _json_without_tabs(text: str) -> str:
    """JSON may be indented by tabs, YAML may not."""
    if "\t" not in text or text.lstrip()[:1] != "{":
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return re.sub(r"^[ \t]+", lambda found: " " * len(found[0]), text, flags=re.MULTILINE)


class _Reading:
    """Turns the nodes of one text into values with places.

    Args:
        loader: Made from the text.
        name: The file, for messages.
    """

    def __init__(self, loader: _Loader, name: str) -> None:
        self.loader, self.name = loader, name
        self.mistakes: list[str] = []
        self._open: list[int] = []  # the nodes around the one that is read
        self._count = 0

    def locate(self, node: yaml.Node) -> Located:
        """The value of a node, aliases filled in."""
        self._count += 1
        where = self._where(node)
        if self._count > MAX_NODES or len(self._open) > MAX_DEPTH:
            raise ConfigError([*self.mistakes, f"{where}: {_too_much(self._count)}"])
        if id(node) in self._open:
            raise ConfigError([*self.mistakes, f"{where}: the alias stands inside its own anchor, without an end"])
        if node.tag not in _PLAIN_TAGS:
            self.mistakes.append(f"{where}: the tag '{_short_tag(node.tag)}' is not known here; write a plain value")
            return Located(None, where)
        if isinstance(node, yaml.ScalarNode):
            return Located(self._scalar(node), where)
        if node.tag.rpartition(":")[2] != ("map" if isinstance(node, yaml.MappingNode) else "seq"):
            self.mistakes.append(f"{where}: the tag '{_short_tag(node.tag)}' does not fit a list or mapping")
            return Located(None, where)
        self._open.append(id(node))
        value: Any
        if not isinstance(node, yaml.MappingNode):
            value = [self.locate(child) for child in node.value]
        else:
            value = {}
            for key, (key_node, value_node) in self._pairs(node).items():
                value[key] = Located(self.locate(value_node).value, self._where(key_node))
        self._open.pop()
        return Located(value, where)

    def _where(self, node: yaml.Node) -> str:
        return _place(self.name, node)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.rpartition(":")[2], node.value
        try:
            value = self.loader.construct_object(node)
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            problem = f"the number has {len(text)} digits" if kind == "int" and len(text) > 4000 else f"is no {kind}"
            self.mistakes.append(f"{self._where(node)}: '{shortened(text, 40)}': {problem}")
            return None
        if isinstance(value, float) and math.isinf(value) and "inf" not in text.lower():
            self.mistakes.append(f"{self._where(node)}: '{shortened(text, 40)}': too large for a number")
        return value

    def _pairs(self, node: yaml.MappingNode) -> dict[Any, tuple[yaml.Node, yaml.Node]]:
        """The keys of a mapping with their nodes, those merged by ``<<`` first; each key once."""
        merged: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        own: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            key = "<<" if key_node.tag == _MERGE else self._key(key_node)
            if key is None:
                continue
            line = key_node.start_mark.line + 1
            if key in lines:
                first = "" if self.name == COMMAND_LINE else f", first in line {lines[key]}"
                self.mistakes.append(f"{self._where(key_node)}: the key '{key}' is given twice{first}")
            lines.setdefault(key, line)
            if key_node.tag == _MERGE:
                merged = self._merged(value_node)
            else:
                own[key] = (key_node, value_node)
        return {**merged, **own}

    def _merged(self, node: yaml.Node) -> dict[Any, tuple[yaml.Node, yaml.Node]]:
        found: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for part in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            self._count += 1
            if not isinstance(part, yaml.MappingNode) or id(part) in self._open or self._count > MAX_NODES:
                what = _too_much(self._count) if self._count > MAX_NODES else "'<<' takes a mapping outside of itself"
                raise ConfigError([*self.mistakes, f"{self._where(node)}: {what}"])
            self._open.append(id(part))
            found.update(self._pairs(part))
            self._open.pop()
        return found

    def _key(self, node: yaml.Node) -> Any:
        """The key as text; a whole number stays one. None, and a mistake, for what YAML takes for something else."""
        if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS:
            kind = node.tag.rpartition(":")[2]
            if kind in ("str", "int"):
                return self._scalar(node)
            read_as = {"bool": "true or false", "null": "nothing", "float": "a number"}.get(kind, kind)
            written = shortened(node.value, 40) or "(nothing)"
            problem = f"the key {written} means {read_as} in YAML; as a name write it in quotes: '{written}'"
            if kind == "null":
                problem = f"the key {written} means nothing in YAML; as a name write it in quotes"
            self.mistakes.append(f"{self._where(node)}: {problem}")
        else:
            self.mistakes.append(f"{self._where(node)}: expected a name as the key, found a list, a mapping or a tag")
        return None


def _short_tag(tag: str) -> str:
    return shortened(tag.replace("tag:yaml.org,2002:", "!!"), 60)
