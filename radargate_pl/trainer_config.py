"""The ``trainer`` section of a config, checked before Lightning sees it (layer 6)."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch

from radargate_pl.config_places import ConfigError


def check_run_path(folder: Any) -> None:
    """Refuse a run folder that is no folder of this machine.

    Args:
        folder: ``trainer.default_root_dir``.

    Raises:
        ConfigError: for nothing, and for an address such as ``s3://``.
    """
    if not folder:
        raise ConfigError([f"configuration: trainer.default_root_dir: expected the run folder, found {folder!r}."])
    if "://" in str(folder):
        raise ConfigError(
            [
                f"configuration: trainer.default_root_dir: expected a folder of this machine, found {str(folder)!r}. "
                "Write to a local folder, and copy it afterwards."
            ]
        )


def check_trainer_config(trainer: Any) -> None:
    """Refuse what Lightning takes without a word or answers at length.

    Args:
        trainer: the parsed section of a fit.

    Raises:
        ConfigError: for ``barebones``, several devices under ``single_device``, and numbers out of range.
    """
    if mistakes := list(_numbers(trainer)):
        raise ConfigError(mistakes)
    if trainer.barebones:
        raise ConfigError(
            [
                "configuration: trainer.barebones: expected false, found true: it turns off the checkpoints and the "
                "metrics that a run consists of. Use fast_dev_run for a trial that leaves nothing."
            ]
        )
    devices = str(trainer.devices).strip()
    if trainer.strategy == "single_device" and devices.isdecimal() and int(devices) > 1:
        raise ConfigError(
            [
                f"configuration: trainer.strategy: single_device trains on one device, but trainer.devices is "
                f"{devices}. Set devices: 1, or strategy: gate_ddp."
            ]
        )


def _numbers(trainer: Any) -> Iterator[str]:
    """Numbers that Lightning divides by, or compares, without a look at them."""
    least = {"accumulate_grad_batches": 1, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
    for name, lowest in least.items():
        value = trainer.get(name)
        if value is not None and value < lowest:
            yield f"configuration: trainer.{name}: expected at least {lowest}, found {value}."
    if trainer.get("val_check_interval") == 0:
        yield (
            "configuration: trainer.val_check_interval: expected batches or a share of an epoch, found 0. For no "
            "validation set limit_val_batches: 0."
        )
    most, minimum = trainer.get("max_steps") or -1, trainer.get("min_steps") or 0
    if 0 <= most < minimum:
        yield f"configuration: trainer.min_steps: expected at most max_steps, which is {most}, found {minimum}."


def make_plain(callbacks: Any) -> None:
    """Turn arguments of callbacks that no file can hold into text: Timer's ``Interval.step``, a ``torch.device``.

    Args:
        callbacks: ``trainer.callbacks``, parsed; changed in place.
    """
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        arguments: Any = callback.get("init_args") if hasattr(callback, "get") else None
        for name, value in list(vars(arguments).items()) if arguments else []:
            if isinstance(value, Enum):
                arguments[name] = value.value
            elif isinstance(value, torch.device):
                arguments[name] = str(value)


@contextmanager
def naming_the_trainer() -> Iterator[None]:
    """Say of what Lightning refuses while it makes the trainer that it is about the config's section ``trainer``.

    Raises:
        ConfigError: with Lightning's own sentence.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:  # a strategy, precision or plugin that cannot be had
        raise ConfigError([f"configuration: trainer: {error}"]) from error
