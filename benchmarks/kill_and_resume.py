"""Kills fits with SIGKILL at random moments, lets them go on, and compares what comes out with a fit left alone.

    python benchmarks/kill_and_resume.py --kills 50 --processes 1 --precision bf16-mixed --runs runs/kills

Each trial is a run folder of its own: a fit of a tiny backbone (dropout, two micro-batches a step, epochs that end in
the middle of the run) is killed, goes on with `--ckpt_path auto`, and must end with the bit-identical last checkpoint
(weights, moments, random numbers, data position, callbacks) and the same metrics.csv, gate and curves. Kills are timed
from the first finished step: at random, or as soon as a save or a validation is seen to be under way; half of the
trials are killed twice, in two validations, or in a validation and once more as soon as the fit that went on has
repeated it and written the checkpoint behind it. A run that had ended before its kill does not count. Last comes a
control that must differ: a checkpoint whose random numbers were replaced.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from radargate_pl.checkpoint_files import write_checkpoint  # noqa: E402
from radargate_pl.random_state import random_state  # noqa: E402

TASKS = ("add", "echo", "turn")
# What a trial is called, and the moments of its kills.
MOMENTS = {
    "at random": ("at random",),
    "in a save": ("in a save",),
    "in two validations": ("in a validation", "in a validation"),
    "after a repeated validation": ("in a validation", "in its repetition's save"),
}
TEXT_FILES = ("metrics.csv", "convergence.json", "angles.csv")


@dataclass
class Setting:
    """What every fit of one call has in common."""

    folder: Path
    processes: int
    precision: str
    steps: int

    def command(self, run: Path) -> list[str]:
        """The command line of one fit."""
        base = self.folder / "input"
        options: dict[str, Any] = {
            "trainer.default_root_dir": run,
            "trainer.max_steps": self.steps,
            "trainer.val_check_interval": 12,
            "trainer.accumulate_grad_batches": 2,
            "trainer.log_every_n_steps": 1,
            "trainer.devices": self.processes,
            "trainer.strategy": "gate_ddp" if self.processes > 1 else "auto",
            "trainer.precision": self.precision,
            "model.network.init_args.dropout": 0.2,
            "model.network.init_args.dtype": "bfloat16" if self.precision == "bf16-true" else "float32",
            "model.network.init_args.experts": base / "experts",
            "model.network.init_args.new_experts": "null",
            "data.init_args.tasks": base / "data",
            "data.init_args.validation_examples": 8,
            "data.init_args.batch_size": 4 // self.processes,
            "checkpoint.every_n_steps": 3,
            "seed_everything": 7,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(ROOT / "cli.py"), "fit", "--config", "configs/debug.yaml", *words]


def write_input(folder: Path) -> None:
    """Three random experts of `debug-tiny` and three task files."""
    for seed, task in enumerate(TASKS):
        expert = folder / "experts" / task
        expert.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(2):
            for name, width in (("q_proj", 64), ("v_proj", 32)):
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(2, 64, generator=generator) / 8
                tensors[f"{key}.lora_B.weight"] = torch.randn(width, 2, generator=generator)
        save_file(tensors, expert / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2}
        (expert / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}))
        (folder / "data").mkdir(exist_ok=True)
        rows = [json.dumps({"id": f"{task}-{i}", "source": f"{task} {i}", "target": str(i % 5)}) for i in range(31)]
        (folder / "data" / f"{task}.train.jsonl").write_text("\n".join(rows) + "\n")


def start(setting: Setting, run: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a fit in a process group of its own, its output in a file beside the run folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [*setting.command(run), *more]
    with run.with_suffix(".log").open("a") as log:
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)


def finish(setting: Setting, run: Path, *more: str) -> None:
    """Run a fit to its end."""
    code = start(setting, run, *more).wait()
    if code:
        raise RuntimeError(f"{run}: exit code {code}\n{run.with_suffix('.log').read_text()[-3000:]}")


def kill(setting: Setting, run: Path, moment: str, delay: float) -> bool:
    """Start or go on with a fit and kill it; tell whether it was still running."""
    log = run.with_suffix(".log")
    seen = len(log.read_text()) if log.exists() else 0
    before = _written(run)
    process = start(setting, run, "--ckpt_path", "auto")
    if moment == "in its repetition's save":
        _wait(process, lambda: _written(run) != before, every=0.001)
    else:
        _wait(process, lambda: "step " in log.read_text()[seen:])
        time.sleep(delay)
    if moment == "in a save":
        _wait(process, lambda: any((run / "checkpoints").glob(".*.tmp")), every=0.0)
    if moment == "in a validation":  # a checkpoint is written right before it
        newest = _steps(run)
        _wait(process, lambda: any(step % 6 == 0 for step in _steps(run) - newest), every=0.001)
    is_running = process.poll() is None
    if is_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return is_running


def _steps(run: Path) -> set[int]:
    return {int(path.stem.partition("=")[2]) for path in (run / "checkpoints").glob("step=*.ckpt")}


def _written(run: Path) -> set[tuple[str, int]]:
    """Names and file numbers of the checkpoints: a checkpoint that replaces another has a new one."""
    folder = run / "checkpoints"
    files = os.scandir(folder) if folder.is_dir() else ()
    return {(file.name, file.inode()) for file in files if file.name.startswith("step=")}


def _wait(process: subprocess.Popen[bytes], happened: Callable[[], bool], every: float = 0.02) -> None:
    while process.poll() is None and not happened():
        time.sleep(every)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the results of two run folders."""
    found = compare(_last(one), _last(other), "last.ckpt")
    for name in (*TEXT_FILES, "gate/gate.safetensors"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    left = [str(path.name) for path in other.rglob(".*") if path.is_file()]
    return found + [f"left behind: {name}" for name in left]


def compare(one: Any, other: Any, name: str) -> list[str]:
    """Names of the leaves that differ between two checkpoints; run folders' own paths are left out."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [name]
    if isinstance(one, dict):
        keys = [] if one.keys() == other.keys() else [f"{name}: keys"]
        return keys + [line for key in one if key in other for line in compare(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{name}: length"]
        return [line for i, pair in enumerate(zip(one, other, strict=True)) for line in compare(*pair, f"{name}[{i}]")]
    return [] if one == other or "_path" in name else [f"{name}: {one} and {other}"]


def _last(run: Path) -> dict[str, Any]:
    """All that decides how training goes on; Lightning's tallies of restarts are its own business."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["data"] = checkpoint.pop("loops")["fit_loop"]["state_dict"]["combined_loader"]
    return dict(checkpoint)


def control(setting: Setting, reference: Path) -> list[str]:
    """What differs when a fit goes on with other random numbers; nothing would mean that the comparison is blind."""
    run = setting.folder / "control"
    while not kill(setting, run, "at random", 0.3):
        pass
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.manual_seed(999)
    checkpoint["resume"]["random_states"] = [random_state()] * setting.processes
    write_checkpoint(path, checkpoint)
    finish(setting, run, "--ckpt_path", "auto")
    return differences(reference, run)


def trials(setting: Setting, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kill and compare until so many kills have hit a running fit."""
    reference = setting.folder / "undisturbed"
    finish(setting, reference)
    seconds = json.loads((reference / "summary.json").read_text())["seconds"]
    length = seconds["train"] + seconds["validate"]
    numbers, rows, hits = random.Random(seed), [], 0
    while hits < kills:
        run = setting.folder / f"trial_{len(rows):03d}"
        name = list(MOMENTS)[len(rows) % len(MOMENTS)]
        landed, at = 0, []
        for moment in MOMENTS[name]:
            landed += kill(setting, run, moment, numbers.uniform(0, 0.7 * length))
            at.append(max(_steps(run), default=0))
        orphans = [path.name for path in (run / "checkpoints").glob(".*.tmp")]
        finish(setting, run, "--ckpt_path", "auto")
        found = differences(reference, run)
        rows.append({"moment": name, "kills": landed, "resumed_at": at, "half_written": orphans, "differs": found})
        print(json.dumps(rows[-1]), flush=True)
        hits += landed
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The trials by the moment of the kill, as Markdown."""
    lines = [
        "| killed | trials | kills that hit | half-written files found | different results |",
        "|---|---:|---:|---:|---:|",
    ]
    for moment in MOMENTS:
        some = [row for row in rows if row["moment"] == moment]
        hits = sum(row["kills"] for row in some)
        halves, bad = sum(bool(row["half_written"]) for row in some), sum(bool(row["differs"]) for row in some)
        lines.append(f"| {moment} | {len(some)} | {hits} | {halves} | {bad} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all trials and the control; exit code 1 if anything differs that must not, or the control does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs/kills")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--precision", default="bf16-mixed", choices=["32-true", "bf16-mixed", "bf16-true"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(options.runs).resolve() / f"{options.processes}_{options.precision}"
    write_input(folder / "input")
    setting = Setting(folder, options.processes, options.precision, options.steps)
    rows = trials(setting, options.kills, options.seed)
    blind = not control(setting, folder / "undisturbed")
    (folder / "trials.json").write_text(json.dumps(rows, indent=1))
    (folder / "table.md").write_text(table(rows))
    print(table(rows), f"control differs: {not blind}", sep="\n")
    return int(blind or any(row["differs"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
