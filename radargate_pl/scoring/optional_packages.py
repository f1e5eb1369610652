"""Packages that only some tasks need, and what to say when one is missing."""

import importlib
from collections.abc import Iterable
from types import ModuleType

EXTRA = "radargate-pl[benchmarks]"
PACKAGE_OF = {
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "sentence_chrf_accuracy": "sacrebleu",
    "rouge_l": "rouge_score",
}


def need(module: str, what: str) -> ModuleType:
    """Import a package of the extra ``benchmarks``.

    Args:
        module: name to import.
        what: what it is needed for, in words.

    Raises:
        ValueError: if it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Expected the package {module.partition('.')[0]} for {what}, but {error.name} is not installed. "
            f"Run: pip install '{EXTRA}'"
        ) from error


def check_packages(metrics: Iterable[str], task: str) -> None:
    """Refuse a task whose scores cannot be computed here, before hours of answers are.

    Args:
        metrics: of the task; see `radargate_pl.scoring.measure`.
        task: its name.

    Raises:
        ValueError: if a package is missing; the message says how to install it.
    """
    for metric in metrics:
        if metric in PACKAGE_OF:
            need(PACKAGE_OF[metric], f"the {metric} of {task}")
