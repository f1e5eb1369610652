"""Two processes over gloo against one: gradients, weights, divided experts, scores, and what is compared at the start.

All fits of the two processes run in one pair of them, since starting a process costs more than a fit.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks
from tiny_runs import CATEGORIES, FixedBatches, adapters, batch_of, expert_lm, gated_lm, rows_of, trainer

from radargate_pl.auxiliary_terms import AuxiliaryTerms
from radargate_pl.callbacks import ExactResume, ExpertLoadMonitor, ReplicaCheck, RotationAngleMonitor, RunCheckpoint
from radargate_pl.checkpoint import load_checkpoint
from radargate_pl.data import FlanMixture
from radargate_pl.module import AdaptedLM
from radargate_pl.run_loggers import RunCSVLogger

STEPS = 20


class FirstGradients(Callback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.found:
            named = pl_module.network.named_parameters()
            self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}


class Exchanged(Callback):
    """Keeps what DDP was told to leave alone, and how many buffers it looks after."""

    def __init__(self) -> None:
        self.ignored: set[str] = set()
        self.buffers = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        wrapped = trainer.strategy.model
        self.ignored = set(getattr(wrapped, "parameters_to_ignore", ()))
        self.buffers = len(getattr(wrapped, "modules_buffers", ()))


class Disturb(Callback):
    """Changes one weight of rank 1 after two steps."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            layer = pl_module.network.layers["model.layers.1.self_attn.q_proj"]
            with torch.no_grad():
                layer.gate.rotation.Q.view(-1)[3].add_(1e-6)


def in_double(lm: AdaptedLM, disturb: Callable[[Any], None] | None = None) -> AdaptedLM:
    """Everything of the network in float64, so that two ways of adding up agree to 1e-12."""
    make = lm.network_factory

    def build(tasks: Any) -> Any:
        torch.manual_seed(5)  # gates start from it
        network = make(tasks).double()
        if disturb is not None:
            disturb(network)
        return network

    lm.network_factory = build
    return lm


def run_of(folder: Path, world_size: int, *callbacks: Callback, strategy: str = "gate_ddp", **options: Any) -> Any:
    settings = {"devices": world_size, "strategy": strategy if world_size > 1 else "auto", "max_steps": STEPS}
    settings |= {"val_check_interval": 1000, "check_val_every_n_epoch": None, "callbacks": list(callbacks)}
    return trainer(folder, **{**settings, **options})


def shares(rank: int, world_size: int, micro: bool = False) -> FixedBatches:
    """Global batches of six examples: whole, in micro-batches of four and two, or four for rank 0, two for rank 1."""
    rows = rows_of(24)
    batches = [rows[6 * i : 6 * i + 6] for i in range(4)]
    if micro:
        batches = [part for batch in batches for part in (batch[:4], batch[4:])]
    if world_size == 2:
        batches = [batch[4:] if rank else batch[:4] for batch in batches]
    return FixedBatches([batch_of(batch) for batch in batches], [], batch_size=6)


def sgd_fit(rank: int, world_size: int, folder: Path, strategy: str, micro: bool = False) -> dict[str, Any]:
    """A fit in float64 over shares of the same global batches, with an auxiliary loss that is only measured."""
    lm = in_double(gated_lm(str(folder / "experts"), optimizer=partial(torch.optim.SGD, lr=0.05)))
    lm.auxiliary_losses = AuxiliaryTerms({"z": 0.0})
    gradients, exchanged, path = FirstGradients(), Exchanged(), folder / f"sgd-{strategy}-{world_size}-{micro}"
    options = {"strategy": strategy, "logger": [RunCSVLogger(path)], "accumulate_grad_batches": 1 + micro}
    run = run_of(path, world_size, gradients, exchanged, limit_val_batches=0, **options)
    run.fit(lm, datamodule=shares(rank, world_size, micro))
    return {
        "gradients": gradients.found,
        "weights": lm.network.trainable_state(),
        "loss": float(lm.completed_step.loss),
        "ignored": exchanged.ignored,
        "buffers": exchanged.buffers,
        "frozen": sorted(name for name, p in lm.named_parameters() if not p.requires_grad),
    }


def mixture(folder: Path, batch_size: int) -> FlanMixture:
    return FlanMixture(
        tasks=str(folder / "data"), tokenizer="debug-tiny", validation_examples=3, batch_size=batch_size, max_length=96
    )


