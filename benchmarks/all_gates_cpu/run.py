"""Every gate and rule over one library of experts, on two CPU cores: one table.

    python benchmarks/all_gates_cpu/run.py --library flan_cot --data DIR --runs runs/all_gates
    python benchmarks/all_gates_cpu/run.py --library flan_v2 --data DIR --runs runs/all_gates

`DIR` holds flan_cot/ and niv2/ as configs/flan and configs/flan_v2 expect them. Every piece of work is a command of
this repository (printed) and is done once: a call that was interrupted goes on. Learned gates are fitted at three
learning rates; the table shows the best on validation and the losses at all three. It ends up in
RUNS/LIBRARY/table.md.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from commands import Job, in_parallel, mean_loss, python, radargate, summary  # noqa: E402

RATES = ("3e-4", "1e-3", "3e-3")


@dataclass
class Library:
    """Experts and the data they come from.

    Attributes:
        configs: folder of experts.yaml and radargate.yaml.
        places: the tasks, below the data folder.
        tasks: how many tasks there are.
        validation: validation examples of each task.
        shots: examples of each task that LoraHub searches on.
        window: batches sorted by length among themselves.
    """

    configs: str
    places: list[str]
    tasks: int
    validation: int
    shots: int
    window: int


SCIENCE = ["flan_cot/qasc.train.jsonl.gz", "flan_cot/qasc.test.jsonl.gz"]
LIBRARIES = {
    "flan_cot": Library("configs/flan", ["flan_cot"], tasks=9, validation=16, shots=5, window=1),
    "flan_v2": Library("configs/flan_v2", ["niv2", *SCIENCE], tasks=41, validation=4, shots=1, window=50),
}
OMOE = "--config=configs/architectures/omoe.yaml"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: what it is called.
        words: config files and settings.
        command: fit or validate.
        rates: learning rates to try; the config's own where empty.
    """

    name: str
    words: list[str] = field(default_factory=list)
    command: str = "fit"
    rates: tuple[str, ...] = ()


def gate(name: str) -> str:
    """The config of a gate, as a word."""
    return f"--config=configs/gates/{name}.yaml"


def learned(name: str, *words: str) -> Row:
    """A gate that is fitted at three learning rates."""
    return Row(name, list(words), rates=RATES)


def rule(name: str, *words: str) -> Row:
    """A gate with nothing to train."""
    return Row(name, list(words), command="validate")


def rows(names: list[str], library: Library) -> list[Row]:
    """Every row over the library with these experts."""
    shots, batch = f"max_examples={library.shots}", f"batch_size={library.shots * library.tasks}"
    few = [f"--data.init_args.{shots}", f"--data.init_args.{batch}", "--trainer.max_steps=40"]
    task, arrow, apart = gate("task"), gate("arrow"), "--model.network.combine=separate"
    everyone = "{" + ", ".join(f"{name}: 1.0" for name in names) + "}"
    return [
        rule("frozen backbone", task, "--model.network.experts=[]"),
        rule("right expert given", task),
        rule("uniform mix", gate("uniform")),
        rule("Arrow", arrow),
        rule("Arrow, A and B apart (mttl)", arrow, apart),
        rule("PEMs", gate("pems"), f"--model.network.gate.weights={everyone}", apart),
        *(rule(f"DirectLoRA {name}", gate("direct"), f"--model.network.gate.expert={name}") for name in names),
        Row("LoraHub", ["--config=configs/rules/lorahub.yaml", *few]),
        learned("StretchGate (MoLE)", gate("stretch")),
        learned("RotationGate", gate("rotation")),
        learned("RadarGate, paper's angles", gate("radargate_paper")),
        learned("RadarGate, angle_norm rms", gate("radargate")),
        learned("RotMoLEGate", gate("rotmole")),
        learned("TutelGate, linear", gate("tutel")),
        learned("TutelGate, cosine", gate("tutel_cosine")),
        learned("NexusGate", gate("nexus")),
        learned("ExpertChoiceGate", gate("expert_choice")),
        learned("StretchGate (OMoE)", gate("stretch"), OMOE),
        learned("RadarGate (OMoE)", gate("radargate"), OMOE),
    ]


def trained_alone(configs: str, rank: int, experts: int) -> list[Row]:
    """What trains LoRA itself on the union of the tasks, as long as the experts: rank r, rank n r, and HydraLoRA."""
    new = "--model.network.new_experts"
    union = [f"--config={configs}/experts.yaml", f"{new}.per=union"]
    wide = rank * experts
    hydra = [f"--config={configs}/radargate.yaml", "--config=configs/architectures/hydralora.yaml"]
    return [
        Row(f"union LoRA, rank {rank}", union),
        Row(
            f"union LoRA, rank {wide}", [*union, f"{new}.rank={wide}", f"{new}.alpha={4 * wide}"]
        ),  # the same alpha / r
        Row("HydraLoRA (4 B)", [*hydra, "--model.optimizer.init_args.lr=1e-3"]),
    ]


def jobs_of(row: Row, runs: Path, base: list[str]) -> list[Job]:
    """The commands of one row."""
    words = [row.command, *base, *row.words]
    if not row.rates:
        return [(folder(runs, row), words)]
    return [(folder(runs, row, rate), [*words, f"--model.optimizer.init_args.lr={rate}"]) for rate in row.rates]


def folder(runs: Path, row: Row, rate: str = "") -> Path:
    """The run folder of a row at one learning rate."""
    name = "".join(letter if letter.isalnum() else "_" for letter in row.name)
    return runs / (f"{name}_{rate}" if rate else name)


