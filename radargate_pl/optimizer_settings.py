"""Settings of a resumed fit's optimiser: what the configuration changes wins over the checkpoint (layer 5)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Settings = dict[str, Any]


def optimizer_settings(optimizer: Optimizer) -> list[Settings]:
    """What the configuration says of each parameter group; to be read before training or a checkpoint changes it."""
    return [_plain(group) for group in optimizer.param_groups]


def schedule_settings(scheduler: LRScheduler) -> Settings:
    """What the configuration says of a schedule; to be read before it advances."""
    return _plain(scheduler.state_dict())


def apply_optimizer_changes(
    before: Sequence[Settings], now: Sequence[Settings], optimizer: Optimizer, schedulers: Sequence[LRScheduler]
) -> list[str]:
    """Give a restored optimiser the settings that have been changed since; all others stay as they were restored.

    A changed learning rate under a schedule scales the present one.

    Args:
        before: `optimizer_settings` of the fit that wrote the checkpoint.
        now: those of this fit.
        optimizer: with its state restored.
        schedulers: with their states restored.

    Returns:
        One line for each change.
    """
    lines = []
    for index, (group, old, new) in enumerate(zip(optimizer.param_groups, before, now, strict=True)):
        for name, saved, given in _changes(old, new):
            if name == "lr" and "initial_lr" in new:
                continue  # a schedule made it from initial_lr
            lines.append(f"{name}: {saved} in the checkpoint, {given} now, which is used")
            if name == "initial_lr":
                group["lr"] *= given / saved
                for scheduler in schedulers:
                    if index < len(getattr(scheduler, "base_lrs", ())):
                        scheduler.base_lrs[index] = given
            group[name] = given
    return lines


def apply_schedule_changes(before: Settings, now: Settings, scheduler: LRScheduler) -> list[str]:
    """Give a restored schedule the settings that have been changed since; see `apply_optimizer_changes`."""
    lines = []
    for name, saved, given in _changes(before, now):
        if name not in ("base_lrs", "_last_lr"):  # the optimiser's
            setattr(scheduler, name, given)
            lines.append(f"{type(scheduler).__name__}.{name}: {saved} in the checkpoint, {given} now, which is used")
    return lines


def _changes(before: Settings, now: Settings) -> Iterator[tuple[str, Any, Any]]:
    for name in now:
        if name in before and before[name] != now[name]:
            yield name, before[name], now[name]


def _plain(settings: Mapping[str, Any]) -> Settings:
    """Only what a checkpoint may hold and two runs can compare."""
    return {name: _as_list(value) for name, value in settings.items() if name != "params" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
