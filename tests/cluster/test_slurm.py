"""The sbatch file on a real Slurm: requeueing by exit code, arrays, scancel; a preempted fit ends bit-identical."""

import contextlib
import re
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_environments
import yaml
from one_node import CannotStartError, OneNode, missing_programs
from run_comparison import differences, leaves_of, metrics_of

from radargate_pl.preemption import EXIT_CODE

ROOT = Path(__file__).parents[2]
FILE = str(ROOT / "slurm/radargate.sbatch")
CLI = f"{sys.executable} {ROOT / 'cli.py'}"
STEPS = 120

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]


@pytest.fixture(scope="module")
def cluster():
    with contextlib.ExitStack() as stack:
        try:
            node = stack.enter_context(OneNode())
        except CannotStartError as error:
            pytest.skip(str(error))
        yield node


@pytest.fixture
def submit(cluster, tmp_path):
    """Submits the file for a machine without GPUs, with the log and the runs in a temporary folder."""

    def run(*words, options=(), command=CLI, **environment):
        options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/%a.log", *options]
        given = {"RADARGATE": command, "RUN": str(tmp_path), "PYTHONPATH": f"{Path(__file__).parent}", **environment}
        return cluster.submit(*options, FILE, *words, environment=given, cwd=ROOT)

    return run


# ---- with a program that does nothing but end with a code ------------------------------------------------------------

PROGRAM = f"""#!/usr/bin/env bash
folder={{folder}}/seed=$SLURM_ARRAY_TASK_ID
mkdir -p $folder
trap 'exit {EXIT_CODE}' USR1 TERM
echo "$SLURM_PROCID" >> $folder/starts
[ -n "${{{{SLURM_RESTART_COUNT:-}}}}" ] && exit 0
[ -n "${{{{CODE:-}}}}" ] && exit "$CODE"
for _ in $(seq 1500); do sleep 0.2; done
"""


@pytest.fixture
def program(tmp_path):
    """Waits for a signal at its first start, ends well at the second."""
    path = tmp_path / "program"
    path.write_text(PROGRAM.format(folder=tmp_path))
    path.chmod(stat.S_IRWXU)
    return str(path)


def wait_until(is_so, seconds=60.0):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.2)


def starts(folder, seed):
    path = folder / f"seed={seed}" / "starts"
    return path.read_text().split() if path.exists() else []


def test_only_the_preempted_seed_of_an_array_is_requeued(cluster, submit, program, tmp_path):
    """The last task's own id is that of the whole array: a requeue of SLURM_JOB_ID would start all of them again."""
    job = submit(options=["--array=0-1"], command=program)
    wait_until(lambda: all(starts(tmp_path, seed) for seed in (0, 1)))
    assert cluster.job(f"{job}_1")["JobId"] == job
    cluster.run("scancel", "--signal=USR1", f"{job}_1")
    fields = cluster.wait(f"{job}_1", "COMPLETED", "FAILED", "CANCELLED")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    other = cluster.job(f"{job}_0")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (["0"], ["0", "0"])
    log = (tmp_path / "1.log").read_text()  # appended to, not begun again
    assert "start 1, run folder" in log
    assert "start 2, run folder" in log
    cluster.run("scancel", job)
    cluster.wait(f"{job}_0", "CANCELLED")


def test_two_tasks_are_signalled_and_requeued_once(cluster, submit, program, tmp_path):
    job = submit(options=["--array=3", "--ntasks-per-node=2"], command=program)
    wait_until(lambda: len(starts(tmp_path, 3)) == 2)
    cluster.run("scancel", "--signal=USR1", f"{job}_3")
    fields = cluster.wait(f"{job}_3", "COMPLETED", "FAILED", "CANCELLED")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert sorted(starts(tmp_path, 3)) == ["0", "0", "1", "1"]


def test_what_is_cancelled_stays_so(cluster, submit, program, tmp_path):
    """Though scancel's SIGTERM makes the program end with the code that asks for a requeue."""
    job = submit(options=["--array=0"], command=program)
    wait_until(lambda: starts(tmp_path, 0))
    cluster.run("scancel", job)
    cluster.wait(f"{job}_0", "CANCELLED")
    time.sleep(8)
    fields = cluster.job(f"{job}_0")
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    assert len(starts(tmp_path, 0)) == 1


def test_other_codes_are_the_jobs(cluster, submit, program):
    job = submit(options=["--array=0"], command=program, CODE="7")
    fields = cluster.wait(f"{job}_0", "COMPLETED", "FAILED", "CANCELLED")
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "7:0", "0")


# ---- what processes find in their environment ------------------------------------------------------------------------

READ = re.compile(r"SLURM_(JOB_NAME|NTASKS|NTASKS_PER_NODE|NNODES|PROCID|LOCALID|STEP_ID)=")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("BATCH", "sbatch --wait --job-name=wrap {file}"),
        ("BATCH_TWO", "sbatch --wait --job-name=wrap --ntasks=2 --ntasks-per-node=2 {file}"),
        ("SRUN_TWO", "srun --job-name=wrap --ntasks=2 --ntasks-per-node=2 {program}"),
        ("SRUN_TWO_TOTAL", "srun --job-name=wrap --ntasks=2 {program}"),
        ("SALLOC", "salloc --ntasks=2 --ntasks-per-node=2 {program}"),
        ("SALLOC_NAMED", "salloc --job-name=mine --ntasks=2 --ntasks-per-node=2 {program}"),
        ("SALLOC_SRUN", "salloc --ntasks=2 --ntasks-per-node=2 srun {program}"),
        ("SALLOC_SRUN_NAMED", "salloc --ntasks=2 --ntasks-per-node=2 srun --job-name=train {program}"),
    ],
)
def test_the_environments_the_check_is_tested_with(cluster, tmp_path, name, command):
    """Each task writes its variables into a file of its own; the one of the same rank is compared."""
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nenv > "{tmp_path}/found.${{SLURM_PROCID:-none}}"\n')
    program.chmod(stat.S_IRWXU)
    words = command.format(program=program, file=f"--output=/dev/null {program}")
    subprocess.run(shlex.split(words), env=cluster.environment, check=True, capture_output=True, timeout=60)
    expected = getattr(slurm_environments, name)
    found = (tmp_path / f"found.{expected.get('SLURM_PROCID', 'none')}").read_text().splitlines()
    assert dict(line.split("=", 1) for line in found if READ.match(line)) == expected


