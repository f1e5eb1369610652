"""What a command says last: its scores, and where its files are (layer 6)."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from radargate_pl.metrics import TaskScore, mean_over_tasks

_MOST = 20


def score_lines(results: Mapping[str, TaskScore], split: str) -> list[str]:
    """Loss and exact match over tasks, then of each task; of many the first twenty.

    Args:
        results: by task; nothing is said where there are none.
        split: ``validation`` or ``test``.
    """
    if not results:
        return []
    mean = mean_over_tasks(dict(results))
    tasks = "1 task" if len(results) == 1 else f"mean of {len(results)} tasks"
    lines = [f"last {split}: {_words(mean)} ({tasks})"]
    width = max(map(len, results))
    shown = [f"  {name:<{width}}  {_words(score)}" for name, score in results.items()] if len(results) > 1 else []
    rest = [f"  and {len(shown) - _MOST} more, in summary.json"] if len(shown) > _MOST else []
    return [*lines, *shown[:_MOST], *rest]


def _words(score: TaskScore) -> str:
    return f"loss {score.loss:.4f}, exact match {score.exact_match:.3f}, n {score.n}"


def fit_lines(trainer: Trainer, results: Mapping[str, TaskScore]) -> list[str]:
    """The scores of a fit and its folders.

    Args:
        trainer: that of the fit.
        results: of its last validation.
    """
    folder = Path(trainer.default_root_dir)
    lines = [*score_lines(results, "validation"), f"run folder: {folder}"]
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        lines.append(f"TensorBoard: tensorboard --logdir {folder}")
    return lines + [f"{name}: {folder / name}" for name in ("experts", "gate") if (folder / name).is_dir()]


def predict_lines(trainer: Trainer) -> list[str]:
    """Where a predict wrote its answers.

    Args:
        trainer: that of the predict.
    """
    folder = Path(trainer.default_root_dir) / "predict"
    if getattr(getattr(trainer, "datamodule", None), "inputs", None) is not None:
        return [f"answers: {folder / 'inputs' / 'predictions.jsonl'}"]
    names = getattr(getattr(trainer, "lightning_module", None), "task_names", ())
    found = [path for path in (folder / name / "predictions.jsonl" for name in names) if path.is_file()]
    more = [f"  and {len(found) - _MOST} more in {folder}"] if len(found) > _MOST else []
    return [*(f"answers: {path}" for path in found[:_MOST]), *more]
