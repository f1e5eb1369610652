"""Settings of a resumed fit's optimiser: what the configuration changes wins over the checkpoint (layer 5)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Settings = dict[str, Any]
RATES = ("base_lrs", "_last_lr")  # of the optimiser's groups


def optimizer_settings(optimizer: Optimizer) -> list[Settings]:
    """What the configuration says of each parameter group; to be read before training or a checkpoint changes it."""
    return [_plain(group) for group in optimizer.param_groups]


def schedule_settings(scheduler: LRScheduler) -> Settings:
    """What the configuration says of a schedule, its class included; to be read before it advances."""
    inner = [schedule_settings(one) for one in getattr(scheduler, "_schedulers", ())]
    state = {name: value for name, value in _plain(scheduler.state_dict()).items() if name not in RATES}
    return {"class": type(scheduler).__name__, **state, **({"schedulers": inner} if inner else {})}


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
                group["lr"] = group["lr"] * (given / saved) if saved else given
                for rates in _start_rates(schedulers):
                    if index < len(rates):
                        rates[index] = given
            group[name] = given
    return lines


def check_schedules(before: Sequence[Settings], now: Sequence[Settings]) -> None:
    """Refuse a schedule that is not the one of the checkpoint, but for the learning rates it starts from.

    A schedule computes each rate from the one before: with other settings in the middle it follows neither curve.

    Raises:
        ValueError: naming what differs, with both values.
    """
    problems = []
    if len(before) != len(now):
        problems.append(f"{len(before)} schedule(s) in the checkpoint, {len(now)} now")
    for old, new in zip(before, now, strict=False):
        problems += [f"{name}: {saved} in the checkpoint, {given} now" for name, saved, given in _changes(old, new)]
        if old.keys() != new.keys():
            problems.append(f"settings {sorted(old)} in the checkpoint, {sorted(new)} now")
    if problems:
        raise ValueError(
            "Expected model.lr_scheduler of a resumed fit to be that of its checkpoint, but got "
            f"{'; '.join(problems)}. Keep it, or start a new run from the weights: --ckpt_path RUN/gate with another "
            "trainer.default_root_dir."
        )


def _start_rates(schedulers: Sequence[Any]) -> Iterator[list[Any]]:
    """The rates that schedules start from, one for each group; those of schedules inside a schedule, too."""
    for scheduler in schedulers:
        yield getattr(scheduler, "base_lrs", [])
        yield from _start_rates(getattr(scheduler, "_schedulers", ()))


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
