"""What a step does, counted: products, and bytes that outlive the forward."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Counted(NamedTuple):
    """Counts of one step.

    Attributes:
        products: operations of matrix products, forward and backward; a multiply-add is two.
        kept: bytes made by the forward that live until the backward pass.
    """

    products: int
    kept: int


class _Storages(TorchDispatchMode):
    """Remembers every storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


def count(forward: Callable[[], Tensor]) -> Counted:
    """Run a step and count.

    Args:
        forward: returns the loss; called twice.
    """
    forward().backward()  # what is remembered of frozen weights is made now
    with _Storages() as storages:
        loss = forward()
    kept = storages.alive()
    del loss
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    return Counted(int(counter.get_total_flops()), kept)
