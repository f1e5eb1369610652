"""Fits every gate over nine FLAN experts on two CPU cores: learning rate chosen on validation, three seeds.

    python benchmarks/flan_cot_cpu/run.py --data DIR --runs runs/flan_cot_cpu

`DIR` holds <task>.train.jsonl.gz and <task>.test.jsonl.gz of the nine tasks. Every piece of work is a `radargate`
command (printed); a run that has ended well is not run again. At the end `choice.json` lies in the runs folder: gate,
learning rate, and the run folders of its three seeds.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
GATES = {
    "stretch": "configs/gates/stretch.yaml",
    "rotation": "configs/gates/rotation.yaml",
    "radargate_paper": "configs/gates/radargate_paper.yaml",
    "radargate_rms": "configs/gates/radargate.yaml",
}
RATES = ("3e-4", "1e-3", "3e-3")
SEEDS = (0, 1, 2)
EXPERT_STEPS, GATE_STEPS = 250, 80


def main() -> None:
    """Runs experts, references, the grid of learning rates at seed 0, then the other seeds at the best rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the nine tasks")
    parser.add_argument("--runs", default="runs/flan_cot_cpu", help="folder for the run folders")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    args = parser.parse_args()
    runs = Path(args.runs).resolve()
    data = f"--data.init_args.tasks={Path(args.data).resolve()}"
    experts = ["fit", "--config=configs/flan/experts.yaml", f"--trainer.max_steps={EXPERT_STEPS}"]
    experts += ["--data.init_args.batch_size=8", "--data.init_args.validation_examples=24"]
    radargate(runs / "experts", [*experts, data], threads=2)
    base = ["--config=configs/flan/radargate.yaml", data, f"--model.network.experts={runs / 'experts/experts'}"]
    jobs = [
        (runs / "frozen", ["validate", *base, "--config=configs/gates/task.yaml", "--model.network.experts=[]"]),
        (runs / "uniform", ["validate", *base, "--config=configs/gates/uniform.yaml"]),
        (runs / "right_expert", ["validate", *base, "--config=configs/gates/task.yaml"]),
    ]
    jobs += [fit(runs, base, gate, rate, 0) for rate in RATES for gate in GATES]
    in_parallel(jobs, args.workers)
    best = {gate: min(RATES, key=lambda rate: mean_loss(folder(runs, gate, rate, 0))) for gate in GATES}
    in_parallel([fit(runs, base, gate, best[gate], seed) for seed in SEEDS[1:] for gate in GATES], args.workers)
    choice = {
        gate: {"rate": rate, "runs": [str(folder(runs, gate, rate, s).relative_to(runs)) for s in SEEDS]}
        for gate, rate in best.items()
    }
    (runs / "choice.json").write_text(json.dumps(choice, indent=2) + "\n")
    print(json.dumps(choice, indent=2))


def folder(runs: Path, gate: str, rate: str, seed: int) -> Path:
    """The run folder of one gate, learning rate and seed."""
    return runs / f"{gate}_{rate}" / f"seed{seed}"


def fit(runs: Path, base: list[str], gate: str, rate: str, seed: int) -> tuple[Path, list[str]]:
    """One fit: its run folder and the words after `radargate`."""
    words = ["fit", *base, f"--config={GATES[gate]}", f"--trainer.max_steps={GATE_STEPS}", f"--seed_everything={seed}"]
    return folder(runs, gate, rate, seed), [*words, f"--model.optimizer.init_args.lr={rate}"]


def in_parallel(jobs: list[tuple[Path, list[str]]], workers: int) -> None:
    """Runs jobs, `workers` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        for job in [pool.submit(radargate, run, words, threads=1) for run, words in jobs]:
            job.result()


def radargate(run: Path, words: list[str], *, threads: int) -> None:
    """Runs one command unless its run folder says that it ended well."""
    if status(run) == "ok":
        return
    words = [
        words[0],
        *files(words),
        f"--config={HERE / 'cpu.yaml'}",
        *settings(words),
        f"--trainer.default_root_dir={run}",
        "--overwrite=true",
    ]
    print("radargate", *words, flush=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with (run.parent / f"{run.name}.log").open("w") as log:
        command = [sys.executable, str(ROOT / "cli.py"), *words]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=log, stderr=log)


def files(words: list[str]) -> list[str]:
    """The config files among the words; cpu.yaml must come after them and before the settings, which win over it."""
    return [word for word in words[1:] if word.startswith("--config=")]


def settings(words: list[str]) -> list[str]:
    """The other words of a command."""
    return [word for word in words[1:] if not word.startswith("--config=")]


def status(run: Path) -> str | None:
    """What the run's summary says of its end, if there is one."""
    path = run / "summary.json"
    return json.loads(path.read_text())["status"] if path.exists() else None


def mean_loss(run: Path) -> float:
    """The mean validation loss of a run."""
    return float(json.loads((run / "summary.json").read_text())["mean"]["loss"])


if __name__ == "__main__":
    main()
