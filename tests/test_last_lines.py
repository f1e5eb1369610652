"""What a command says last: scores with their number of examples, and files that are there."""

import logging
from types import SimpleNamespace

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from radargate_pl.last_lines import fit_lines, predict_lines, score_lines
from radargate_pl.metrics import TaskScore
from radargate_pl.quantization import loading_options


def test_scores_by_task():
    results = {"sums": TaskScore(0.25, 0.6000000000000001, 5), "reverse": TaskScore(0.75, 0.0, 3)}
    assert score_lines(results, "validation") == [
        "last validation: loss 0.5000, exact match 0.300, n 8 (mean of 2 tasks)",
        "  sums     loss 0.2500, exact match 0.600, n 5",
        "  reverse  loss 0.7500, exact match 0.000, n 3",
    ]
    assert score_lines({}, "test") == []
    many = score_lines({f"task{index}": TaskScore(1.0, 0.0, 1) for index in range(1000)}, "test")
    assert many[-1] == "  and 980 more, in summary.json"
    assert len(many) == 22


def test_only_files_and_loggers_that_are_there(tmp_path):
    (tmp_path / "gate").mkdir()
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), loggers=[CSVLogger(tmp_path)])
    assert fit_lines(trainer, {}) == [f"run folder: {tmp_path}", f"gate: {tmp_path / 'gate'}"]
    trainer.loggers.append(TensorBoardLogger(tmp_path))
    assert f"TensorBoard: tensorboard --logdir {tmp_path}" in fit_lines(trainer, {})
    trainer.lightning_module = SimpleNamespace(task_names=("sums", "reverse"))
    trainer.datamodule = SimpleNamespace(inputs=None)
    (tmp_path / "predict/sums").mkdir(parents=True)
    (tmp_path / "predict/sums/predictions.jsonl").touch()
    assert predict_lines(trainer) == [f"answers: {tmp_path / 'predict/sums/predictions.jsonl'}"]


def test_a_missing_kernel_of_4_bits_is_named_where_something_is_in_4_bits(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    loading_options("tiny", SimpleNamespace(quantization_config=None), "none")
    with caplog.at_level(logging.WARNING):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "none")
        logger.warning("another thing")
    assert caplog.messages == ["another thing"]
