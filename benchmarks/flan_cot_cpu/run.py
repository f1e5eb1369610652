"""Fits every gate over nine FLAN experts on two CPU cores: learning rate chosen on validation, three seeds.

    python benchmarks/flan_cot_cpu/run.py --data DIR --runs runs/flan_cot_cpu

`DIR` holds <task>.train.jsonl.gz and <task>.test.jsonl.gz of the nine tasks. Every piece of work is a `radargate`
command (printed); a run that has ended well is not run again. At the end `choice.json` lies in the runs folder: gate,
learning rate, and the run folders of its three seeds.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from commands import Job, in_parallel, mean_loss, radargate  # noqa: E402  lies beside this folder

CPU = HERE / "cpu.yaml"
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
    radargate(runs / "experts", [*experts, data], threads=2, last_config=CPU)
    base = ["--config=configs/flan/radargate.yaml", data, f"--model.network.experts={runs / 'experts/experts'}"]
    jobs = [
        (runs / "frozen", ["validate", *base, "--config=configs/gates/task.yaml", "--model.network.experts=[]"]),
        (runs / "uniform", ["validate", *base, "--config=configs/gates/uniform.yaml"]),
        (runs / "right_expert", ["validate", *base, "--config=configs/gates/task.yaml"]),
    ]
    jobs += [fit(runs, base, gate, rate, 0) for rate in RATES for gate in GATES]
    in_parallel(jobs, args.workers, CPU)
    best = {gate: min(RATES, key=lambda rate: mean_loss(folder(runs, gate, rate, 0))) for gate in GATES}
    in_parallel([fit(runs, base, gate, best[gate], seed) for seed in SEEDS[1:] for gate in GATES], args.workers, CPU)
    choice = {
        gate: {"rate": rate, "runs": [str(folder(runs, gate, rate, s).relative_to(runs)) for s in SEEDS]}
        for gate, rate in best.items()
    }
    (runs / "choice.json").write_text(json.dumps(choice, indent=2) + "\n")
    print(json.dumps(choice, indent=2))


def folder(runs: Path, gate: str, rate: str, seed: int) -> Path:
    """The run folder of one gate, learning rate and seed."""
    return runs / f"{gate}_{rate}" / f"seed{seed}"


def fit(runs: Path, base: list[str], gate: str, rate: str, seed: int) -> Job:
    """One fit: its run folder and the words after `radargate`."""
    words = ["fit", *base, f"--config={GATES[gate]}", f"--trainer.max_steps={GATE_STEPS}", f"--seed_everything={seed}"]
    return folder(runs, gate, rate, seed), [*words, f"--model.optimizer.init_args.lr={rate}"]


if __name__ == "__main__":
    main()
