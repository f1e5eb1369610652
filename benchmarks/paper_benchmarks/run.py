"""Every benchmark with a local file, on the backbone alone, two gates over category experts, and one union LoRA.

    python benchmarks/paper_benchmarks/run.py --data DIR --runs runs/all_gates/flan_v2 --estimate
    python benchmarks/paper_benchmarks/run.py --data DIR --runs runs/all_gates/flan_v2 --out runs/paper_benchmarks

`DIR` holds benchmarks/, flan_cot/ and niv2/; `--runs` is what benchmarks/all_gates_cpu/run.py --library flan_v2 leaves
(of each gate the rate with the smallest validation loss is tested), or name the run folders one by one. Rankings are
asked on all examples. Every portion is a `radargate test` of its own (printed) with a folder of its own, done once: a
call that was interrupted goes on behind the last finished batch. All models answer a task before the next begins, and
OUT/table.md is written anew after each. `--rescore` runs nothing: it scores what is there by the rules of this version.
"""

import argparse
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import yaml  # noqa: E402
from commands import mean_loss, python, status  # noqa: E402
from estimate import Speed, text_of, work_of  # noqa: E402
from portions import Limits, Portion, portions  # noqa: E402
from rescoring import rescore  # noqa: E402
from table import answers, read_results, results_of, run_of, table  # noqa: E402

# Of all_gates_cpu/run.py, without the learning rate.
RUNS = {
    "StretchGate": "StretchGate__MoLE_",
    "RadarGate": "RadarGate__angle_norm_rms",
    "union LoRA": "union_LoRA__rank_8",
}
FROZEN = "frozen"


@dataclass(frozen=True)
class Model:
    """One column of the table.

    Attributes:
        name: its heading, and the folder of its runs.
        run: a run folder of `radargate fit`, whose config is used.
        is_trained: whether its best checkpoint is used; otherwise the backbone alone.
    """

    name: str
    run: Path
    is_trained: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """What the run was fitted with."""
        loaded: dict[str, Any] = yaml.safe_load((self.run / "config.yaml").read_text(encoding="utf-8"))
        return loaded

    @property
    def checkpoint(self) -> Path | None:
        """The weights that are tested."""
        return self.run / "checkpoints" / "best.ckpt" if self.is_trained else None

    def words(self) -> list[str]:
        """What `radargate test` is told about the model."""
        weights = f"--ckpt_path={self.checkpoint}" if self.checkpoint else "--model.network.experts=[]"
        return [f"--config={self.run / 'config.yaml'}", weights]


def models(options: argparse.Namespace) -> list[Model]:
    """The columns of the table.

    Raises:
        SystemExit: a run is not there.
    """
    given = {"StretchGate": options.stretch, "RadarGate": options.radar, "union LoRA": options.union}
    found = {name: Path(path) if path else best_of(Path(options.runs), RUNS[name]) for name, path in given.items()}
    return [Model(FROZEN, found["StretchGate"].resolve(), False), *(Model(n, p.resolve()) for n, p in found.items())]


def best_of(runs: Path, name: str) -> Path:
    """Of the runs of a row at several learning rates the one with the smallest mean validation loss."""
    tried = [path for path in (runs / name, *runs.glob(f"{name}_*e-*")) if status(path) == "ok"]
    if not tried:
        raise SystemExit(f"{runs} holds no finished run {name}; name its folder (--help)")
    return min(tried, key=mean_loss)


