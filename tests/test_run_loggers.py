"""metrics.csv stays readable: one row a step, no column for every layer."""

import csv

from radargate_pl.run_loggers import RunCSVLogger


def test_values_of_one_layer_stay_out_of_the_csv_file(tmp_path):
    logger = RunCSVLogger(tmp_path, flush_logs_every_n_steps=1)
    logger.log_metrics({"train/loss": 1.0, "gate/entropy": 0.5, "gate/model.layers.0.q_proj/entropy": 0.4}, step=0)
    logger.log_metrics({"gate/model.layers.0.q_proj/load/maths": 0.4}, step=1)
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"gate/entropy": "0.5", "step": "0", "train/loss": "1.0"}]
