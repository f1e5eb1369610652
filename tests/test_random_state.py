"""Random numbers: every source goes on where it was, through a file that holds data only."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import adapters, fit, gated_lm

from radargate_pl.callbacks import ExactResume, RunCheckpoint
from radargate_pl.checkpoint import load_checkpoint
from radargate_pl.random_state import random_state, seed_rank, set_random_state


def draw() -> tuple:
    return (
        random.random(),
        random.gauss(),
        float(numpy.random.rand()),
        float(numpy.random.randn()),
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
    )


@pytest.fixture(autouse=True)
def leave_the_state_alone():
    before = random_state()
    yield
    set_random_state(before)


def test_every_source_goes_on_through_a_file(tmp_path: Path) -> None:
    draw()  # Gaussian generators hold a second number back
    torch.save(random_state(), tmp_path / "state")
    expected = [draw(), draw()]
    draw()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("left_out", ["python", "numpy", "torch"])
def test_each_source_is_needed(left_out: str) -> None:
    state, expected = random_state(), draw()
    other = {**random_state(), left_out: random_state()[left_out]}
    set_random_state({**state, left_out: other[left_out]})
    assert draw() != expected


def test_ranks_differ_and_are_reproducible() -> None:
    found = []
    for seed, rank, step in ((1, 0, 0), (1, 1, 0), (1, 1, 5), (2, 0, 0), (1, 0, 0)):
        seed_rank(seed, rank, step)
        found.append(draw())
    assert found[0] == found[4]
    assert len({str(numbers) for numbers in found}) == 4


class DrawBeforeValidation(Callback):
    """Uses random numbers when a validation starts, as a sampling callback may; or ends the fit there."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends

    def on_validation_start(self, trainer, pl_module) -> None:
        torch.rand(7)
        if self.ends:
            raise RuntimeError("killed")

    def on_validation_end(self, trainer, pl_module) -> None:
        trainer.should_stop = True


def test_a_checkpoint_behind_the_first_validation_of_a_resumed_fit_keeps_the_numbers_to_go_on_with(tmp_path) -> None:
    """They are put back at the first training batch only: what is there before is no number of this run."""
    experts, path = adapters(tmp_path / "experts"), tmp_path / "checkpoints" / "last.ckpt"
    options = {"steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None}
    with pytest.raises(RuntimeError, match="killed"):
        fit(gated_lm(experts), tmp_path, RunCheckpoint(), ExactResume(), DrawBeforeValidation(True), **options)
    before = load_checkpoint(str(path))["resume"]
    resume = (RunCheckpoint(), ExactResume(), DrawBeforeValidation(False))
    fit(gated_lm(experts), tmp_path, *resume, resume=path, **options)
    after = load_checkpoint(str(path))
    assert after["global_step"] == 2
    assert (before["is_validated"], after["resume"]["is_validated"]) == (False, True)
    assert torch.equal(after["resume"]["random_states"][0]["torch"], before["random_states"][0]["torch"])
    assert str(after["resume"]["random_states"]) == str(before["random_states"])
