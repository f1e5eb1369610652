"""What the benchmark scripts share: run `radargate` commands, several at a time, each once."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# A run folder, and the words after `radargate`: the command, then --config=... and settings in any order.
Job = tuple[Path, list[str]]


def in_parallel(jobs: list[Job], workers: int, last_config: Path | None = None) -> None:
    """Runs jobs, `workers` at a time, one thread each."""
    with ThreadPoolExecutor(workers) as pool:
        for job in [pool.submit(radargate, run, words, 1, last_config) for run, words in jobs]:
            job.result()


def radargate(run: Path, words: list[str], threads: int, last_config: Path | None = None) -> None:
    """Runs one command unless its run folder says that it ended well.

    `last_config` comes after the other config files and before the settings, which win over it. A fit that was
    interrupted goes on from its newest checkpoint.
    """
    if status(run) == "ok":
        return
    files = [word for word in words[1:] if word.startswith("--config=")]
    settings = [word for word in words[1:] if not word.startswith("--config=")]
    last = [f"--config={last_config}"] if last_config else []
    again = "--ckpt_path=auto" if words[0] == "fit" else "--overwrite=true"
    words = [words[0], *files, *last, *settings, f"--trainer.default_root_dir={run}", again]
    print("radargate", *words, flush=True)
    python(["cli.py", *words], log=run.parent / f"{run.name}.log", threads=threads)


def python(words: list[str], *, log: Path, threads: int) -> None:
    """Runs one Python command in the repository, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("w") as output:
        command = [sys.executable, *words]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=output, stderr=output)


def summary(run: Path) -> dict[str, Any]:
    """The summary of a run; empty when there is none."""
    path = run / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def status(run: Path) -> str | None:
    """What the run's summary says of its end, if there is one."""
    return summary(run).get("status")


def mean_loss(run: Path) -> float:
    """The mean validation loss of a run."""
    return float(summary(run)["mean"]["loss"])
