"""Two processes started by torchrun are the same run as two that Lightning starts."""

import os
import subprocess
import sys
from pathlib import Path

from run_comparison import differences, leaves_of, metrics_of

ROOT = Path(__file__).parents[2]
STEPS = 6


def fit(folder, *launcher):
    words = ["fit", "--config", "configs/debug.yaml", "--config", "configs/trainer/ddp.yaml"]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", str(STEPS)]
    words += ["--model.network.init_args.dropout", "0.1", "--trainer.default_root_dir", str(folder)]
    done = subprocess.run(
        [sys.executable, *launcher, "cli.py", *words],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_torchrun_is_the_same_run(tmp_path):
    printed = fit(tmp_path / "torchrun", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in printed
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in fit(tmp_path / "lightning")
    assert leaves_of(tmp_path / "torchrun")["/global_step"] == STEPS
    assert len([row for row in metrics_of(tmp_path / "torchrun") if "train/loss" in row]) == STEPS
    assert differences(tmp_path / "torchrun", tmp_path / "lightning") == []