def library_fit(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Three experts, one for each task, in float64; divided among the processes where there are two."""
    lm = in_double(expert_lm(partial(torch.optim.AdamW, lr=1e-2)))
    path = folder / f"library-{world_size}"
    options = {"max_steps": 6, "val_check_interval": 3}
    monitors = [ExpertLoadMonitor(every_n_steps=1), RotationAngleMonitor(every_n_steps=1)]
    run = run_of(path, world_size, *monitors, RunCheckpoint(), ExactResume(), **options)
    module = mixture(folder, 4 // world_size)
    run.fit(lm, datamodule=module)
    sizes = [len(batch["id"]) for batch in module.train_dataloader()]
    return {
        "weights": lm.network.trainable_state(),
        "moments": load_checkpoint(str(path / "checkpoints" / "last.ckpt"))["optimizer_states"][0]["state"],
        "scores": {name: (score.loss, score.n) for name, score in lm.task_results.items()},
        "division": getattr(run.strategy, "division", None) is not None,
        "sizes": sizes,
    }


def half_fit(rank: int, world_size: int, folder: Path, steps: int, resume: Path | None) -> dict[str, Any]:
    """A fit over the mixture in float64 that may go on with another number of processes."""
    lm = in_double(gated_lm(str(folder / "experts"), lr=1e-2))
    path = folder / f"half-{world_size}-{steps}"
    run = run_of(path, world_size, RunCheckpoint(), ExactResume(), max_steps=steps, val_check_interval=7)
    run.fit(lm, datamodule=mixture(folder, 4 // world_size), ckpt_path=resume)
    return {"weights": lm.network.trainable_state(), "scores": {k: v.n for k, v in lm.task_results.items()}}


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def refusals(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """What the strategies say of frozen weights that differ, gates that drift, and experts under plain DDP."""

    def other_weights(network: Any) -> None:
        if rank == 1:
            network.backbone.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 4] += 1e-7

    experts = str(folder / "experts")
    frozen = in_double(gated_lm(experts), other_weights)
    drifting = gated_lm(experts)
    library = expert_lm(partial(torch.optim.AdamW, lr=1e-2))

    def fit(lm: AdaptedLM, name: str, *callbacks: Callback, **options: Any) -> str:
        run = run_of(folder / name, 2, *callbacks, limit_val_batches=0, **options)
        return refused(lambda: run.fit(lm, datamodule=shares(rank, 2)))

    shared = expert_lm(partial(torch.optim.AdamW, lr=1e-2), share_A=True)
    return {
        "shared": fit(shared, "shared"),
        "frozen": fit(frozen, "frozen"),
        "drifting": fit(drifting, "drifting", ReplicaCheck(every_n_steps=2), Disturb()),
        "plain": fit(library, "plain", strategy="ddp"),
    }


def everything(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """All fits of two processes."""
    root = Path(folder)
    return {
        "gate_ddp": sgd_fit(rank, 2, root, "gate_ddp"),
        "ddp": sgd_fit(rank, 2, root, "ddp"),
        "library": library_fit(rank, 2, root),
        "half": half_fit(rank, 2, root, 6, root / "half-1-4" / "checkpoints" / "last.ckpt"),
        **refusals(rank, 2, root),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    adapters(folder / "experts")
    (folder / "data").mkdir()
    for task, count in zip(CATEGORIES, (14, 10, 12), strict=True):  # 36 - 9 = 27 to train on: an odd number
        lines = [json.dumps({"id": f"{task}-{i}", "source": f"{task} {i}", "target": str(i % 4)}) for i in range(count)]
        (folder / "data" / f"{task}.train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The same fits in one process."""
    half_fit(0, 1, folder, 4, None)
    return {
        "sgd": sgd_fit(0, 1, folder, "auto"),
        "micro": sgd_fit(0, 1, folder, "auto", micro=True),
        "library": library_fit(0, 1, folder),
        "half": half_fit(0, 1, folder, 6, None),
    }


@pytest.fixture(scope="module")
def pair(folder: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    return on_ranks(everything, 2, str(folder))


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("strategy", ["gate_ddp", "ddp"])
def test_two_uneven_halves_give_the_gradients_and_weights_of_the_whole(
    strategy: str, alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    for found in pair:
        assert_near(found[strategy]["gradients"], alone["sgd"]["gradients"], 1e-12)
        assert_near(found[strategy]["weights"], alone["sgd"]["weights"], 1e-10)
        assert found[strategy]["loss"] == pytest.approx(alone["sgd"]["loss"], abs=1e-10)
    first, second = (found[strategy]["weights"] for found in pair)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_logged_losses_are_those_of_the_whole(folder: Path, pair: list[dict[str, Any]]) -> None:
    """Auxiliary losses are statistics of a micro-batch: those of one process with the same micro-batches."""
    rows = []
    for name in ("sgd-auto-1-True", "sgd-gate_ddp-2-False"):
        with (folder / name / "metrics.csv").open() as file:
            rows.append(list(csv.DictReader(file)))
    assert len(rows[0]) == len(rows[1]) == STEPS
    for one, two in zip(*rows, strict=True):
        for name in ("train/loss", "train/aux/z"):
            assert float(one[name]) == pytest.approx(float(two[name]), abs=1e-9)


def test_only_what_trains_is_exchanged(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        assert set(found["gate_ddp"]["frozen"]) <= found["gate_ddp"]["ignored"]
        assert found["gate_ddp"]["buffers"] == 0
        assert not {f"network.{name}" for name in found["gate_ddp"]["gradients"]} & found["gate_ddp"]["ignored"]


def test_divided_experts_are_those_of_one_process_and_the_checkpoint_has_all(
    alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    expected = alone["library"]
    assert not expected["division"]
    assert any(0 in one["library"]["sizes"] for one in pair), "a batch without any example must have been tried"
    for found in (one["library"] for one in pair):
        assert found["division"]
        assert_near(found["weights"], expected["weights"], 1e-9)
        for index, state in expected["moments"].items():
            assert_near(found["moments"][index], state, 1e-9)
        assert {name: n for name, (_, n) in found["scores"].items()} == dict.fromkeys(CATEGORIES, 3)
        for name, (loss, _) in expected["scores"].items():
            assert found["scores"][name][0] == pytest.approx(loss, abs=1e-9)


def test_two_processes_go_on_where_one_stopped(alone: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    for found in pair:
        assert found["half"]["scores"] == alone["half"]["scores"] == dict.fromkeys(CATEGORIES, 3)
        assert_near(found["half"]["weights"], alone["half"]["weights"], 1e-9)


def test_what_differs_between_processes_is_named_on_both(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        assert "the same frozen weights" in found["frozen"]
        assert "model.layers.1.mlp.up_proj.weight differ" in found["frozen"]
        assert "the same trained weights" in found["drifting"]
        assert "model.layers.1.self_attn.q_proj.gate." in found["drifting"]
        assert "trainer.strategy to be gate_ddp" in found["plain"]
        assert "to have all their parameters to themselves, but they share" in found["shared"]
