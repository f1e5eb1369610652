import math
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyExperiment
from tiny_runs import (
    CATEGORIES,
    LAYERS,
    RecordingLogger,
    StopAt,
    adapters,
    batch_of,
    fit,
    gated_lm,
    read_json,
    trainer,
    two_row_batches,
)

from radargate_pl import callbacks as package
from radargate_pl.callbacks import (
    ExpertLoadMonitor,
    LossConvergenceMonitor,
    RotationAngleMonitor,
    RunCheckpoint,
    SampleGenerations,
)
from radargate_pl.callbacks.loss_convergence import exponential_average, oscillation, plateau, steps_to_threshold
from radargate_pl.callbacks.sample_generations import prompt_tokens
from radargate_pl.gates import UniformGate
from radargate_pl.records import record_gates


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


# ---- ExpertLoadMonitor ----


def test_a_uniform_gate_loads_all_experts_alike(library, tmp_path):
    logger = RecordingLogger()
    run = trainer(tmp_path, callbacks=[ExpertLoadMonitor()], logger=logger)
    run.validate(gated_lm(library, UniformGate), datamodule=two_row_batches(), verbose=False)
    (values,) = [values for _, values in logger.calls if "val/gate_entropy" in values]
    loads = {f"val/load/{name}": 1 / 3 for name in CATEGORIES}
    assert values == pytest.approx({"val/gate_entropy": math.log(3), **loads})


def test_load_and_entropy_are_means_over_real_tokens(library, tmp_path):
    logger = RecordingLogger()
    lm, batches = gated_lm(library, lr=0.0), two_row_batches(train=2)
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0, "logger": logger}
    fit(lm, tmp_path, ExpertLoadMonitor(), steps=1, module=batches, **options)
    rows = {layer: [] for layer in LAYERS}
    for batch in batches.train:
        with torch.no_grad(), record_gates(lm.network.backbone) as gates:
            lm.network(batch["input_ids"], batch["attention_mask"], batch["labels"])
        for layer, output in gates.items():
            dense = torch.zeros(*output.indices.shape[:-1], 3).scatter(-1, output.indices, output.weights)
            rows[layer].append(dense[batch["attention_mask"].bool()])
    for layer, parts in rows.items():
        weights = torch.cat(parts)
        shares = weights / weights.sum(-1, keepdim=True)
        entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1).mean()
        assert logger.values(f"gate/{layer}/entropy") == [(0, pytest.approx(float(entropy), rel=1e-4))]
        loads = [logger.values(f"gate/{layer}/load/{name}")[0][1] for name in CATEGORIES]
        assert sum(loads) == pytest.approx(1)
        assert loads == pytest.approx((weights.sum(0) / weights.sum()).tolist(), rel=2e-2)
    mean = sum(logger.values(f"gate/{layer}/load/add")[0][1] for layer in LAYERS) / len(LAYERS)
    assert logger.values("gate/load/add") == [(0, pytest.approx(mean))]


# ---- LossConvergenceMonitor ----


def test_the_average_is_the_textbook_formula():
    losses, decay = [3.0, 1.0, 2.0, 5.0], 0.9
    for t, value in enumerate(exponential_average(losses, decay)):
        weights = [decay ** (t - i) for i in range(t + 1)]
        assert value == pytest.approx(sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights))
    parts = exponential_average(losses[:2], decay)
    assert parts + exponential_average(losses[2:], decay, parts) == pytest.approx(exponential_average(losses, decay))


def test_oscillation_plateau_and_threshold_by_hand():
    assert oscillation([5.0, 4.0, 3.0, 2.0], window=4) == 0  # a straight line does not oscillate
    assert oscillation([9.0, 9.0, 0.0, 1.0, 0.0, 1.0], window=4) == 2
    assert oscillation([1.0, 2.0], window=4) is None
    assert plateau([8.0] * 27 + [1.0, 2.0, 3.0]) == 2
    assert plateau([4.0]) == 4
    assert plateau([]) is None
    assert steps_to_threshold([3.0, 2.5, 2.0], 2.5, first_step=11) == 12
    assert steps_to_threshold([3.0], 2.5) is None


def test_the_curve_is_that_of_the_logger_and_goes_on_after_a_resume(library, tmp_path):
    whole, options = RecordingLogger(), {"limit_val_batches": 0, "max_epochs": -1}
    fit(gated_lm(library), tmp_path / "whole", LossConvergenceMonitor(), steps=6, logger=whole, **options)
    expected = read_json(tmp_path / "whole/convergence.json")
    assert expected["loss"] == pytest.approx([value for _, value in whole.values("train/loss")])
    assert expected["ema"] == pytest.approx(exponential_average(expected["loss"], 0.98))
    assert expected["plateau"] == expected["loss"][-1]
    assert expected["steps_to_threshold"][0]["threshold"] == pytest.approx(1.05 * expected["plateau"])
    assert [value for _, value in whole.values("train/loss_ema")] == pytest.approx(expected["ema"])
    parts = tmp_path / "parts"
    fit(gated_lm(library), parts, LossConvergenceMonitor(), RunCheckpoint(every_n_steps=2), steps=3, **options)
    resume = parts / "checkpoints/step=00000003.ckpt"
    fit(gated_lm(library), parts, LossConvergenceMonitor(), RunCheckpoint(), steps=6, resume=resume, **options)
    found = read_json(parts / "convergence.json")
    assert found["first_step"] == 1
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["ema"] == pytest.approx(expected["ema"], rel=1e-6)


