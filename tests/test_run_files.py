import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import (
    CATEGORIES,
    RecordingLogger,
    StopAt,
    adapters,
    expert_lm,
    fit,
    gated_lm,
    read_json,
    trainer,
    two_row_batches,
)

from radargate_pl import callbacks as package
from radargate_pl.callbacks import ResultWriter, RotationAngleMonitor, RunCheckpoint, RunProgressBar, RunSummary
from radargate_pl.callbacks.run_summary import write_summary
from radargate_pl.networks import GatedNetwork
from radargate_pl.provenance import git_state, installed_versions, peak_memory_bytes
from radargate_pl.redaction import redact_arguments


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


# ---- RunCheckpoint ----


def checkpoint_names(folder):
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    checkpoints = sorted(name for name in names if name.endswith(".ckpt"))
    assert names == {name + suffix for name in checkpoints for suffix in ("", ".sha256")}
    return checkpoints


def test_names_and_number_of_checkpoints(library, tmp_path):
    fit(gated_lm(library), tmp_path, RunCheckpoint(every_n_steps=1, keep=2), limit_val_batches=0)
    assert checkpoint_names(tmp_path) == ["last.ckpt", "step=00000003.ckpt", "step=00000004.ckpt"]
    last = tmp_path / "checkpoints/last.ckpt"
    assert last.read_bytes() == (tmp_path / "checkpoints/step=00000004.ckpt").read_bytes()


class ScriptedLoss(Callback):
    """Logs given values, one per validation, for the checkpoint callback to look at."""

    def __init__(self, losses):
        self.losses = list(losses)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("scripted", self.losses.pop(0))


def test_best_is_the_lowest_validation_loss_also_after_a_resume(library, tmp_path):
    def go_on(losses, steps, resume=None):
        saving = RunCheckpoint(monitor="scripted")
        options = {"val_check_interval": 1, "check_val_every_n_epoch": None, "max_epochs": -1}
        fit(gated_lm(library), tmp_path, ScriptedLoss(losses), saving, steps=steps, resume=resume, **options)
        return [torch.load(tmp_path / f"checkpoints/{name}.ckpt", weights_only=True)["global_step"] for name in names]

    names, last = ("best", "last"), tmp_path / "checkpoints/last.ckpt"
    assert go_on([3.0, 1.0, 2.0], steps=3) == [2, 3]
    assert checkpoint_names(tmp_path) == ["best.ckpt", "last.ckpt", "step=00000002.ckpt", "step=00000003.ckpt"]
    assert go_on([1.5], steps=4, resume=last) == [2, 4]
    assert go_on([0.5], steps=5, resume=last) == [5, 5]


def test_a_trial_leaves_nothing_behind(library, tmp_path):
    every = [make() for make in package.DEFAULTS.values() if make not in (RunSummary, RunProgressBar)]
    fit(gated_lm(library), tmp_path, *every, steps=-1, fast_dev_run=2, max_epochs=1)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not [name for name in left if name.endswith((".ckpt", ".safetensors"))]


# ---- RunSummary ----

KEYS = {
    "format_version", "command", "status", "error", "gate", "combine", "execution", "fingerprints", "steps",
    "seconds",
    "tokens_per_second", "peak_memory_bytes", "parameters", "loss", "tasks", "mean", "rotation", "seed", "world_size",
    "precision",
    "versions", "git", "argv", "earlier",
}  # fmt: skip


