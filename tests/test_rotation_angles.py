import csv
import math

import pytest
import torch
from tiny_runs import CATEGORIES, LAYERS, RecordingLogger, adapters, fit, gated_lm, two_row_batches

from radargate_pl.callbacks import RotationAngleMonitor, RunCheckpoint
from radargate_pl.callbacks.rotation_angles import summarize_angles
from radargate_pl.gates import RotMoLEGate, StretchGate
from radargate_pl.records import AngleStatistics, record_gates


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("experts"))


def test_angles_are_summarised_by_hand():
    statistics = AngleStatistics.zeros((2, 2, 2))  # two planes, three experts
    # expert 0: one token with angles 0.5 and -0.1; expert 1: two tokens, 1.0 and 0.2, then 0 and 0
    statistics.count += torch.tensor([1.0, 2.0, 0.0])
    statistics.mean_sum += torch.tensor([0.4, 1.2, 0.0], dtype=torch.float64)
    statistics.abs_sum += torch.tensor([0.6, 1.2, 0.0], dtype=torch.float64)
    statistics.square_sum += torch.tensor([0.26, 1.04, 0.0], dtype=torch.float64)
    statistics.beyond_sum += torch.tensor([0.0, 1.0, 0.0])
    for name, value in (("cosine_before", 0.9), ("cosine_after", 0.3), ("cosine_count", 1.0)):
        matrix = getattr(statistics, name)
        matrix[0, 1] = matrix[1, 0] = value
    one = summarize_angles(statistics, 1)
    assert (one.tokens, one.angle_mean, one.angle_mean_abs) == (2, 0.3, 0.3)
    assert one.angle_rms == pytest.approx(math.sqrt(1.04 / 4))
    assert (one.beyond_quarter_pi, one.cosine_before, one.cosine_after) == (0.25, 0.9, pytest.approx(0.3))
    both = summarize_angles(statistics)
    assert both.angle_rms == pytest.approx(math.sqrt(1.3 / 6))
    assert both.cosine_before == pytest.approx(0.9)
    never = summarize_angles(statistics, 2)
    assert never.tokens == 0
    assert math.isnan(never.angle_rms)
    assert math.isnan(never.cosine_before)


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_each_validation_writes_the_angles_of_every_layer_and_expert(library, tmp_path):
    lm, batches = gated_lm(library, lr=5e-2), two_row_batches()
    monitor = RotationAngleMonitor()
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(lm, tmp_path, monitor, module=batches, **options)
    rows = read_rows(tmp_path / "angles.csv")
    assert [(row["step"], row["layer"], row["expert"]) for row in rows] == [
        (step, layer, expert) for step in ("2", "4") for layer in LAYERS for expert in CATEGORIES
    ]
    squares, angles = 0.0, 0
    by_hand = {}
    for batch in batches.evaluation:
        lm.network.eval()
        with torch.no_grad(), record_gates(lm.network.backbone, angles=LAYERS) as gates:
            lm.network(batch["input_ids"], batch["attention_mask"], batch["labels"])
        for layer, output in gates.items():
            real = batch["attention_mask"].bool()
            for index, expert in enumerate(output.experts):
                chosen = (output.indices == index) & real.unsqueeze(-1)
                by_hand.setdefault((layer, expert), []).append(output.angles[chosen])  # (tokens, planes)
    for row in rows[len(rows) // 2 :]:
        turned = torch.cat(by_hand[row["layer"], row["expert"]]).double()
        squares, angles = squares + float(turned.square().sum()), angles + turned.numel()
        assert float(row["tokens"]) == turned.shape[0]
        if not turned.shape[0]:  # no token of these batches kept the expert: there is no mean
            assert math.isnan(float(row["angle_mean"]))
            continue
        assert float(row["angle_mean"]) == pytest.approx(float(turned.mean()), rel=1e-4, abs=1e-7)
        assert float(row["angle_mean_abs"]) == pytest.approx(float(turned.abs().mean()), rel=1e-4)
        assert float(row["angle_rms"]) == pytest.approx(float(turned.square().mean().sqrt()), rel=1e-4)
        assert float(row["beyond_quarter_pi"]) == pytest.approx(float((turned.abs() > math.pi / 4).double().mean()))
    assert angles > 0
    assert monitor.latest_rms == pytest.approx(math.sqrt(squares / angles), rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_angles_are_logged_every_n_steps_and_never_twice(library, tmp_path, accumulate):
    logger = RecordingLogger()
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0, "max_epochs": -1}
    fit(gated_lm(library), tmp_path, RotationAngleMonitor(every_n_steps=2), steps=5, logger=logger, **options)
    for layer in LAYERS:
        logged = logger.values(f"gate/{layer}/angle_rms")
        assert [step for step, _ in logged] == [0, 2, 4]
        assert logged[0][1] == 0.0 < logged[1][1]  # Q = 0 at the start


def test_an_idle_rotation_is_told_once_by_name(library, tmp_path):
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    with pytest.warns(UserWarning, match=r"RMS angle 0\.0000 rad after 2 steps.*angle_norm: rms") as caught:
        fit(gated_lm(library, lr=0.0), tmp_path, RotationAngleMonitor(), **options)
    assert sum("hardly turns" in str(warning.message) for warning in caught) == 1


def test_an_idle_rotation_is_told_at_the_end_of_a_short_fit(library, tmp_path):
    with pytest.warns(UserWarning, match="hardly turns"):
        fit(gated_lm(library, lr=0.0), tmp_path, RotationAngleMonitor(), steps=1)


def test_a_rotation_that_turns_is_not_warned_about(library, tmp_path):
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(gated_lm(library, lr=5e-2), tmp_path, RotationAngleMonitor(), **options)  # warnings are errors here


def test_rotations_of_latents_are_monitored_too(library, tmp_path):
    monitor, logger = RotationAngleMonitor(every_n_steps=2), RecordingLogger()
    options = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    lm, batches = gated_lm(library, RotMoLEGate, lr=5e-2), two_row_batches()
    fit(lm, tmp_path, monitor, logger=logger, module=batches, **options)
    rows = read_rows(tmp_path / "angles.csv")
    assert [(row["layer"], row["expert"]) for row in rows] == [(layer, e) for layer in LAYERS for e in CATEGORIES]
    squares, angles = 0.0, 0
    for batch in batches.evaluation:
        lm.network.eval()
        with torch.no_grad(), record_gates(lm.network.backbone, angles=LAYERS) as gates:
            lm.network(batch["input_ids"], batch["attention_mask"], batch["labels"])
        for output in gates.values():
            turned = output.angles[batch["attention_mask"].bool()].double()  # (tokens, kept, one plane: rank 2)
            squares, angles = squares + float(turned.square().sum()), angles + turned.numel()
    assert monitor.latest_rms == pytest.approx(math.sqrt(squares / angles), rel=1e-5)
    assert monitor.latest_rms > 0.02
    assert logger.values("val/angle_rms")[-1][1] == monitor.latest_rms
    assert float(rows[0]["cosine_before"]) != float(rows[0]["cosine_after"])


def test_a_gate_without_rotation_writes_no_angles(library, tmp_path):
    monitor, logger = RotationAngleMonitor(every_n_steps=1), RecordingLogger()
    fit(gated_lm(library, StretchGate), tmp_path, monitor, logger=logger)
    assert not (tmp_path / "angles.csv").exists()
    assert monitor.latest_rms is None
    assert not [name for _, values in logger.calls for name in values if "angle" in name]


def test_a_resumed_fit_replaces_the_rows_it_takes_again(library, tmp_path):
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(gated_lm(library), tmp_path, RotationAngleMonitor(warn_below=0), RunCheckpoint(keep=-1), steps=3, **options)
    middle = tmp_path / "checkpoints/step=00000002.ckpt"
    again = [RotationAngleMonitor(warn_below=0), RunCheckpoint(keep=-1)]
    fit(gated_lm(library), tmp_path, *again, resume=middle, **options)
    steps = [row["step"] for row in read_rows(tmp_path / "angles.csv")]
    assert steps == [step for step in "1234" for _ in range(12)]


def test_having_warned_is_remembered(library, tmp_path):
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    with pytest.warns(UserWarning, match="hardly turns"):
        fit(gated_lm(library, lr=0.0), tmp_path, RotationAngleMonitor(), RunCheckpoint(), steps=3, **options)
    resume = tmp_path / "checkpoints/last.ckpt"
    fit(gated_lm(library, lr=0.0), tmp_path, RotationAngleMonitor(), RunCheckpoint(), resume=resume, **options)
