"""Math-Verify in a process of its own: equality of formulas that may never come to an end.

Math-Verify stops itself by SIGALRM, which works in the main thread only, takes the alarm away from whoever uses it, and
does not stop a formula that fills the memory. A process that is ended when it is late has none of these limits.
"""

import atexit
import functools
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path

from radargate_pl.notices import say_once
from radargate_pl.scoring.optional_packages import EXTRA

SECONDS = 20.0
STARTING_SECONDS = 120.0


def equivalent(reference: str, answer: str) -> bool:
    """Whether Math-Verify takes two formulas for equal; False if it is not installed, which is said once.

    Args:
        reference: LaTeX of the right answer.
        answer: LaTeX of the answer found.
    """
    if not is_installed():
        say_once(
            "Math-Verify is not installed: formulas are compared by string rules only, which miss equal ones that are "
            f"written differently. Run: pip install '{EXTRA}'"
        )
        return False
    verdict = _shared().ask(reference, answer)
    if verdict is None:
        say_once(f"Math-Verify gave up on a formula (time, memory or its own error), which counts as wrong: {answer!r}")
    return bool(verdict)


@functools.cache
def is_installed() -> bool:
    """Whether Math-Verify and a parser for it are there."""
    return all(
        importlib.util.find_spec(name) is not None for name in ("math_verify", "latex2sympy2_extended", "antlr4")
    )


class Verifier:
    """A process that answers one question after the other; ended and started again when it is late.

    Args:
        seconds: how long one answer may take.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, reference: str, answer: str) -> bool | None:
        """Ask whether two formulas are equal.

        Args:
            reference: LaTeX of the right answer.
            answer: LaTeX of the answer found.

        Returns:
            The verdict; None if there was none in time.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()  # the pipes of one that has ended stay open otherwise
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:  # ended in between
                self.close()
                return None
            line = self._line(self.seconds)
            verdict = json.loads(line) if line else None
            if line is None:
                self.close()
            return verdict

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(entry for entry in (package, os.environ.get("PYTHONPATH", "")) if entry)
        self._process = subprocess.Popen(
            # -P: a file sympy.py in the working directory is not the library.
            [sys.executable, "-P", "-m", "radargate_pl.scoring.equivalence_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the parent, whose end ends this process too
        )
        if self._line(STARTING_SECONDS) is None:
            self.close()
            raise ValueError(
                "Expected Math-Verify to start, but its process ended or said nothing. "
                f"Run: pip install --force-reinstall '{EXTRA}', or uninstall math-verify to compare by string rules."
            )

    def _line(self, seconds: float) -> bytes | None:
        """One line of the process, or None if it is late or has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self._process.stdout.readline() or None  # lines are short, so written and read in one piece


@functools.cache
def _of_process(pid: int) -> Verifier:
    """One for each process: after a fork, parent and child must not read each other's answers."""
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier


def _shared() -> Verifier:
    return _of_process(os.getpid())
