"""Samples a second of one and two processes with the same global batch, interleaved; one thread each, on the CPU.

    python benchmarks/two_processes.py --runs runs/two_processes --rounds 3

The backbone is the built-in SmolLM2-135M, the experts are random, RadarGate trains. Wall time of training steps alone.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLOBAL_BATCH = 8


def fit(run: Path, processes: int, steps: int, tasks: str, experts: str) -> float:
    """Fit for some steps; return samples a second."""
    options = {
        "trainer.default_root_dir": run,
        "trainer.max_steps": steps,
        "trainer.devices": processes,
        "trainer.accelerator": "cpu",
        "trainer.strategy": "gate_ddp" if processes > 1 else "auto",
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": "false",
        "model.network.init_args.experts": experts,
        "data.init_args.tasks": tasks,
        "data.init_args.batch_size": GLOBAL_BATCH // processes,
        "data.init_args.target": "answer",  # chains of thought do not fit
        "data.init_args.max_length": 160,
        "overwrite": "true",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", "configs/flan/radargate.yaml", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    seconds = json.loads((run / "summary.json").read_text())["seconds"]["train"]
    return steps * GLOBAL_BATCH / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs/two_processes")
    parser.add_argument("--tasks", required=True, help="folder of FLAN-like task files")
    parser.add_argument("--experts", required=True, help="folder of experts of smollm2-135m-q4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for processes, speeds in found.items():
            run = Path(options.runs).resolve() / str(processes)
            speeds.append(fit(run, processes, options.steps, options.tasks, options.experts))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread a process, global batch {GLOBAL_BATCH}")
    for processes, speeds in found.items():
        middle = statistics.median(speeds)
        print(f"{processes} process(es): {middle:.2f} samples/s (median; all: {[round(s, 2) for s in speeds]})")
    print(f"two / one: {statistics.median(found[2]) / statistics.median(found[1]):.2f}")


if __name__ == "__main__":
    main()
