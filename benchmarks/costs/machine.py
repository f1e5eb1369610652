"""Where numbers come from: processor, versions, commit, command."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from radargate_pl.backbones import supports_bfloat16
from radargate_pl.provenance import git_state, installed_versions
from radargate_pl.redaction import redact_arguments

ROOT = Path(__file__).resolve().parents[2]


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine, without its name, and the software."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16_units": supports_bfloat16(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": installed_versions(),
        "git": git_state(ROOT),
        "command": ["python", *redact_arguments([Path(sys.argv[0]).name, *sys.argv[1:]])],
    }


def machine_lines(found: dict[str, Any]) -> list[str]:
    """The same as lines of Markdown."""
    unit = found["gpu"] or f"{found['processor']}, {found['cores']} cores, {found['threads']} threads"
    git = found["git"] or {}
    commit = f"{git.get('commit', 'no repository')[:12]}{' with changes' if git.get('dirty') else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [
        f"* Machine: {unit}, bfloat16 units: {'yes' if found['bfloat16_units'] else 'no'}; load average at the start "
        f"{found['load_average']}.",
        f"* Versions: {versions}; commit {commit}.",
        f"* Command: `{' '.join(found['command'])}`",
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
