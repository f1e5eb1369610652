"""Memory of one row in a process of its own: what importing costs, what is built, and the peak of the steps."""

import ctypes
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from costs.backbones import SharedWeights
from costs.case import Case, Setting
from costs.cases import case_of
from costs.rows import Row

STEPS = 3


def measure_apart(row: Row, script: Path, words: list[str]) -> dict[str, Any]:
    """Measure a row's memory in a fresh process.

    Args:
        row: the row.
        script: the command to start again with ``--memory_row``.
        words: the options it was started with.

    Returns:
        What `measure_here` found, or ``unavailable`` with the reason.
    """
    command = [sys.executable, str(script), *words, "--memory_row", row.name]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        ending = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"unavailable": f"{ending}: {done.stderr.strip().splitlines()[-1:]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure_here(row: Row, setting: Setting) -> dict[str, Any]:
    """Build a row and run it a few times in this process, which has done nothing else.

    Returns:
        What `peak_of` found, and what the case tells of itself.
    """
    import peft  # noqa: F401

    # What transformers imports late counts as importing.
    SharedWeights(dataclasses.replace(setting, backbone="debug-tiny"))
    found, case = peak_of(lambda: case_of(row, setting, SharedWeights(setting)), setting.device)
    return {**found, **case.describe(), **({} if case.compiled is None else case.compiled())}


def peak_of(build: Callable[[], Case], device: torch.device) -> tuple[dict[str, int], Case]:
    """Build a case and run it a few times; everything imported so far counts as importing.

    Returns:
        Bytes: ``imports``, ``built`` (without imports), ``build_peak``, ``peak`` (of the steps, without imports) and
        ``whole`` (of the whole process at its largest); on a GPU what is allocated there, where importing costs
        nothing. ``steps_apart`` tells whether the steps' peak could be told from that of building.
    """
    _tidy()
    imports = _resident(device)
    case = build()
    _tidy()
    build_peak, built = _peak(device), _resident(device)
    is_apart = _forget_peak(device)
    for _ in range(STEPS):
        case.run()
        case.module.zero_grad(set_to_none=True)
    peak = _peak(device)
    found = {"imports": imports, "built": built - imports, "build_peak": build_peak - imports}
    return {**found, "peak": peak - imports, "whole": max(build_peak, peak), "steps_apart": is_apart}, case


def _tidy() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _largest()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _largest()
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), _largest())


def _forget_peak(device: torch.device) -> bool:
    """Begin a new peak; false where the system cannot, and the peak then includes building."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _largest() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
