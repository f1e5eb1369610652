"""Checkpoints with a right checksum and another content: one sentence before anything is built, and no code is run."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from radargate_pl.checkpoint_content import check_content
from radargate_pl.checkpoint_files import damage, digest_file, write_checkpoint
from radargate_pl.cli import main
from radargate_pl.fingerprints import sha256_of_file

OLD = Path(__file__).parent / "old_runs" / "commit_86d3c2d"
STORED = OLD / "folders" / "gate" / "checkpoints" / "step=00000004.ckpt"


@pytest.fixture
def stored() -> dict[str, Any]:
    return torch.load(STORED, map_location="cpu", weights_only=True)


def test_what_a_fit_wrote_is_taken_by_every_command() -> None:
    for command in ("fit", "validate", "test", "predict"):
        check_content(STORED, command)


def section(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["radargate"].update(fields)


def first(content: dict[str, Any], value: Any) -> None:
    name = next(iter(content["state_dict"]))
    weight = content["state_dict"][name]
    content["state_dict"][name] = value if value is None else torch.full_like(weight, value)


ANYWHERE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no section": (lambda c: c.pop("radargate"), "no section 'radargate', only"),
    "a section that is a list": (lambda c: c.update(radargate=[1]), "section 'radargate' is damaged"),
    "a section of None": (lambda c: c.update(radargate=None), "section 'radargate' is damaged"),
    "a version in words": (section(format_version="one"), "section 'radargate' is damaged"),
    "a version True": (section(format_version=True), "section 'radargate' is damaged"),
    "a version of 0": (section(format_version=0), "section 'radargate' is damaged"),
    "a version of 1.0": (section(format_version=1.0), "section 'radargate' is damaged"),
    "a newer version": (section(format_version=99), "format_version 99 and was written by a newer radargate"),
    "no fingerprints": (section(fingerprints=None), "fingerprints are damaged"),
    "fingerprints of experts in a list": (
        section(fingerprints={"backbone": "a", "experts": []}),
        "fingerprints are damaged",
    ),
    "a backbone's fingerprint that is a number": (
        section(fingerprints={"backbone": 5, "experts": {}}),
        "fingerprints are damaged",
    ),
    "an expert's fingerprint that is a list": (
        section(fingerprints={"backbone": "a", "experts": {"law": []}}),
        "fingerprints are damaged",
    ),
    "a gate that is a number": (section(gate=5), "gate is not named"),
    "a combination that is a number": (section(combine=5), "combine is 5"),
    "an identity that is no JSON": (section(identity="{"), "identity is damaged"),
    "an identity of another type": (section(identity=[1]), "identity is damaged"),
    "weights in a list": (lambda c: c.update(state_dict=[1]), "weights (state_dict) are no tensors"),
    "a weight that is None": (lambda c: first(c, None), "weights (state_dict) are no tensors"),
    "loops in a list": (lambda c: c.update(loops=[]), "loops are damaged"),
    "loops that are numbers": (lambda c: c.update(loops={"fit_loop": 5}), "loops are damaged"),
    "a weight without a name": (lambda c: c["state_dict"].update({5: torch.ones(1)}), "(state_dict) are no tensors"),
    "NaN in a weight": (lambda c: first(c, float("nan")), "has NaN or infinity"),
    "infinity in a weight": (lambda c: first(c, float("inf")), "has NaN or infinity"),
    "a sparse weight": (lambda c: c["state_dict"].update(w=torch.eye(2).to_sparse()), "(state_dict) are no tensors"),
    "whole numbers": (lambda c: c["state_dict"].update(w=torch.ones(2, dtype=torch.int64)), "w is torch.int64"),
}


@pytest.mark.parametrize("name", ANYWHERE)
def test_another_content_is_named(tmp_path: Path, stored: dict[str, Any], name: str) -> None:
    edit, told = ANYWHERE[name]
    edit(stored)
    write_checkpoint(tmp_path / "odd.ckpt", stored)
    assert damage(tmp_path / "odd.ckpt") is None
    with pytest.raises(ValueError) as caught:  # noqa: PT011  what it says is looked at below
        check_content(tmp_path / "odd.ckpt", "validate")
    assert told in str(caught.value)
    assert str(tmp_path / "odd.ckpt") in str(caught.value)
    assert len(str(caught.value)) < 500


RESUMING: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no loops": (lambda c: c.pop("loops"), "no loops"),
    "loops of something else": (lambda c: c.update(loops={"test_loop": {}}), "no loops"),
    "no optimiser": (lambda c: c.pop("optimizer_states"), "no optimizer_states"),
    "an optimiser that is a word": (lambda c: c.update(optimizer_states=["adam"]), "no optimizer_states"),
    "no schedule": (lambda c: c.pop("lr_schedulers"), "no lr_schedulers"),
    "a step of -5": (lambda c: c.update(global_step=-5), "global_step is -5"),
    "a step of True": (lambda c: c.update(global_step=True), "global_step is True"),
    "a step of 2.5": (lambda c: c.update(global_step=2.5), "global_step is 2.5"),
    "no epoch": (lambda c: c.pop("epoch"), "epoch is None"),
}


@pytest.mark.parametrize("name", RESUMING)
def test_what_only_a_resumed_fit_needs_is_asked_for_there(tmp_path: Path, stored: dict[str, Any], name: str) -> None:
    edit, told = RESUMING[name]
    edit(stored)
    write_checkpoint(tmp_path / "odd.ckpt", stored)
    check_content(tmp_path / "odd.ckpt", "test")
    with pytest.raises(ValueError, match=told):
        check_content(tmp_path / "odd.ckpt", "fit")


@pytest.mark.parametrize("content", [[1], "text", torch.ones(3), None, {}, {5: 6}], ids=str)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"odd\.ckpt to be a checkpoint written by radargate, but it (holds|has)"):
        check_content(tmp_path / "odd.ckpt", "fit")


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def bomb_of_torch(path: Path) -> None:
    torch.save({"state_dict": {}, "radargate": Bomb()}, path)


@pytest.mark.parametrize(
    "write",
    [
        bomb_of_torch,
        raw(pickle.dumps(Bomb())),
        raw(b"PK\x05\x06" + bytes(18)),  # a zip file without a member
        raw(b"\x80"),
        raw(b"\x80\x02]q\x01."),
        raw(b"."),
        raw(b"(."),
        raw(b"ordinary text"),
    ],
    ids=["bomb", "bare bomb", "empty zip", "cut pickle", "list", "empty pickle", "open mark", "text"],
)
def test_what_is_no_data_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"odd\.ckpt to be a checkpoint written by radargate") as caught:
        check_content(tmp_path / "odd.ckpt", "fit")
    assert not (tmp_path / "exploded").exists()
    assert len(str(caught.value)) < 600


def test_the_command_line_says_it_before_anything_is_built(
    tmp_path: Path, stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(OLD, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    stored["radargate"]["format_version"] = "one"
    write_checkpoint(Path("odd.ckpt"), stored)
    torch.save({"radargate": Bomb()}, "bomb.ckpt")
    digest_file(Path("bomb.ckpt")).write_text(f"{sha256_of_file(Path('bomb.ckpt'))}  bomb.ckpt\n")
    for name, told in (("odd.ckpt", "section 'radargate' is damaged"), ("bomb.ckpt", "cannot be read as data")):
        assert main(["validate", "--config", "gate.yaml", "--ckpt_path", name]) != 0
        said = capsys.readouterr().err
        assert told in said
        assert "Traceback" not in said
    assert not Path("exploded").exists()
    assert not Path("runs").exists()
