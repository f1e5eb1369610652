"""Real processes, killed and signalled: what comes out is what comes out of a fit left alone.

`benchmarks/kill_and_resume.py` does fifty kills; here are a few.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from radargate_pl.preemption import EXIT_CODE

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kill_and_resume.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["kill_and_resume"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_in_a_save_and_in_a_validation_one_process(script: ModuleType, tmp_path: Path) -> None:
    script.write_input(tmp_path / "input")
    setting = script.Setting(tmp_path, processes=1, precision="bf16-mixed", steps=24)
    reference, run = tmp_path / "undisturbed", tmp_path / "killed"
    script.finish(setting, reference)
    hits = [script.kill(setting, run, moment, 0.0) for moment in ("in a save", "in a validation")]
    script.finish(setting, run, "--ckpt_path", "auto")
    assert any(hits), "no kill hit a running fit"
    assert script.differences(reference, run) == []


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_two_ranks_end_with_a_checkpoint_whoever_is_asked(
    number: int, to_all: bool, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    script.write_input(tmp_path / "input")
    setting = script.Setting(tmp_path, processes=2, precision="bf16-mixed", steps=20)
    reference, run = tmp_path / "undisturbed", tmp_path / "signalled"
    script.finish(setting, reference)
    process = script.start(setting, run)
    (other,) = wait_for(lambda: children(process.pid))
    wait_for(lambda: "step 2/" in run.with_suffix(".log").read_text())
    os.killpg(process.pid, number) if to_all else os.kill(other, number)
    assert process.wait(timeout=120) == EXIT_CODE, run.with_suffix(".log").read_text()[-3000:]
    wait_for(lambda: not Path(f"/proc/{other}").exists())
    said = f"{signal.Signals(number).name}: saving at the next step boundary"
    assert run.with_suffix(".log").read_text().count(said) == 1 + to_all
    assert json.loads((run / "summary.json").read_text())["status"] == "preempted"
    assert not list(run.rglob(".*"))
    script.finish(setting, run, "--ckpt_path", "auto")
    assert script.differences(reference, run) == []
    assert not list(temporary.rglob("*.tmp")) + list(temporary.rglob("*.ckpt*"))


def test_a_signal_to_the_whole_group_spares_the_loaders_workers(script: ModuleType, tmp_path: Path) -> None:
    script.write_input(tmp_path / "input")
    setting, run = script.Setting(tmp_path, processes=1, precision="32-true", steps=500), tmp_path / "run"
    process = script.start(setting, run, "--data.init_args.num_workers", "1")
    wait_for(lambda: "step 50/" in run.with_suffix(".log").read_text())
    family = children(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    log = run.with_suffix(".log")
    assert process.wait(timeout=120) == EXIT_CODE, log.read_text()[-3000:]
    assert log.read_text().count("SIGTERM: saving at the next step boundary") == 1
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in family))
    assert (run / "checkpoints" / "last.ckpt").is_file()


def wait_for(happened: object, seconds: float = 180) -> object:
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found
