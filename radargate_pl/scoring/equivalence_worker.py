"""The other end of ``equivalence``: reads pairs of formulas as JSON lines, answers true, false or null."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space
PARSING_SECONDS = 5


def serve() -> None:
    """Answer until the input ends; first a line that says that the library is loaded."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints is no answer
    verdict = _load()
    answers.write("null\n")
    answers.flush()
    for line in sys.stdin.buffer:
        reference, answer = json.loads(line)
        answers.write(json.dumps(verdict(reference, answer)) + "\n")
        answers.flush()


def _load() -> Callable[[str, str], bool | None]:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def read(latex: str) -> list[Any]:
        return parse(f"\\boxed{{{latex}}}", parsing_timeout=PARSING_SECONDS)

    def verdict(reference: str, answer: str) -> bool | None:
        try:
            return bool(verify(read(reference), read(answer), timeout_seconds=PARSING_SECONDS, raise_on_error=True))
        except (Exception, TimeoutException):
            return None

    return verdict


if __name__ == "__main__":
    serve()