def test_the_summary_of_a_fit(library, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["radargate", "fit", "--hf_token", "hf_abcdefghijklmnopqrst"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    lm, batches, logger = gated_lm(library), two_row_batches(), RecordingLogger()
    fit(lm, tmp_path, RotationAngleMonitor(warn_below=0), RunSummary(), module=batches, logger=logger)
    found = read_json(tmp_path / "summary.json")
    assert set(found) == KEYS
    assert (found["command"], found["status"], found["error"], found["steps"]) == ("fit", "ok", None, 4)
    assert found["gate"] == lm.network.describe()
    assert found["fingerprints"] == lm.network.fingerprints
    losses = [value for _, value in logger.values("train/loss")]
    assert found["loss"] == pytest.approx({"first": losses[0], "last": losses[-1]})
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches.train)
    assert found["tokens_per_second"] * found["seconds"]["train"] == pytest.approx(tokens)
    assert {"setup", "train", "validate", "finish", "total"} == set(found["seconds"])
    gate = sum(p.numel() for name, p in lm.network.named_parameters() if ".gate." in name)
    everything = sum(p.numel() for p in lm.network.parameters())
    assert found["parameters"] == {"trainable": gate, "frozen": everything - gate}
    assert set(found["tasks"]) == set(CATEGORIES)
    assert found["tasks"]["add"]["n"] == 2
    mean = sum(task["loss"] for task in found["tasks"].values()) / 3
    assert found["mean"]["loss"] == pytest.approx(mean)
    assert found["mean"]["loss"] == pytest.approx(logger.values("val/loss")[-1][1], rel=1e-6)
    assert found["rotation"]["rms_angle_rad"] == pytest.approx(logger.values("val/angle_rms")[-1][1])
    assert (found["seed"], found["world_size"], found["precision"]) == (11, 1, "32-true")
    assert found["argv"][-1] == "<redacted>"
    assert "hf_abc" not in (tmp_path / "summary.json").read_text()
    assert found["versions"]["torch"] == torch.__version__
    assert found["peak_memory_bytes"] > 10_000_000


def test_a_failure_is_summarised(library, tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        fit(gated_lm(library), tmp_path, StopAt(2, RuntimeError("broken")), RunSummary(), limit_val_batches=0)
    found = read_json(tmp_path / "summary.json")
    assert set(found) == KEYS
    assert (found["status"], found["error"], found["steps"]) == ("failed", "RuntimeError: broken", 2)
    assert found["loss"]["first"] is not None


def test_an_interrupt_is_summarised(library, tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning ignores Ctrl-C from here on, pytest must not
    with pytest.raises(SystemExit):
        fit(gated_lm(library), tmp_path, StopAt(1, KeyboardInterrupt()), RunSummary(), limit_val_batches=0)
    found = read_json(tmp_path / "summary.json")
    assert (found["status"], found["error"]) == ("interrupted", "KeyboardInterrupt")


def test_a_failure_before_the_network_is_built_is_summarised(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        fit(gated_lm(str(tmp_path / "nowhere")), tmp_path / "run", RunSummary())
    found = read_json(tmp_path / "run/summary.json")
    assert found["status"] == "failed"
    assert "nowhere" in found["error"]
    assert found["gate"] is None


def test_a_test_after_a_fit_keeps_the_summary_of_the_fit(library, tmp_path):
    fit(gated_lm(library), tmp_path, RunSummary(), RunCheckpoint())
    run = trainer(tmp_path, callbacks=[RunSummary(), RunCheckpoint()])
    checkpoint = tmp_path / "checkpoints/best.ckpt"
    for _ in range(2):
        run.test(gated_lm(library), datamodule=two_row_batches(), ckpt_path=checkpoint, verbose=False)
    found = read_json(tmp_path / "summary.json")
    assert (found["command"], found["steps"], found["loss"]) == ("test", 4, {"first": None, "last": None})
    assert set(found["earlier"]) == {"fit"}
    assert found["earlier"]["fit"]["loss"]["first"] is not None
    assert found["tasks"]


def test_a_failure_keeps_what_went_well_before(tmp_path):
    for command, status in (("fit", "ok"), ("test", "ok"), ("fit", "failed"), ("validate", "failed")):
        write_summary(tmp_path, {"command": command, "status": status, "tasks": status})
    found = read_json(tmp_path / "summary.json")
    assert (found["command"], found["status"]) == ("validate", "failed")
    assert {name: earlier["status"] for name, earlier in found["earlier"].items()} == {"fit": "ok", "test": "ok"}
    write_summary(tmp_path, {"command": "fit", "status": "ok"})
    assert read_json(tmp_path / "summary.json")["earlier"] == {}
    (tmp_path / "summary.json").write_text("something else")
    write_summary(tmp_path, {"command": "test", "status": "ok"})
    assert read_json(tmp_path / "summary.json")["earlier"] == {}


# ---- ResultWriter ----


def test_a_fitted_gate_can_be_loaded_from_its_folder(library, tmp_path):
    lm = gated_lm(library)
    fit(lm, tmp_path, ResultWriter(), limit_val_batches=0)
    again = GatedNetwork.from_pretrained(tmp_path / "gate", dtype="float32")
    for name, value in lm.network.trainable_state().items():
        assert torch.equal(value, again.gate_state()[name])
    assert not (tmp_path / "experts").exists()


def test_trained_experts_become_adapters(tmp_path):
    fit(expert_lm(partial(torch.optim.AdamW, lr=1e-2)), tmp_path, ResultWriter(), limit_val_batches=0)
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == sorted(CATEGORIES)
    assert not (tmp_path / "gate").exists()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_test_writes_scores_and_examples_per_task(library, tmp_path):
    lm, batches = gated_lm(library), two_row_batches()
    trainer(tmp_path, callbacks=[ResultWriter()]).test(lm, datamodule=batches, verbose=False)
    ids = [number for batch in batches.evaluation for number in batch["id"]]
    seen = []
    for task in CATEGORIES:
        result = read_json(tmp_path / "test" / task / "results.json")
        score = lm.task_results[task]
        assert (result["loss"], result["exact_match"], result["n"]) == (score.loss, score.exact_match, score.n)
        rows = read_lines(tmp_path / "test" / task / "predictions.jsonl")
        pooled = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
        assert pooled == pytest.approx(score.loss)
        assert sum(row["exact_match"] for row in rows) / len(rows) == score.exact_match
        seen += [row["id"] for row in rows]
    assert sorted(seen) == sorted(ids)


def test_predict_writes_the_answers(library, tmp_path):
    lm = gated_lm(library)
    run = trainer(tmp_path, callbacks=[ResultWriter()])
    answers = [answer for batch in run.predict(lm, datamodule=two_row_batches()) for answer in batch]
    for task in CATEGORIES:
        rows = read_lines(tmp_path / "predict" / task / "predictions.jsonl")
        expected = [answer for answer in answers if answer["task"] == task]
        assert [{key: row[key] for key in expected[0]} for row in rows] == expected
        assert [row["exact_match"] for row in rows] == [row["prediction"] in row["references"] for row in rows]


# ---- RunProgressBar ----


def test_without_a_terminal_progress_is_a_few_lines(library, tmp_path, capsys):
    batches = two_row_batches(train=10)
    options = {"module": batches, "max_epochs": -1, "enable_progress_bar": True}
    fit(gated_lm(library), tmp_path, RunProgressBar(), steps=20, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{step}/20" for step in range(2, 21, 2)]
    assert all("loss" in line and "lr" in line and "tokens/s" in line for line in lines)


# ---- provenance ----


def test_secrets_leave_the_command_line():
    words = ["x", "--api_key=abc", "--a.password", "pw", "--model.max_new_tokens", "5", "--url", "https://u:p@h/"]
    words += ["--note", "ghp_aaaaaaaaaaaaaaaa"]
    shown = redact_arguments(words)
    assert shown[1:4] == ["--api_key=<redacted>", "--a.password", "<redacted>"]
    assert shown[4:8] == ["--model.max_new_tokens", "5", "--url", "https://<redacted>@h/"]
    assert shown[9] == "<redacted>"


def test_where_a_result_comes_from(tmp_path):
    assert git_state(tmp_path) is None
    assert {"python", "torch", "lightning", "radargate_pl"} <= set(installed_versions())
    assert peak_memory_bytes() > 10_000_000
