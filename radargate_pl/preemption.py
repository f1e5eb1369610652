"""How a process that is asked to end does so at a step boundary: signals, trigger file, exit code (layer 5)."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from radargate_pl.atomic_files import remove_unfinished
from radargate_pl.steps import StepRequests

EXIT_CODE = 85  # no shell, Python or Slurm uses it: a job script can tell "start me again" from every failure
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TRIGGER = "save_now"


class Preempted(SystemExit):
    """Ends the process with exit code 85 once its checkpoint is written.

    Args:
        step: optimiser steps done.
        saved: whether there is a checkpoint to go on from.
    """

    def __init__(self, step: int, saved: bool) -> None:
        super().__init__(EXIT_CODE)
        self.step, self.saved = step, saved

    def __str__(self) -> str:
        there = "go on with --ckpt_path auto" if self.saved else "checkpoints are turned off: nothing was saved"
        return f"asked to stop after step {self.step}; {there} (exit code {EXIT_CODE})"


class SignalWatch:
    """Turns SIGTERM and SIGUSR1 into a request; a second signal ends the process at once.

    The handler sets a flag and nothing else: it runs between any two instructions, in the middle of a backward pass or
    of a save. Files are written under temporary names, so ending at once harms none; their temporary files are removed.

    Args:
        requests: where the wish to stop goes.
    """

    def __init__(self, requests: StepRequests) -> None:
        self.requests = requests
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only; elsewhere the process has another owner
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def remove(self) -> None:
        """Give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requests.stop:
            os.write(2, f"radargate: {name} again: ending at once\n".encode())
            remove_unfinished()
            os._exit(128 + number)
        self.requests.stop = True
        os.write(2, f"radargate: {name}: saving at the next step boundary, then exit code {EXIT_CODE}\n".encode())


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
