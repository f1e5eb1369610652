"""Two commands on one run folder: the second is refused by name, and a dead one is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from radargate_pl import run_lock
from radargate_pl.cli import main
from radargate_pl.run_lock import LOCK_FILE, RunLock, forget_locks

HOLDER = """
import sys, time
from pathlib import Path
from radargate_pl.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), "fit")
print("held", flush=True)
time.sleep(60)
"""
DEBUG = ["--config", "configs/debug.yaml", "--trainer.default_root_dir"]


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_two_processes_on_one_run_folder(holder, tmp_path, capsys):
    run = tmp_path / "run"
    for words in (
        ["fit"],
        ["fit", "--overwrite", "true"],
        ["fit", "--ckpt_path", "auto"],
        *(["validate"], ["test"], ["predict"]),
    ):
        command, *rest = words
        assert main([command, *DEBUG, str(run), *rest]) == 1
        said = capsys.readouterr().err
        assert (
            f"The run folder {run} (trainer.default_root_dir) is in use: `radargate fit` (process {holder.pid} on"
            in said
        )
        assert f"--trainer.default_root_dir {run}-2" in said
    assert [path.name for path in run.iterdir()] == [LOCK_FILE]
    assert main(["fit", *DEBUG, str(run), "--preview", "true"]) == 0, "who only reads is not blocked"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / LOCK_FILE).exists(), "a killed process leaves the file"
    RunLock(run, "test").release()
    assert not (run / LOCK_FILE).exists()


def test_a_folder_made_for_the_lock_alone_goes_with_it(tmp_path):
    lock = RunLock(tmp_path / "a/b", "fit")
    assert json.loads((tmp_path / "a/b" / LOCK_FILE).read_text())["pid"] == os.getpid()
    with pytest.raises(ValueError, match=f"is in use: `radargate fit` .process {os.getpid()} on"):
        RunLock(tmp_path / "a/b", "test")
    lock.release()
    assert not list(tmp_path.iterdir())
    lock.release()  # twice is once


def test_a_lock_that_ends_while_another_process_asks(tmp_path, monkeypatch):
    """The file that was opened is no longer the one at that path: only the new one counts."""
    first, calls = RunLock(tmp_path, "fit"), []
    real = fcntl.flock

    def flock(descriptor: int, kind: int) -> None:
        calls.append(kind)
        if len(calls) == 1:
            first.release()
        real(descriptor, kind)

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    second = RunLock(tmp_path, "fit")
    with pytest.raises(ValueError, match="is in use"):
        RunLock(tmp_path, "fit")
    second.release()


@pytest.mark.parametrize("forgets", [True, False])
def test_a_forked_child_keeps_the_lock_unless_it_writes_nothing(tmp_path, forgets):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        lock = RunLock(tmp_path, "fit")
        worker = os.fork()
        if worker == 0:  # outlives its parent
            if forgets:
                forget_locks()
            os.read(read, 1)
            os._exit(0)
        assert lock
        os._exit(0)
    os.waitpid(child, 0)
    try:
        if forgets:
            for _ in range(200):
                try:
                    RunLock(tmp_path, "fit").release()
                    break
                except ValueError:
                    time.sleep(0.01)
            else:
                pytest.fail("the worker holds the lock")
        else:
            with pytest.raises(ValueError, match=f"process {child} on"):
                RunLock(tmp_path, "fit")
    finally:
        os.close(write)
        os.close(read)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    lock = RunLock(tmp_path / "run", "fit")
    assert f"The file system of the run folder {tmp_path / 'run'} knows no locks" in caplog.text
    lock.release()


def test_what_cannot_be_written_to_is_found_before_the_fit(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    real = tempfile.TemporaryFile

    def refuse(dir: Path):
        if dir.name == "checkpoints":
            raise OSError(errno.EROFS, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr(run_lock.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=rf"but {tmp_path}/checkpoints does not: Read-only file system"):
        RunLock(tmp_path, "fit")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"], "the lock is given back"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"to take files, but .*/file/run does not: Not a directory"):
        RunLock(tmp_path / "file/run", "fit")
