"""Signals and the trigger file: a checkpoint at the next step boundary, exit code 85, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_checkpoint import last
from tiny_runs import adapters, fit, gated_lm, two_row_batches

from radargate_pl.callbacks import ExactResume, Preemption, RotationAngleMonitor, RunCheckpoint
from radargate_pl.preemption import EXIT_CODE, SIGNALS, TERMINAL, Preempted, SignalWatch, take_trigger
from radargate_pl.steps import StepRequests

ROOT = Path(__file__).parent.parent


class At(Callback):
    """Does something before a training batch, or in the first batch of the validation behind a step."""

    def __init__(self, act: Any, *, step: int, in_validation: bool = False) -> None:
        self.act, self.step, self.in_validation = act, step, in_validation
        self.validations: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.in_validation and trainer.global_step == self.step:
            self.step = -1  # once: with accumulation the step has several batches
            self.act()

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.validations.append(trainer.global_step)
        if self.in_validation and trainer.global_step == self.step and batch_idx == 0:
            self.act()


def send(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


def run(folder: Path, *callbacks: Callback, steps: int = 4, resume: Path | None = None, **options: Any) -> Any:
    lm = gated_lm(adapters(folder.parent / "experts"))
    everything = (*callbacks, RunCheckpoint(), ExactResume(), Preemption())
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, **options}
    return fit(lm, folder, *everything, steps=steps, resume=resume, module=two_row_batches(), **options)


@pytest.fixture
def handlers() -> Any:
    """Signals do afterwards what they did before."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before, got = [signal.getsignal(number) for number in numbers], []
    for number in numbers:
        signal.signal(number, lambda seen, _: got.append(seen))
    yield
    for number in numbers:
        os.kill(os.getpid(), number)
    assert got == list(numbers)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "step", "in_validation"),
    [
        *((number, *at) for number in SIGNALS for at in [(0, False), (2, False), (1, False), (2, True)]),
        *((number, 1, False) for number in TERMINAL),
        (signal.SIGINT, 2, True),
    ],
)
def test_a_signal_saves_at_the_next_boundary_and_ends_with_85(
    number: int, step: int, in_validation: bool, tmp_path: Path, handlers: None
) -> None:
    with pytest.raises(Preempted) as ended:
        run(tmp_path / "run", At(send(number), step=step, in_validation=in_validation))
    done = step if in_validation else step + 1
    assert (ended.value.code, ended.value.step) == (128 + number if number in TERMINAL else EXIT_CODE, done)
    assert last(tmp_path / "run")["global_step"] == done
    assert not list((tmp_path / "run").rglob(".*"))
    again, whole = At(lambda: None, step=-1), At(lambda: None, step=-1)
    run(tmp_path / "run", again, resume=tmp_path / "run" / "checkpoints" / "last.ckpt")
    run(tmp_path / "whole", whole)
    one, other = (last(tmp_path / name)["state_dict"] for name in ("run", "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert again.validations == [at for at in whole.validations if at >= done], "a validation was skipped or repeated"


def test_after_the_last_step_the_fit_ends_by_itself(tmp_path: Path, handlers: None) -> None:
    trainer = run(tmp_path / "run", At(send(signal.SIGTERM), step=3))
    assert trainer.global_step == 4
    assert last(tmp_path / "run")["global_step"] == 4


def test_in_the_middle_of_an_accumulation_the_step_is_completed_first(tmp_path: Path, handlers: None) -> None:
    with pytest.raises(Preempted) as ended:
        run(tmp_path / "run", At(send(signal.SIGUSR1), step=0), accumulate_grad_batches=2)
    assert ended.value.step == 1
    data = last(tmp_path / "run")["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert data["processed"] == 2


def test_the_trigger_file_saves_and_goes_on(tmp_path: Path) -> None:
    trigger, seen = tmp_path / "run" / "save_now", []

    class Look(At):
        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            seen.append((trainer.global_step, trigger.exists(), (tmp_path / "run/checkpoints/last.ckpt").exists()))
            super().on_train_batch_start(trainer, *arguments)

    (tmp_path / "run").mkdir()
    run(tmp_path / "run", Look(trigger.touch, step=0), val_check_interval=4)
    assert seen == [(0, False, False), (1, False, True), (2, False, True), (3, False, True)]


def test_without_a_trigger_nothing_is_removed(tmp_path: Path) -> None:
    assert not take_trigger(tmp_path)
    assert not take_trigger(tmp_path / "absent")


def test_without_checkpoints_it_ends_all_the_same_and_says_so(tmp_path: Path, handlers: None) -> None:
    lm = gated_lm(adapters(tmp_path / "experts"))
    with pytest.raises(Preempted, match="nothing was saved"):
        fit(lm, tmp_path / "run", At(send(signal.SIGTERM), step=0), Preemption(), enable_checkpointing=True)


def test_the_first_signal_only_asks(handlers: None, capfd: pytest.CaptureFixture[str]) -> None:
    requests = StepRequests()
    watch = SignalWatch(requests)
    watch.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (requests.stop, requests.save) == (True, False)
    assert "SIGUSR1: saving at the next step boundary, then exit code 85" in capfd.readouterr().err
    watch.remove()


def test_signals_that_are_ignored_stay_so(handlers: None) -> None:
    """Under nohup a closed terminal is none of the fit's business."""
    mine = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    watch = SignalWatch(StepRequests())
    watch.install()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == watch._handle
    watch.remove()
    signal.signal(signal.SIGHUP, mine)


def test_a_signal_into_a_closed_terminal(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(5, "Input/output error")

    watch = SignalWatch(StepRequests())
    watch.install()
    monkeypatch.setattr(os, "write", refuse)
    os.kill(os.getpid(), signal.SIGHUP)
    assert (watch.requests.stop, watch.exit_code) == (True, 129)
    watch.remove()


def test_nothing_is_called_saved_before_there_is_a_file(tmp_path: Path, handlers: None) -> None:
    """Lightning's own count says that step 0 is saved: a signal in the first validation waits for a step."""
    sanity = At(send(signal.SIGTERM), step=0, in_validation=True)
    with pytest.raises(Preempted, match="--ckpt_path auto") as ended:
        run(tmp_path / "run", sanity, num_sanity_val_steps=1)
    assert ended.value.step == 1
    assert last(tmp_path / "run")["global_step"] == 1


def test_the_second_signal_ends_at_once_and_takes_half_written_files_along(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from radargate_pl.atomic_files import save_atomically
from radargate_pl.preemption import SignalWatch
from radargate_pl.steps import StepRequests
path = Path({str(tmp_path / "file")!r})
path.write_text("old")
SignalWatch(StepRequests()).install()
def write(file):
    file.write(b"new")
    assert len(os.listdir(path.parent)) == 2
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
save_atomically(path, write)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert "SIGUSR1 again: ending at once" in done.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_rows_of_a_validation_that_is_repeated_are_written_once(tmp_path: Path) -> None:
    """The process dies between the end of a validation and its checkpoint."""

    class DiedError(RuntimeError):
        pass

    class DieAfterValidation(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            raise DiedError

    def go(folder: Path, *callbacks: Callback, resume: Path | None = None) -> list[str]:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(DiedError):
            run(folder, RotationAngleMonitor(), *callbacks, resume=resume)
        return (folder / "angles.csv").read_text().splitlines()

    whole = go(tmp_path / "whole")
    assert len(go(tmp_path / "run", DieAfterValidation())) > 1, "rows of the validation must be there already"
    assert go(tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "last.ckpt") == whole


def test_a_checkpoint_of_a_repeated_validation_holds_the_random_numbers_of_its_step(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        run(tmp_path / "run", At(send(signal.SIGTERM), step=2, in_validation=True))
    before = last(tmp_path / "run")["resume"]["random_states"][0]["torch"]
    torch.manual_seed(77)
    stop = At(lambda: (_ for _ in ()).throw(RuntimeError("the end")), step=2)
    with pytest.raises(RuntimeError, match="the end"):
        run(tmp_path / "run", stop, resume=tmp_path / "run" / "checkpoints" / "last.ckpt")
    after = last(tmp_path / "run")
    assert after["resume"]["is_validated"]
    assert torch.equal(after["resume"]["random_states"][0]["torch"], before)


def test_a_fit_that_goes_back_leaves_nothing_of_the_steps_it_takes_anew(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    lm = gated_lm(adapters(tmp_path / "experts"))
    options = {"module": two_row_batches(), "check_val_every_n_epoch": None}
    callbacks = lambda: (RunCheckpoint(every_n_steps=1, keep=-1), ExactResume())  # noqa: E731
    fit(lm, tmp_path / "run", *callbacks(), steps=4, val_check_interval=1, **options)
    second = checkpoints / "step=00000002.ckpt"  # which knows of a best value
    assert torch.load(checkpoints / "best.ckpt", weights_only=True)["global_step"] > 2

    def die() -> None:
        raise RuntimeError("the end")

    for at, steps in ((2, {1, 2, 3, 4}), (3, {1, 2, 3})):  # before the first save, and behind it
        end = At(die, step=at)
        with pytest.raises(RuntimeError, match="the end"):
            fit(lm, tmp_path / "run", end, *callbacks(), resume=second, val_check_interval=4, **options)
        assert {int(path.stem.partition("=")[2]) for path in checkpoints.glob("step=*.ckpt")} == steps
        assert (checkpoints / "best.ckpt").exists() == (at == 2)
