"""`radargate fit --config configs/rules/lorahub.yaml` as it stands, over tiny experts: search, files, what is seen."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CATEGORIES, LAYERS, adapters

from radargate_pl.cli import main
from radargate_pl.data import FlanMixture

TRAIN, TEST = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts and task files of a tiny library, and one finished run over them."""
    folder = tmp_path_factory.mktemp("lorahub")
    adapters(folder / "experts")
    (folder / "data").mkdir()
    for task in CATEGORIES:
        for split, count in (("train", TRAIN), ("test", TEST)):
            lines = [
                json.dumps({"id": f"{task}-{split}-{i}", "source": f"{task} {split} {i}", "target": f"{i % 3}"})
                for i in range(count)
            ]
            (folder / "data" / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *words(folder)]) == 0
    return folder


def words(folder: Path, **options: object) -> list[str]:
    given = {
        "model.network.init_args.backbone": "debug-tiny",
        "model.network.init_args.dtype": "float32",
        "model.network.init_args.experts": str(folder / "experts"),
        "model.optimizer.init_args.budget": 8,
        "trainer.max_steps": 8,
        "trainer.val_check_interval": 8,
        "trainer.accelerator": "cpu",
        "data.init_args.tasks": str(folder / "data"),
        "data.init_args.target": "answer",
        "data.init_args.validation_examples": 4,
        "data.init_args.batch_size": 5 * len(CATEGORIES),
        "data.init_args.max_length": 96,
        **options,
    }
    pairs = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["--config", "configs/rules/lorahub.yaml", *pairs]


def test_the_run_keeps_the_best_of_all_candidates_the_first_of_which_is_the_bare_backbone(folder: Path) -> None:
    run = folder / "runs/rules/lorahub"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "ok"
    assert summary["gate"] == "LoraHub()"
    assert summary["parameters"]["trainable"] == len(LAYERS) * len(CATEGORIES)
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    search = state["optimizer_states"][0]
    assert search["candidates"].shape == (8, len(CATEGORIES))
    assert not search["candidates"][0].any()
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    penalties = 0.05 * search["candidates"].abs().mean(1)
    assert losses == pytest.approx((search["losses"] - penalties).tolist(), abs=1e-5)
    best = search["losses"].argmin()
    assert search["losses"][best] <= search["losses"][0] == pytest.approx(losses[0], abs=1e-5)
    gates = load_file(run / "gate/gate.safetensors")
    assert sorted(gates) == sorted(f"{path}.gate.weights" for path in LAYERS)
    for weights in [*gates.values(), *state["state_dict"].values()]:
        assert torch.equal(weights, search["candidates"][best].float())


def test_the_examples_of_the_search_are_the_first_of_each_train_file_and_never_scored(folder: Path) -> None:
    data = FlanMixture(
        tasks=str(folder / "data"), tokenizer="debug-tiny", max_examples=5, validation_examples=4, mixing="equal"
    )
    for task in data.tasks:
        ids = {split: [record.id for record in records] for split, records in task.records.items()}
        assert ids["train"] == [f"{task.name}-train-{i}" for i in range(5)]
        assert ids["validation"] == [f"{task.name}-train-{i}" for i in range(TRAIN - 4, TRAIN)]
        assert ids["test"] == [f"{task.name}-test-{i}" for i in range(TEST)]
    data.prepare_data()
    data.setup("fit")
    for epoch in range(3):  # every epoch shows all of them once: one batch, the same examples for every candidate
        assert sorted(data.train_sampler().order(epoch).tolist()) == list(range(5 * len(CATEGORIES)))
    short = FlanMixture(tasks=str(folder / "data"), tokenizer="debug-tiny", max_examples=5, validation_examples=TRAIN)
    with pytest.raises(ValueError, match="more than validation_examples=12 train records"):
        _ = short.tasks


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("data.init_args.batch_size", 64, "batch_size to be the number of examples, 15, but got 64"),
        ("data.init_args.batch_size", 5, "'batches an epoch': 3"),
        ("model.optimizer.init_args.budget", 4, "at most budget=4 steps, but the trainer takes 8"),
    ],
)
def test_settings_that_would_search_something_else_are_refused(
    folder: Path, tmp_path: Path, option: str, value: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(folder, **{option: value, "trainer.default_root_dir": str(tmp_path / "run")})
    assert main(["fit", *given]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
