"""What version 86d3c2d wrote still resumes, tests, predicts and loads (how it was made: old_runs/README.md)."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from radargate_pl.cli import main
from radargate_pl.networks import GatedNetwork

OLD = Path(__file__).parent / "old_runs" / "commit_86d3c2d"
ROUNDING = 2e-5  # the files were written on one processor, and another one's float32 sums differ in their last digits


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of somebody who used that version: data, cache, experts and a gate's run of four steps."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    (tmp_path / "folders").rename(tmp_path / "runs")
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(file: Path, column: str = "train/loss") -> dict[int, float]:
    with file.open(newline="") as rows:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(rows) if row.get(column)}


def run(*words: str) -> None:
    assert main([*words]) == 0


def test_a_run_goes_on_where_it_stopped(home: Path) -> None:
    """Its data order, moments, rate and cached tokens: later losses and weights are those of that version."""
    tokens = {file.name: file.read_bytes() for file in (home / "cache/tokens").iterdir()}
    run("fit", "--config", "gate.yaml", "--ckpt_path", "auto")
    found, expected = losses(home / "runs/gate/metrics.csv"), losses(home / "expected/metrics.csv")
    assert list(found) == list(expected) == list(range(8))
    assert found == pytest.approx(expected, rel=ROUNDING)
    validated = losses(home / "runs/gate/metrics.csv", "val/loss")
    assert validated == pytest.approx(losses(home / "expected/metrics.csv", "val/loss"), rel=ROUNDING)
    weights, old = load_file(home / "runs/gate/gate/gate.safetensors"), load_file(home / "expected/gate.safetensors")
    assert weights.keys() == old.keys()
    for name, weight in weights.items():
        # Adam's steps are of the size of the rate whatever the gradient is: 1e-2 times a few signs near zero.
        torch.testing.assert_close(weight, old[name], rtol=1e-3, atol=1e-3)
    assert {file.name: file.read_bytes() for file in (home / "cache/tokens").iterdir()} == tokens, "tokens of old keys"


def test_a_checkpoint_is_tested_and_asked_as_before(home: Path) -> None:
    for command in ("test", "predict"):
        words = ("--config", "runs/gate/config.yaml", "--ckpt_path", "runs/gate")
        run(command, *words, "--trainer.default_root_dir", f"runs/{command}")
    for task in ("add", "cut"):
        found = json.loads((home / f"runs/test/test/{task}/results.json").read_text())
        expected = json.loads((home / f"expected/test/{task}/results.json").read_text())
        assert found["loss"] == pytest.approx(expected["loss"], rel=ROUNDING)
        assert (found["exact_match"], found["n"]) == (expected["exact_match"], expected["n"])
        rows, old = (
            [json.loads(line) for line in (root / f"predict/{task}/predictions.jsonl").read_text().splitlines()]
            for root in (home / "runs/predict", home / "expected")
        )
        assert [row["id"] for row in rows] == [row["id"] for row in old]
        assert [row["references"] for row in rows] == [row["references"] for row in old]


def test_a_gate_folder_loads_with_its_weights(home: Path) -> None:
    network = GatedNetwork.from_pretrained("runs/gate/gate", experts="runs/experts/experts", backbone="debug-tiny")
    saved = load_file(home / "runs/gate/gate/gate.safetensors")
    held = dict(network.named_parameters())
    matched = [name for name in saved if any(path.endswith(name) for path in held)]
    assert matched == list(saved)
    for name in saved:
        (path,) = [path for path in held if path.endswith(name)]
        assert torch.equal(held[path], saved[name])
