"""Which process has an example, where each process trains experts of its own."""

from collections.abc import Callable
from typing import Any

import torch

from radargate_pl.data.examples import ExampleSet


def owner_of(trainer: Any, count: int, examples: ExampleSet) -> Callable[[int], int] | None:
    """Tell the rank of the process that trains on an example, or give None where examples belong to nobody.

    Args:
        trainer: Lightning's, or None outside of one; its strategy has a `division` where experts are divided.
        count: Number of tasks.
        examples: The train set.
    """
    division = getattr(trainer and trainer.strategy, "division", None)
    if division is None:
        return None
    lm: Any = trainer.lightning_module
    expert_of_task = lm.expert_ids(torch.arange(count)).tolist()
    return lambda index: int(division.owner(expert_of_task[examples.task_of(index)]))