def test_thresholds_given_are_those_reported(library, tmp_path):
    fit(gated_lm(library), tmp_path, LossConvergenceMonitor(thresholds=[99.0, 0.0]), limit_val_batches=0)
    found = read_json(tmp_path / "convergence.json")["steps_to_threshold"]
    assert found == [{"threshold": 99.0, "step": 1}, {"threshold": 0.0, "step": None}]


def test_the_curve_survives_a_crash(library, tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        fit(
            gated_lm(library),
            tmp_path,
            LossConvergenceMonitor(),
            StopAt(2, RuntimeError("broken")),
            limit_val_batches=0,
        )
    assert len(read_json(tmp_path / "convergence.json")["loss"]) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossConvergenceMonitor(decay=1.0), "decay to lie in .*1.0"),
        (lambda: LossConvergenceMonitor(window=2), "window to be at least 3 .*2"),
        (lambda: RotationAngleMonitor(every_n_steps=0), "every_n_steps to be at least 1, but got 0"),
        (lambda: ExpertLoadMonitor(every_n_steps=0), "every_n_steps to be at least 1, but got 0"),
        (lambda: RunCheckpoint(every_n_steps=0), "every_n_steps to be at least 1 or null, but got 0"),
        (lambda: RunCheckpoint(keep=0), "keep to be at least 1, or -1 for all, but got 0"),
        (lambda: SampleGenerations(num_samples=0), "num_samples to be at least 1, but got 0"),
    ],
    ids=lambda value: None,
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- SampleGenerations ----


class TextLogger(RecordingLogger):
    """A logger with a text tab."""

    def __init__(self):
        super().__init__()
        self.texts = []

    @property
    def experiment(self):
        return SimpleNamespace(add_text=lambda *args, **kwargs: self.texts.append((*args, kwargs)))


def test_samples_go_to_the_text_tab_and_not_to_stdout(library, tmp_path, capsys):
    logger, lm = TextLogger(), gated_lm(library)
    fit(lm, tmp_path, SampleGenerations(num_samples=2), logger=logger)
    assert capsys.readouterr().out == ""
    assert [name for name, *_ in logger.texts] == ["samples/add", "samples/echo"]
    _, text, options = logger.texts[0]
    assert options == {"global_step": 4}
    batch = batch_of([("add", "q12:", "a")])
    length = len("q12:")
    (answer,) = lm.generate(batch["input_ids"][:, :length], torch.ones(1, length, dtype=torch.int64), batch["task"])
    assert text.startswith(f"**prompt**\n\n    q12:\n\n**answer**\n\n    {answer}".rstrip())


def test_the_prompt_ends_where_the_answer_begins():
    batch = batch_of([("add", "abc", "d"), ("add", "a", "bcdef")])
    assert prompt_tokens(batch, 0, False).tolist() == batch["input_ids"][0, :3].tolist()
    assert prompt_tokens(batch, 1, False).tolist() == batch["input_ids"][1, :1].tolist()
    assert prompt_tokens(batch, 0, True).tolist() == batch["input_ids"][0, :5].tolist()  # an encoder reads it all


# ---- all together ----


class FullLogger(TextLogger):
    @property
    def experiment(self):
        return type("Experiment", (DummyExperiment,), {"add_text": lambda *_, **__: None})()


def test_every_callback_together_logs_nothing_twice(library, tmp_path):
    logger = FullLogger()
    every = [make() for make in package.DEFAULTS.values()]
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "enable_progress_bar": True}
    fit(gated_lm(library, lr=5e-2), tmp_path, *every, logger=logger, num_sanity_val_steps=1, **options)
    seen = [(step, name) for step, values in logger.calls for name in values if name not in ("epoch", "step")]
    assert len(seen) == len(set(seen))
    names = {name for _, name in seen}
    assert {"train/loss", "train/lr", "val/loss", "val/exact_match", "val/add/loss", "val/angle_rms"} <= names
    assert {"gate/entropy", "train/loss_ema", f"gate/{LAYERS[0]}/angle_rms", f"gate/{LAYERS[0]}/load/add"} <= names


def test_every_callback_works_without_a_logger_in_every_command(library, tmp_path, capsys):
    every = [make() for make in package.DEFAULTS.values()]
    lm = gated_lm(library, lr=5e-2)
    run = fit(lm, tmp_path, *every, enable_progress_bar=True)
    run.validate(lm, datamodule=two_row_batches(), verbose=False)
    run.test(lm, datamodule=two_row_batches(), verbose=False)
    run.predict(lm, datamodule=two_row_batches())
    said = capsys.readouterr().err
    for command in ("test", "predict"):
        assert re.search(rf"^{command}: batch (\d+)/\1  0 s$", said, re.MULTILINE), said
    expected = {"angles.csv", "checkpoints", "convergence.json", "gate", "predict", "summary.json", "test"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    found = read_json(tmp_path / "summary.json")
    assert found["command"] == "predict"
    assert set(found["earlier"]) == {"fit", "validate", "test"}
    assert found["tasks"] == {}
