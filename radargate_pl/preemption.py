"""How a process that is asked to end does so at a step boundary: signals, trigger file, exit code (layer 5)."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from radargate_pl.atomic_files import remove_unfinished
from radargate_pl.steps import StepRequests

EXIT_CODE = 85  # no shell, Python or Slurm uses it: a job script can tell "start me again" from every failure
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Ctrl-C, a terminal that closes and quit: a person ends the fit, and by convention the code is 128 + signal.
TERMINAL = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
TRIGGER = "save_now"


class Preempted(SystemExit):
    """Ends the process once its checkpoint is written.

    Args:
        step: optimiser steps done.
        saved: whether there is a checkpoint to go on from.
        code: the exit code; 85, or 128 + signal after one from a terminal.
    """

    def __init__(self, step: int, saved: bool, code: int = EXIT_CODE) -> None:
        super().__init__(code)
        self.step, self.saved = step, saved

    def __str__(self) -> str:
        there = "go on with --ckpt_path auto" if self.saved else "checkpoints are turned off: nothing was saved"
        return f"asked to stop after step {self.step}; {there} (exit code {self.code})"


class SignalWatch:
    """Turns SIGTERM, SIGUSR1 and those of a terminal into a request; a second signal ends the process at once.

    The handler sets a flag and nothing else: it runs between any two instructions, in the middle of a backward pass or
    of a save. Files are written under temporary names, so ending at once harms none; their temporary files are removed.

    Args:
        requests: where the wish to stop goes.

    Attributes:
        exit_code: of a process that ends at the first signal's request.
    """

    def __init__(self, requests: StepRequests) -> None:
        self.requests, self.exit_code = requests, EXIT_CODE
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only; elsewhere the process has another owner
        # Under nohup and in the background of a script the terminal's signals are ignored, and stay so.
        heeded = [number for number in TERMINAL if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in (*SIGNALS, *heeded)}

    def remove(self) -> None:
        """Give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requests.stop:
            _say(f"radargate: {name} again: ending at once\n")
            remove_unfinished()
            os._exit(128 + number)
        self.requests.stop = True
        self.exit_code = 128 + number if number in TERMINAL else EXIT_CODE
        once_more = "; once more ends at once" if number in TERMINAL else ""
        _say(f"radargate: {name}: saving at the next step boundary, then exit code {self.exit_code}{once_more}\n")


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
        os.write(2, text.encode())


def leave_children_alone() -> None:
    """Keep Lightning from killing this process because the ranks it started have ended with another code than 0.

    Its launcher looks after them in a thread, every five seconds; all of them are about to end with 85.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def take_trigger(folder: Path) -> bool:
    """Remove the trigger file of a run folder; tell whether it was there.

    Args:
        folder: ``touch FOLDER/save_now`` asks for a checkpoint.
    """
    try:
        (folder / TRIGGER).unlink()
    except OSError:
        return False
    return True
