"""Secrets taken out of what is stored or shown: command lines, configs, text (standard library only; layer 5)."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"
LEAST_SECRET = 10**6  # of numbers under the name of a token
# Words of a name, so that api_key, accessToken and --hf-token are secrets while max_new_tokens, tokenizer, author and
# monkey are not.
_SECRET = {
    "key",
    "apikey",
    "accesskey",
    "secret",
    "secrets",
    "password",
    "passwords",
    "passwd",
    "passphrase",
    "pwd",
    "credential",
    "credentials",
    "auth",
    "authorization",
    "authentication",
    "bearer",
    "cookie",
    "cookies",
}
_OF_PEOPLE = {
    "api",
    "access",
    "auth",
    "hf",
    "hub",
    "refresh",
    "secret",
    "private",
    "user",
    "session",
    "github",
    "wandb",
}
_OF_TEXTS = {
    "pad",
    "eos",
    "bos",
    "unk",
    "sep",
    "cls",
    "mask",
    "special",
    "end",
    "start",
    "stop",
    "image",
    "id",
    "ids",
    "type",
    "max",
    "min",
    "num",
    "number",
    "new",
    "per",
    "first",
    "last",
    "next",
    "level",
    "count",
    "length",
    "limit",
}
_SECRET_VALUE = re.compile(
    r"(hf_|sk-|ghp_|github_pat_|glpat-|xox[bp]-|AKIA)[A-Za-z0-9_\-]{12,}"
    r"|(?<=://)[^/\s:@\"']*:[^/\s\"']+(?=@)|(?<=://)[A-Za-z0-9_\-]{20,}(?=@)"
    r"|(?<=[Bb]earer )(?!<redacted>)[^\s\"',}\]]+|(?<=[Bb]asic )[A-Za-z0-9+/]{8,}={0,2}"
)
_PAIR = re.compile(r"""([\w.-]+)(["']?\s*[:=]\s*)("[^"]*"|'[^']*'|\[[^\]]*\]?|[^\s,;&}\]"'\[{][^\s,;&}\]"']*)""")


def is_secret_name(name: str) -> bool:
    """Whether a key's last part names a secret.

    Args:
        name: a key such as ``--trainer.logger.api_key``.

    Example:
        >>> is_secret_name("--logger.api_key"), is_secret_name("accessToken"), is_secret_name("--model.max_new_tokens")
        (True, True, False)
    """
    last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip("-+ \"'").rpartition(".")[2])
    words = set(re.split(r"[_\-\s]+", last.lower()))
    if words & _SECRET:
        return True
    if "token" in words:
        return not words & _OF_TEXTS
    return words == {"tokens"} or bool(words & {"tokens", "keys"} and words & _OF_PEOPLE)


def redact(config: Any) -> Any:
    """Return a copy with every value replaced that looks like a secret, or lies under a key named like one.

    Args:
        config: dicts, lists, strings, numbers, booleans and None; truth values and None are no secrets.
    """
    if isinstance(config, Mapping):
        return {key: _hidden(item) if _hides(str(key), item) else redact(item) for key, item in config.items()}
    if isinstance(config, list | tuple):
        return [redact(item) for item in config]
    return _redact_value(config) if isinstance(config, str) else config


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line without its secrets: values of arguments named like one, and values that look like one.

    Args:
        arguments: words of the command line.

    Example:
        >>> redact_arguments(["fit", "--hf_token", "abc", "--url=https://me:pw@host/x"])
        ['fit', '--hf_token', '<redacted>', '--url=https://<redacted>@host/x']
    """
    shown, name = [], ""
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            shown.append(f"{name}={_argument(name, value)}" if equals else name)
            name = "" if equals else name
        else:
            shown.append(_argument(name, word))
            name = ""
    return shown


def redact_text(text: str) -> str:
    """Return a line in which values behind names of secrets (``api_key: x``), and what looks like one, are replaced.

    Args:
        text: of a message, of JSON, of YAML.
    """
    return _redact_pairs(_redact_value(text))


def _redact_value(text: str) -> str:
    """Hide what looks like a secret, in JSON and addresses by name too; other text is the user's own wording."""
    try:
        value = json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        value = None
    if value is not None:
        hidden = redact(value)
        return text if hidden == value else json.dumps(hidden, ensure_ascii=False)
    text = _SECRET_VALUE.sub(REDACTED, text)
    return _redact_pairs(text) if "://" in text else text


def _argument(name: str, value: str) -> str:
    number = int(value) if value.isdecimal() else value
    if name and _hides(name, number) and value.lower() not in ("true", "false", "null", ""):
        return REDACTED
    if _is_headers(name) and value[:1] == "{":
        return REDACTED
    return redact_text(value) if value[:1] in ("{", "[") else _redact_value(value)


def _redact_pairs(text: str) -> str:
    shown, start = [], 0
    while (found := _PAIR.search(text, start)) is not None:
        name, _, value = found.groups()
        is_plain = not is_secret_name(name) or value.lower() in ("true", "false", "null", "none", '""', "''")
        if is_plain or REDACTED in value:
            shown.append(text[start : found.end(1)])  # what stands behind may be a pair itself
            start = found.end(1)
        else:
            quote = value[0] if value[0] in "\"'" else ""
            shown.append(f"{text[start : found.start(3)]}{quote}{REDACTED}{quote}")
            start = found.end(3)
    return "".join([*shown, text[start:]])


def _is_headers(name: str) -> bool:
    return name.rpartition(".")[2].lower().strip("-") in ("headers", "extra_headers", "http_headers", "default_headers")


def _hides(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    if isinstance(value, Mapping) and _is_headers(name):
        return True
    if "token" in name.lower():  # a number of them, or their ids
        items = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(item, int | float) and abs(item) < LEAST_SECRET for item in items):
            return False
    return is_secret_name(name)


def _hidden(value: Any) -> Any:
    """All of what lies under a name of a secret, but which class makes it."""
    if isinstance(value, Mapping):
        return {key: item if key == "class_path" else _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item) for item in value]
    return value if value is None or isinstance(value, bool) or value == "" else REDACTED
