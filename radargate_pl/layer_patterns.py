"""Regular expressions that name layers: refused where they are none, or would not end (layer 3)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

SECONDS = 10.0
# A repeated group or many repetitions: only these can take longer than anyone waits.
SUSPICIOUS = re.compile(r"[)\]][*+{]|([*+}].*){4}")
MATCH_ALL = (
    "import json, re, sys\n"
    "pattern, paths = json.load(sys.stdin)\n"
    "for path in paths: re.fullmatch(pattern, path); re.match(rf'(.*\\.)?({pattern})$', path)\n"
)


def check_patterns(config: LoraConfig, model: nn.Module) -> None:
    """Refuse an adapter's config whose patterns are no regular expressions, or do not end on this model's layers.

    Args:
        config: an adapter's.
        model: the backbone.

    Raises:
        ValueError: naming the field and the pattern.
    """
    paths = [path for path, _ in model.named_modules() if path]
    check_pattern("target_modules", config.target_modules, paths)
    check_pattern("exclude_modules", config.exclude_modules, paths)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            check_pattern(field, key, paths)


def check_pattern(field: str, pattern: object, paths: Sequence[str]) -> None:
    """Refuse one pattern; a list names layers by their ends and holds none.

    Args:
        field: what the user calls it.
        pattern: a regular expression, or something else, which passes.
        paths: what it is matched against.

    Raises:
        ValueError: when it cannot be compiled, or takes longer than SECONDS.
    """
    if not isinstance(pattern, str):
        return
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"Expected {field} to be a regular expression, but {pattern!r} is none: {error}.") from error
    if not SUSPICIOUS.search(pattern):
        return
    if not _ends(json.dumps([pattern, list(paths)])):
        raise ValueError(
            f"Expected {field} to match the layers in moments, but {pattern!r} took longer than {SECONDS:.0f} s: a "
            "group that is repeated and can match the same text in several ways never ends. Name the layers plainly."
        )


@lru_cache(maxsize=16)
def _ends(given: str) -> bool:
    """Whether matching ends in time; tried once where a library's experts share one pattern.

    Python's matching cannot be interrupted, so another process tries it first.
    """
    try:
        subprocess.run([sys.executable, "-S", "-c", MATCH_ALL], input=given, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return True
