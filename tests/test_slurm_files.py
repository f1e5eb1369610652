"""The sbatch file: what sbatch reads from it, and what it does with exit codes, run with a false srun and scontrol."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from radargate_pl.preemption import EXIT_CODE

ROOT = Path(__file__).parent.parent
FILE = ROOT / "slurm/radargate.sbatch"
ARRAY = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.fixture
def job(tmp_path):
    """Runs the file as Slurm would; srun ends with a code and notes its words and environment, scontrol its words."""
    commands = tmp_path / "commands"
    commands.mkdir()

    def run(*words, code=0, requeues=True, **environment):
        programs = {
            "srun": f'printf "%s\\n" "$@" > {tmp_path}/srun; env > {tmp_path}/environment; exit {code}',
            "scontrol": f'echo "$@" >> {tmp_path}/scontrol; exit {int(not requeues)}',
        }
        for name, text in programs.items():
            (commands / name).write_text(f"#!/bin/sh\n{text}\n")
            (commands / name).chmod(stat.S_IRWXU)
        slurm = {"SLURM_JOB_ID": "40", "SLURM_JOB_NAME": "radargate", "SLURM_JOB_NODELIST": "node[1-2]"}
        slurm |= {"SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
        return subprocess.run(
            [shutil.which("bash"), FILE, *words],
            env={"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", **slurm, **environment},
            capture_output=True,
            text=True,
        )

    return run


def options():
    """Name and value of each #SBATCH line."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", FILE.read_text(), flags=re.MULTILINE)
    assert len(lines) == FILE.read_text().count("#SBATCH")
    return dict(lines)


def test_options():
    found = options()
    assert found["array"] == "0-2"
    assert found["signal"] == "USR1@120"  # to the tasks: with B: only the script would get it
    assert {"requeue": "", "open-mode": "append"}.items() <= found.items()
    assert found["ntasks-per-node"] == found["gpus-per-node"]
    assert "%A_%a" in found["output"]
    assert "/" not in found["output"]
    assert found["job-name"] not in ("bash", "interactive")
    assert not {"ntasks", "gpus-per-task", "account", "partition"} & set(found)


def test_options_stand_before_the_first_command():
    """sbatch reads no further."""
    lines = FILE.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


def test_what_srun_is_told(job, tmp_path):
    done = job("--config", "configs/flan/radargate.yaml", "--model.optimizer.lr", "1e-3", **ARRAY)
    assert done.returncode == 0
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[:3] == ["--wait=300", "radargate", "fit"]
    assert words[3:7] == ["--config", "configs/flan/radargate.yaml", "--model.optimizer.lr", "1e-3"]
    assert words[7:9] == ["--config", "configs/trainer/slurm.yaml"]
    pairs = dict(zip(words[9::2], words[10::2], strict=True))
    assert pairs == {
        "--trainer.devices": "4",
        "--trainer.num_nodes": "2",
        "--seed_everything": "2",
        "--trainer.default_root_dir": "runs/radargate/seed=2",
        "--ckpt_path": "auto",
    }
    environment = (tmp_path / "environment").read_text()
    assert "SRUN_CPUS_PER_TASK=8\n" in environment
    assert "OMP_NUM_THREADS=8\n" in environment


def test_another_command_and_folder(job, tmp_path):
    done = job("--config", "a b.yaml", RADARGATE="apptainer exec --nv i.sif radargate", RUN="/data/my run", **ARRAY)
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[1:9] == ["apptainer", "exec", "--nv", "i.sif", "radargate", "fit", "--config", "a b.yaml"]
    assert words[words.index("--trainer.default_root_dir") + 1] == "/data/my run/seed=2"
    assert "job 40_2 on node[1-2], start 1, run folder /data/my run/seed=2" in done.stdout


@pytest.mark.parametrize(("array", "job_id"), [(ARRAY, "40_2"), ({}, "40")])
def test_preempted_is_requeued(job, tmp_path, array, job_id):
    assert job(code=85, **array).returncode == 85
    assert (tmp_path / "scontrol").read_text().splitlines() == [f"requeue {job_id}"]


@pytest.mark.parametrize("code", [0, 1, 2, 84, 137, 138, 143])
def test_other_codes_are_passed_on(job, tmp_path, code):
    assert job(code=code, **ARRAY).returncode == code
    assert not (tmp_path / "scontrol").exists()


def test_where_slurm_does_not_requeue(job):
    done = job(code=85, requeues=False, **ARRAY)
    assert done.returncode == 85
    assert "submit it again, it goes on from runs/radargate/seed=2" in done.stderr


def test_without_an_array(job, tmp_path):
    assert job(SLURM_RESTART_COUNT="3").stdout.startswith("job 40 on node[1-2], start 4, ")
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[words.index("--seed_everything") + 1] == "0"


def test_the_exit_code_of_the_file_is_the_one_of_preemption():
    code = int(re.search(r"^preempted=(\d+)", FILE.read_text(), flags=re.MULTILINE)[1])
    assert code == EXIT_CODE


def test_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed; it comes with the extra 'dev'")
    done = subprocess.run([program, FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
