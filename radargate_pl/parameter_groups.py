"""The optimiser over what trains: a learning rate of their own for parts of it, and the schedule over all (layer 5)."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Made = TypeVar("Made")
FINITE = ("lr", "weight_decay", "eps", "momentum")
MULTIPLIER = "lr_multiplier"  # entry of a parameter group: {part of the names: factor}, empty for the base group

UNSERVED: dict[type[Optimizer], str] = {
    LBFGS: "evaluates the loss several times a step; a step here sees each batch once",
    SparseAdam: "takes sparse gradients only; those of gates and experts are dense",
}


def optimizer_and_schedule(
    parameters: Mapping[str, Tensor],
    make_optimizer: Callable[[Iterable[Any]], Optimizer],
    make_scheduler: Callable[[Optimizer], LRScheduler] | None,
    lr_multipliers: Mapping[str, float],
    what: str = "nothing",
) -> Any:
    """Make the optimiser and a schedule that advances with every optimiser step.

    Each key of ``lr_multipliers`` is a part of parameter names between dots ("rotation", "scorer", "lora_A",
    "v_proj.gate"); the parameters that have it form a group whose learning rate is the optimiser's times the factor.
    All others are the first group. Schedules that scale learning rates (LinearLR, StepLR, LambdaLR, CosineAnnealingLR
    with ``eta_min`` 0) keep the ratio; one that sets them itself is refused.

    Args:
        parameters: name to parameter, of everything that trains.
        make_optimizer: makes the optimiser from parameters or groups of them.
        make_scheduler: makes the schedule from the optimiser; ``None`` for a constant learning rate.
        lr_multipliers: part of names to positive factor; empty for one learning rate.
        what: has the parameters, for messages.

    Returns:
        What Lightning takes from ``configure_optimizers``.

    Raises:
        ValueError: if nothing trains; for what optimiser or schedule say of their arguments; for a factor that is not
            positive, a key no name has, two keys of one parameter, an optimiser without a learning rate, LBFGS and
            SparseAdam, settings that are NaN or infinite, and a schedule that waits for a metric or undoes the factors.
    """
    if not parameters:
        raise ValueError(
            f"Expected something to train, but got {what}: this gate has nothing to train; use validate or test"
        )
    groups = _groups(parameters, lr_multipliers) if lr_multipliers else list(parameters.values())
    optimizer = _made(make_optimizer, groups, "model.optimizer")
    _check_optimizer(optimizer)
    for group in optimizer.param_groups if lr_multipliers else []:
        if group.get("lr") is None:
            raise ValueError(
                f"Expected lr_multipliers to go with an optimiser that has a learning rate, but {_name(optimizer)} "
                "has none; remove lr_multipliers or give the optimiser an lr"
            )
        group["lr"] = group["lr"] * _factor(group)
    optimizer.register_load_state_dict_pre_hook(_check_saved_groups)
    if make_scheduler is None:
        return optimizer
    scheduler = _made(make_scheduler, optimizer, "model.lr_scheduler")
    _check_schedule(scheduler, optimizer)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _made(make: Callable[[Any], Made], argument: Any, key: str) -> Made:
    """Name the key of a class that refuses its arguments: it knows nothing of the config."""
    try:
        return make(argument)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error


def _check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimiser that no step here can serve, and settings that are no numbers."""
    for kind, reason in UNSERVED.items():
        if isinstance(optimizer, kind):
            raise ValueError(
                f"Expected model.optimizer to be one like AdamW, but got {_name(optimizer)}, which {reason}"
            )
    for group in optimizer.param_groups:
        for name in FINITE:
            value = group.get(name)
            if isinstance(value, int | float | Tensor) and not math.isfinite(float(value)):
                raise ValueError(f"Expected model.optimizer.{name} to be a finite number, but got {float(value)}")


def _groups(parameters: Mapping[str, Tensor], lr_multipliers: Mapping[str, float]) -> list[dict[str, Any]]:
    for part, factor in lr_multipliers.items():
        if not 0 < factor < math.inf:
            raise ValueError(f"Expected lr_multipliers[{part!r}] to be positive and finite, but got {factor}")
    members: dict[str | None, list[Tensor]] = {None: [], **{part: [] for part in lr_multipliers}}
    for name, parameter in parameters.items():
        found = [part for part in lr_multipliers if f".{part}." in f".{name}."]
        if len(found) > 1:
            raise ValueError(
                f"Expected one lr_multiplier for each parameter, but {found} both name {name}; keep one of them, or "
                "use longer parts of the name"
            )
        members[found[0] if found else None].append(parameter)
    unused = [part for part in lr_multipliers if not members[part]]
    if unused:
        there = sorted({word for name in parameters for word in name.split(".") if not word.isdecimal()})
        raise ValueError(
            f"Expected each key of lr_multipliers to be a part of the names of what trains, but {unused} are in none; "
            f"there are: {', '.join(there)}"
        )
    # The base group comes first, even when it is empty: train/lr logs the first group's learning rate.
    return [
        {"params": tensors, MULTIPLIER: {} if part is None else {part: float(lr_multipliers[part])}}
        for part, tensors in members.items()
    ]


def _check_schedule(scheduler: LRScheduler, optimizer: Optimizer) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "Expected lr_scheduler to be a schedule over optimiser steps, but got ReduceLROnPlateau, which waits "
            "for a metric; use for example torch.optim.lr_scheduler.LinearLR"
        )
    base = optimizer.param_groups[0].get("initial_lr", 0.0)
    for group in optimizer.param_groups[1:]:
        if not math.isclose(group.get("initial_lr", 0.0), base * _factor(group), rel_tol=1e-6):
            raise ValueError(
                f"Expected lr_scheduler to keep the ratio that lr_multipliers {group[MULTIPLIER]} gives, but "
                f"{_name(scheduler)} sets the learning rates itself; use for example "
                "torch.optim.lr_scheduler.LinearLR"
            )


def _check_saved_groups(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Refuse another run's state: torch would give one group's state and learning rate to another's parameters."""
    before, now = _multipliers(saved["param_groups"]), _multipliers(optimizer.param_groups)
    if before != now:
        raise ValueError(
            f"Expected the lr_multipliers of the checkpoint, {dict(before)}, but got {dict(now)}; resume with those in "
            "their order, or start a new run without --ckpt_path"
        )


def _multipliers(groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, float]]:  # in the order of the groups
    return [item for group in groups for item in group.get(MULTIPLIER, {}).items()]


def _factor(group: Mapping[str, Any]) -> float:
    return next(iter(group.get(MULTIPLIER, {}).values()), 1.0)


def _name(thing: object) -> str:
    return type(thing).__name__