class Tests:
    """The tests that are still to be made, and the table over those that are.

    Args:
        options: what was typed.
        columns: the models.
        asked: the portions.
    """

    def __init__(self, options: argparse.Namespace, columns: Sequence[Model], asked: Sequence[Portion]) -> None:
        self.out, self.data, self.workers = Path(options.out).resolve(), Path(options.data).resolve(), options.workers
        self.more, self.columns, self.asked = options.setting, columns, asked
        self.failed: list[Path] = []
        self._lock = threading.Lock()

    def run(self) -> None:
        """Make them, `workers` at a time, one thread each; a failure stops no other."""
        self.write()
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(self._test, *zip(*[(m, p) for p in self.asked for m in self.columns], strict=True)))
        if self.failed:
            raise SystemExit(f"{len(self.failed)} tests failed, see {', '.join(f'{run}.log' for run in self.failed)}")

    def _test(self, model: Model, portion: Portion) -> None:
        run = run_of(self.out, model.name, portion)
        if all(answers(results_of(run, task), portion, model.checkpoint) for task in portion.tasks):
            return
        words = ["cli.py", "test", model.words()[0], "--config=configs/benchmark.yaml", *model.words()[1:]]
        words += [f"--data.init_args.{name}={yaml_word(value)}" for name, value in portion.settings().items()]
        words += [f"--data.init_args.root={self.data}", "--trainer.enable_progress_bar=false", *self.more]
        words += [f"--trainer.default_root_dir={run}"]
        print(" ".join(["radargate", *words[1:]]) + "\n", end="", flush=True)  # one write: lines of two do not mix
        try:
            python(words, log=run.with_name(f"{run.name}.log"), threads=1)
        except CalledProcessError:
            self.failed.append(run)
        self.write()

    def rescore(self) -> None:
        """Score the answers that are there by this version's rules, and write the table."""
        for model in self.columns:
            for portion in self.asked:
                run = run_of(self.out, model.name, portion)
                for benchmark in portion.benchmarks:
                    if rescore(run, benchmark):
                        print(f"{model.name} {benchmark.name}: scored anew")
        self.write()

    def write(self) -> None:
        """Write the table of what is there."""
        with self._lock:
            self.out.mkdir(parents=True, exist_ok=True)
            found = read_results(self.out, {model.name: model.checkpoint for model in self.columns}, self.asked)
            (self.out / "table.md").write_text(table(found, self.asked), encoding="utf-8")


def yaml_word(value: object) -> str:
    """A value as it is typed."""
    return "null" if value is None else f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def estimate(options: argparse.Namespace, columns: Sequence[Model], asked: Sequence[Portion]) -> str:
    """Tokens and time of every task, as Markdown."""
    config = columns[0].config
    shown = {f"fitting_{name}": config["data"]["init_args"][name] for name in ("prompt", "special_tokens")}
    work = {}
    for portion in asked:
        backbone = config["model"]["network"]["init_args"]["backbone"]
        work |= work_of(portion, tokenizer=backbone, root=options.data, **shown)
    speeds = {
        model.name: Speed(*(options.frozen_speed if model.name == FROZEN else options.speed)) for model in columns
    }
    return text_of(work, len(asked), speeds, options.workers)


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="folder of benchmarks/, flan_cot/ and niv2/")
    add(
        "--runs", default="runs/all_gates/flan_v2", help="folder of all_gates_cpu/run.py, where the runs are looked for"
    )
    add("--stretch", help="run folder of StretchGate")
    add("--radar", help="run folder of RadarGate")
    add("--union", help="run folder of the union LoRA")
    add("--out", default="runs/paper_benchmarks", help="folder for the tests and the table")
    add("--estimate", action="store_true", help="count tokens and guess the time; nothing is run")
    add("--rescore", action="store_true", help="score the answers in OUT by the rules of this version; nothing is run")
    add("--ranking_limit", type=int, help="examples of a ranking task at most; all without")
    add("--generation_limit", type=int, default=100, help="examples of a generation task at most")
    add("--max_new_tokens", type=int, help="longest answer in tokens where the task's own is longer; the table says so")
    add("--ranking_rows", type=int, default=16, help="rows a batch in ranking")
    add("--generation_rows", type=int, default=50, help="rows a batch in generation")
    add("--only", nargs="*", default=[], help="only portions whose name begins so: sst2, cot_, niv2_language, ...")
    add("--workers", type=int, default=2, help="tests at the same time, one thread each")
    add("--speed", type=float, nargs=4, default=SPEED, help="tokens a second; seconds a step, a row of it, a start")
    add("--frozen_speed", type=float, nargs=4, default=FROZEN_SPEED, help="the same of the backbone alone")
    add("--setting", action="append", default=[], help="one more word for every radargate test, e.g. --trainer.x=1")
    return parser.parse_args()


# One thread of a processor with AVX2 and no bfloat16 units, SmolLM2-135M in float32.
SPEED, FROZEN_SPEED = (330.0, 0.12, 0.0044, 15.0), (400.0, 0.07, 0.004, 15.0)


def main() -> None:
    """Tells the time, or makes the table."""
    options = arguments()
    limits = Limits(
        options.ranking_limit,
        options.generation_limit,
        options.max_new_tokens,
        options.ranking_rows,
        options.generation_rows,
    )
    columns, asked = models(options), portions(options.data, limits, options.only)
    if not asked:
        raise SystemExit(f"{options.data} holds no benchmark, see --help")
    if options.estimate:
        print(estimate(options, columns, asked))
        return
    tests = Tests(options, columns, asked)
    tests.rescore() if options.rescore else tests.run()
    print((tests.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
