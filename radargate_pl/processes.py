"""What the processes of a run tell one another (layer 5)."""

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch import Trainer

T = TypeVar("T")


def gathered(value: T, world_size: int) -> list[T]:
    """What every process has, in the order of their ranks; all of them must call this.

    Args:
        value: of this process; tensors on the CPU.
        world_size: number of processes.
    """
    if world_size == 1:
        return [value]
    values: list[T] = [value] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def decided_by_first(decide: Callable[[], T], trainer: Trainer) -> T:
    """What the first process decides, told to all; all of them must call this.

    Args:
        decide: called on the first process alone.
        trainer: of all processes.

    Raises:
        ValueError: what ``decide`` raised, on every process: none waits for one that gave up.
        OSError: likewise.
    """
    decided: list[T] = []
    problem: ValueError | OSError | None = None
    if trainer.is_global_zero:
        try:
            decided.append(decide())
        except (ValueError, OSError) as error:
            problem = error
    decided, problem = gathered((decided, problem), trainer.world_size)[0]
    if problem is not None:
        raise problem
    return decided[0]


def beyond_cores(accelerator: str, devices: str | int, cores: int) -> str | None:
    """What to say of more processes on the CPU than it has cores; None where there are enough.

    Args:
        accelerator: of the trainer; "auto" is the CPU here.
        devices: of the trainer.
        cores: that this process may use.

    Example:
        >>> beyond_cores("cpu", 3, 2)
        'trainer.devices: 3 processes share 2 cores and wait for each other; --trainer.devices 2 is as quick or quicker'
        >>> beyond_cores("gpu", 3, 2)
    """
    count = int(devices) if str(devices).isdecimal() else 0
    if accelerator not in ("cpu", "auto") or count <= cores:
        return None
    shared = "1 core" if cores == 1 else f"{cores} cores"
    return (
        f"trainer.devices: {count} processes share {shared} and wait for each other; "
        f"--trainer.devices {cores} is as quick or quicker"
    )