def test_started_without_srun(cluster, tmp_path):
    """Lightning alone would wait for the second task for ever."""
    words = f"{CLI} fit --config configs/debug.yaml --trainer.devices 2 --trainer.default_root_dir {tmp_path / 'run'}"
    options = ["--ntasks=2", "--ntasks-per-node=2", f"--output={tmp_path}/log", f"--wrap={words}"]
    job = cluster.submit(*options, cwd=ROOT)
    fields = cluster.wait(job, "COMPLETED", "FAILED", seconds=240)
    assert fields["ExitCode"] == "1:0"
    assert "started without srun (SLURM_NTASKS=2" in (tmp_path / "log").read_text()


# ---- with radargate fit ----------------------------------------------------------------------------------------------


def fit_words(folder, seconds):
    """A fit of 120 steps with dropout; each step of the first start takes some time longer."""
    steps = folder / "steps"
    config = folder / "slow.yaml"
    callback = {"class_path": "slow_steps.SlowSteps", "init_args": {"seconds": seconds, "file": str(steps)}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    files = ["--config", "configs/debug.yaml", "--config", str(config)]
    trainer = {"accelerator": "cpu", "precision": "32-true", "max_steps": STEPS, "val_check_interval": 20}
    words = [word for key, value in trainer.items() for word in (f"--trainer.{key}", str(value))]
    return [*files, *words, "--model.network.init_args.dropout", "0.1"], steps


def finished(cluster, job, folder, seconds=600):
    fields = cluster.wait(f"{job}_1", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=seconds)
    assert fields["JobState"] == "COMPLETED", (folder / "1.log").read_text()[-6000:]
    return int(fields["Restarts"])


@pytest.fixture(scope="module")
def uninterrupted(cluster, tmp_path_factory):
    """Run folders of fits that nobody disturbs, by the number of tasks."""
    done = {}

    def run(tasks):
        if tasks not in done:
            folder = tmp_path_factory.mktemp(f"uninterrupted-{tasks}")
            words, _ = fit_words(folder, 0)
            options = ["--gpus-per-node=0", "--cpus-per-task=1", "--array=1", f"--ntasks-per-node={tasks}"]
            environment = {"RADARGATE": CLI, "RUN": str(folder), "PYTHONPATH": str(Path(__file__).parent)}
            job = cluster.submit(*options, f"--output={folder}/%a.log", FILE, *words, environment=environment, cwd=ROOT)
            assert finished(cluster, job, folder) == 0
            done[tasks] = folder / "seed=1"
        return done[tasks]

    return run


def steps_done(file):
    return int(file.read_text() or 0) if file.exists() else 0


def assert_preempted(folder, job):
    log = (folder / "1.log").read_text()
    assert "SIGUSR1: saving at the next step boundary" in log
    assert f"job {job}_1: saved, to be requeued" in log
    assert "Restored all states from the checkpoint" in log


@pytest.mark.parametrize("tasks", [1, 2])
def test_signalled_from_outside(cluster, submit, uninterrupted, tmp_path, tasks):
    words, file = fit_words(tmp_path, 0.2)
    job = submit(*words, options=["--array=1", f"--ntasks-per-node={tasks}"], OMP_NUM_THREADS="1")
    wait_until(lambda: steps_done(file) >= 7, seconds=300)
    cluster.run("scancel", "--signal=USR1", f"{job}_1")
    assert finished(cluster, job, tmp_path) == 1
    assert_preempted(tmp_path, job)
    assert differences(tmp_path / "seed=1", uninterrupted(tasks)) == []


def test_preempted_by_the_time_limit(cluster, submit, uninterrupted, tmp_path):
    """Slurm itself signals, a minute to a minute and a half before four minutes are over."""
    words, _ = fit_words(tmp_path, 1.6)
    options = ["--array=1", "--ntasks-per-node=2", "--time=4", "--signal=USR1@60"]
    job = submit(*words, options=options, OMP_NUM_THREADS="1")
    assert finished(cluster, job, tmp_path) == 1
    assert_preempted(tmp_path, job)
    assert differences(tmp_path / "seed=1", uninterrupted(2)) == []


def test_the_comparison_sees_a_difference(uninterrupted):
    """Runs of one and of two tasks see other batches."""
    one, two = uninterrupted(1), uninterrupted(2)
    assert any(path.startswith("/optimizer_states") for path in leaves_of(one))
    assert len([row for row in metrics_of(one) if "train/loss" in row]) == STEPS
    found = differences(one, two)
    assert any("/state_dict/" in line for line in found)
    assert any("/optimizer_states/" in line for line in found)
    assert any("train/loss" in line for line in found)
