"""Checkpoint files: whole or skipped by name, with their digest, and nothing left behind."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch

from radargate_pl import checkpoint_files
from radargate_pl.checkpoint_files import (
    damage,
    digest_file,
    first_whole,
    remove_checkpoint,
    remove_leftovers,
    second_name,
    write_checkpoint,
)
from radargate_pl.run_folder import resolve_checkpoint


def content(value: float) -> dict:
    return {"state_dict": {"w": torch.full((64, 64), value)}, "global_step": int(value)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2, the latter called last too."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        write_checkpoint(folder / f"step={step:08d}.ckpt", content(step))
    second_name(folder / "step=00000002.ckpt", folder / "last.ckpt")
    return tmp_path


def value_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def own_copy(path: Path) -> None:
    """The file by itself: `last.ckpt` and the newest step are one file under two names."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def test_the_digest_is_what_sha256sum_checks(run: Path) -> None:
    done = subprocess.run(
        "sha256sum -c *.sha256", shell=True, cwd=run / "checkpoints", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.count(": OK")) == (0, 3)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, empty])
def test_a_damaged_file_is_skipped_by_name_and_the_one_before_taken(run: Path, harm: object) -> None:
    last, newest, older = (run / "checkpoints" / f"{n}.ckpt" for n in ("last", "step=00000002", "step=00000001"))
    own_copy(last)
    harm(last)
    with pytest.warns(UserWarning, match=r"Damaged checkpoint skipped: .*last\.ckpt: (its SHA-256|it is empty)"):
        assert resolve_checkpoint("auto", run, "fit") == newest
    harm(newest)
    with pytest.warns(UserWarning, match="Damaged checkpoint skipped") as told:
        assert resolve_checkpoint("auto", run, "fit") == older
    assert ["last.ckpt" in str(told[0].message), "step=00000002" in str(told[1].message)] == [True, True]
    with pytest.raises(ValueError, match=r"last\.ckpt: the file is damaged: .*There are: .*step=00000001"):
        resolve_checkpoint(str(last), run, "fit")
    harm(older)
    no_other = pytest.raises(ValueError, match="--ckpt_path auto: no checkpoint for it")
    with pytest.warns(UserWarning, match="Damaged"), no_other:
        resolve_checkpoint("auto", run, "fit")


@pytest.mark.parametrize("harm", [truncate, empty])
def test_without_a_digest_a_file_must_open(run: Path, harm: object) -> None:
    path = run / "checkpoints" / "step=00000001.ckpt"
    digest_file(path).unlink()
    assert damage(path) is None
    harm(path)
    assert damage(path) is not None


@pytest.mark.parametrize("moment", range(5))
def test_a_process_that_ends_in_the_middle_of_a_save_leaves_a_whole_file(
    run: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`last.ckpt` of step 2 is replaced by step 3; the process dies before the n-th change of the folder."""
    folder, changes = run / "checkpoints", 0
    write_checkpoint(folder / "step=00000003.ckpt", content(3))

    class Killed(BaseException):
        pass

    def mortal(change: object) -> object:
        def act(*arguments: object) -> object:
            nonlocal changes
            if changes == moment:
                raise Killed
            changes += 1
            return change(*arguments)

        return act

    monkeypatch.setattr(os, "replace", mortal(os.replace))
    monkeypatch.setattr(os, "link", mortal(os.link))
    died = False
    try:
        second_name(folder / "step=00000003.ckpt", folder / "last.ckpt")
    except Killed:
        died = True
    assert died is (moment < 4), "the loop over moments must cover every change"
    path, problems = first_whole([folder / "last.ckpt"])
    assert path is not None, problems
    assert value_of(path) in (2, 3)


def test_removing_takes_the_digest_along_and_leftovers_go(run: Path) -> None:
    folder = run / "checkpoints"
    remove_checkpoint(folder / "step=00000001.ckpt")
    (folder / ".step=00000009.ckpt.77.tmp").write_bytes(b"half")
    (folder / "step=00000009.ckpt.sha256").write_text("half")
    remove_leftovers(folder)
    names = ["last.ckpt", "last.ckpt.sha256", "step=00000002.ckpt", "step=00000002.ckpt.sha256"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_full_disk_leaves_the_older_file_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = run / "checkpoints" / "step=00000002.ckpt"
    monkeypatch.setattr(checkpoint_files.torch, "save", full)
    with pytest.raises(OSError, match="whole and unchanged"):
        write_checkpoint(path, content(5))
    assert damage(path) is None
    assert value_of(path) == 2
    assert not list(path.parent.glob(".*"))


def test_a_limit_on_file_sizes_is_said_wherever_it_cuts(tmp_path):
    """Torch may answer with its own "unexpected pos" where the disk refused."""
    tensors = {"a": torch.zeros(3000), "b": {str(i): torch.zeros(30) for i in range(9)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(100, 16000, 499):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match=r"File too large.*Raise the limit on file sizes \(ulimit -f\)"):
                write_checkpoint(tmp_path / "step.ckpt", tensors)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*.tmp"))
