"""What the processes of a run tell one another (layer 5)."""

from typing import TypeVar

import torch

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
