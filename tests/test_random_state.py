"""Random numbers: every source goes on where it was, through a file that holds data only."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch

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
