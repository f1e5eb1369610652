"""A checkpoint written before the restored random numbers are put back holds those, not the present ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import adapters, fit, gated_lm

from radargate_pl.callbacks import ExactResume, RunCheckpoint
from radargate_pl.checkpoint import load_checkpoint


class Draws(Callback):
    """Takes random numbers, other ones while evaluating; ends the fit where it is told to."""

    def __init__(self, ends: str) -> None:
        self.ends = ends

    def on_train_batch_end(self, *_: Any) -> None:
        torch.rand(3)

    def on_validation_batch_start(self, *_: Any) -> None:
        if self.ends == "validation":
            raise ValueError("killed in the validation")
        torch.rand(5)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.ends == "training":
            raise ValueError("killed in the next step")


def test_the_validation_a_resumed_fit_begins_with_saves_the_numbers_of_the_checkpoint(tmp_path: Path) -> None:
    library, path = adapters(tmp_path / "experts"), tmp_path / "run/checkpoints/step=00000002.ckpt"
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}

    def until(ends: str, resume: Path | None = None) -> Any:
        callbacks = [RunCheckpoint(every_n_steps=1, keep=-1), ExactResume(), Draws(ends)]
        with pytest.raises(ValueError, match="killed"):
            fit(gated_lm(library), tmp_path / "run", *callbacks, resume=resume, **options)
        return load_checkpoint(str(path))["resume"]

    killed, resumed = until("validation"), until("training", path)
    assert (killed["is_validated"], resumed["is_validated"]) == (False, True)
    states = [section["random_states"][0]["torch"] for section in (killed, resumed)]
    torch.manual_seed(0)
    assert not torch.equal(states[0], torch.get_rng_state()), "the fit has drawn numbers"
    assert torch.equal(*states)
