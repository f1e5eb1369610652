"""A learning rate schedule taken ahead of its fit: it fails before the first step, not in a later one (layer 5)."""

import copy
import math
import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

STEPS = 200


def check_schedule(scheduler: LRScheduler, steps: float) -> None:
    """Take the first steps of a schedule on a copy, with an optimiser that holds nothing but its settings.

    Args:
        scheduler: of the fit, which is left as it is.
        steps: that the fit is still to take; infinite for one that only the clock ends.

    Raises:
        ValueError: naming the step in which the schedule fails, or gives a rate that is no finite number.
    """
    trial, taken = _copied(scheduler), 0
    problem = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimiser's own steps
        while taken < min(steps, STEPS) and problem is None:
            taken += 1
            try:
                trial.step()
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                problem = f"it fails in step {taken}: {error}"
            else:
                rates = [float(group["lr"]) for group in trial.optimizer.param_groups]
                if not all(map(math.isfinite, rates)):
                    problem = f"its rate is {rates[0]} after step {taken}"
    if problem is not None:
        raise ValueError(f"Expected model.lr_scheduler to give a rate for every step, but {problem}.")


def _copied(scheduler: LRScheduler) -> LRScheduler:
    optimizer: Any = scheduler.optimizer
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    stand_in.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    return copy.deepcopy(scheduler, {id(optimizer): stand_in})