def best_of(row: Row, runs: Path) -> tuple[Path, dict[str, float]]:
    """The run of a row with the smallest mean validation loss, and that loss at every rate."""
    tried = {rate: folder(runs, row, rate) for rate in row.rates or ("",)}
    losses = {rate: mean_loss(run) for rate, run in tried.items()}
    return tried[min(losses, key=lambda rate: losses[rate])], losses


def timing_job(row: Row, runs: Path, base: list[str], steps: int) -> Job:
    """A few steps of a row, for its seconds: those of a run with others beside it mean nothing."""
    run, words = jobs_of(row, runs / "timing", base)[0]
    return run, [*words, f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"]


def seconds_a_step(row: Row, runs: Path) -> str:
    """Of the timed steps of a fit; a dash for a rule."""
    told = summary(folder(runs / "timing", row, (row.rates or ("",))[0]))
    return f"{told['seconds']['train'] / told['steps']:.2f}" if told else "-"


def table(all_rows: list[Row], runs: Path) -> str:
    """The table, as Markdown."""
    tried = " / ".join(RATES)
    columns = ["row", "loss (nats)", "exact match", "lr", f"loss at {tried}", "trained", "s a step", "peak memory (GB)"]
    lines = [columns, ["---", "---:", "---:", "---:", "---", "---:", "---:", "---:"]]
    for row in all_rows:
        run, losses = best_of(row, runs)
        told = summary(run)
        cells = [row.name, f"{told['mean']['loss']:.4f}", f"{told['mean']['exact_match']:.2f}"]
        at_rates = " / ".join(f"{loss:.4f}" for loss in losses.values()) if row.rates else ""
        cells += [min(losses, key=lambda name: losses[name]), at_rates]
        cells += [f"{told['parameters']['trainable']:,}", seconds_a_step(row, runs)]
        lines.append([*cells, f"{told['peak_memory_bytes'] / 1e9:.1f}"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=sorted(LIBRARIES), required=True)
    parser.add_argument("--data", required=True, help="folder of flan_cot/ and niv2/")
    parser.add_argument("--runs", default="runs/all_gates", help="folder for the run folders")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--experts", help="folder of the library's experts, if they are trained already")
    parser.add_argument("--expert_steps", type=int, default=250)
    parser.add_argument("--gate_steps", type=int, default=80)
    parser.add_argument(
        "--timed_steps", type=int, default=8, help="steps of each row that are timed, one run after another; 0: none"
    )
    parser.add_argument("--length_window", type=int, help="batches sorted by length; the library's if left out")
    parser.add_argument("--rows", nargs="*", help="only the rows whose name begins so")
    parser.add_argument("--backbone", default="smollm2-135m-q4", help="of configs and last_config")
    parser.add_argument("--last_config", default=str(HERE / "cpu.yaml"), help="config after all others")
    return parser.parse_args()


def main() -> None:
    """Trains the library, then fits or validates every row, times the fits, and writes the table."""
    args = arguments()
    runs, last = Path(args.runs).resolve() / args.library, Path(args.last_config).resolve()
    library = LIBRARIES[args.library]
    configs, places = library.configs, [str(Path(args.data).resolve() / place) for place in library.places]
    data = [f"--data.init_args.tasks=[{', '.join(places)}]"]
    data += [f"--data.init_args.validation_examples={library.validation}"]
    data += [f"--data.init_args.length_window={args.length_window or library.window}"]
    training = [*data, f"--trainer.max_steps={args.expert_steps}", "--data.init_args.batch_size=8"]
    if args.experts:
        experts = Path(args.experts).resolve()
    else:
        radargate(runs / "experts", ["fit", f"--config={configs}/experts.yaml", *training], args.workers, last)
        experts = runs / "experts" / "experts"
    found = sorted(path.name for path in experts.iterdir() if path.is_dir())
    make_domains(experts, args.backbone, places, runs)
    base = [f"--config={configs}/radargate.yaml", *data, f"--model.network.experts={experts}"]
    base += [f"--trainer.max_steps={args.gate_steps}"]
    over = [row for row in rows(found, library) if wanted(row, args.rows)]
    own = [row for row in trained_alone(configs, 8, len(found)) if wanted(row, args.rows)]
    jobs = [job for row in over for job in jobs_of(row, runs, base)]
    jobs += [job for row in own for job in jobs_of(row, runs, training)]
    in_parallel(jobs, args.workers, last)
    timed = [timing_job(row, runs, base, args.timed_steps) for row in over if row.command == "fit"]
    timed += [timing_job(row, runs, training, args.timed_steps) for row in own]
    in_parallel(timed if args.timed_steps else [], 1, last)
    (runs / "table.md").write_text(table([*over, *own], runs))
    print(table([*over, *own], runs))


def make_domains(experts: Path, backbone: str, places: list[str], runs: Path) -> None:
    """Makes the domain embeddings that NexusGate reads, once."""
    if all((folder / "domain.safetensors").exists() for folder in experts.iterdir() if folder.is_dir()):
        return
    words = ["-m", "radargate_pl.domain_command", "--backbone", backbone, "--experts", str(experts), "--overwrite"]
    words += ["--samples", "16", "--tasks", *places]
    words += ["--category_of", "task591_sciq_answer_generation=science", "qasc=science"] if len(places) > 1 else []
    print("python", *words, flush=True)
    python(words, log=runs / "domains.log", threads=2)


def wanted(row: Row, prefixes: list[str] | None) -> bool:
    """Whether a row was asked for."""
    return not prefixes or any(row.name.startswith(prefix) for prefix in prefixes)


if __name__ == "__main__":
    main()
