"""Batches of examples of like length: less padding, in an order that stays a pure function of the seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def checked_window(length_window: int) -> int:
    """The window that a user asked for.

    Raises:
        ValueError: If it holds no batch.
    """
    if length_window < 1:
        raise ValueError(f"Expected length_window to be 1 or more batches, but got {length_window}.")
    return length_window


@dataclass(frozen=True)
class LengthWindows:
    """Sorts the examples of each window of batches by length, cuts them into batches and shuffles these.

    A window holds what it held before, so the mixture of tasks changes within windows only. A batch is that of all
    processes together: they wait for the longest row among them.

    Args:
        window: Batches that are sorted among themselves.
        lengths: Tokens of every train example, prompt and answer, (examples,) int64.
        seed: Seed of the order of batches.
    """

    window: int
    lengths: Tensor
    seed: int

    def arrange(self, order: Sequence[int], batch: int, epoch: int) -> list[int]:
        """Put an epoch's order into windows. What does not fill a batch stays last.

        Args:
            order: Indices of train examples.
            batch: Examples of one batch of all processes together.
            epoch: Number of the epoch.
        """
        full = len(order) - len(order) % batch
        arranged: list[int] = []
        for number, begin in enumerate(range(0, full, self.window * batch)):
            part = torch.tensor(order[begin : min(begin + self.window * batch, full)])
            batches = part[self.lengths[part].argsort(stable=True)].view(-1, batch)
            arranged += batches[self._permutation(len(batches), epoch, number)].flatten().tolist()
        return arranged + list(order[full:])

    def describe(self, batch: int) -> str:
        """What the arrangement follows from besides seed and order, as text.

        Args:
            batch: Examples of one batch of all processes together.
        """
        return f"; sorted by length within {self.window} batches of {batch} examples"

    def _permutation(self, size: int, epoch: int, window: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/lengths/{epoch}/{window}".encode()).digest()
        return torch.randperm(size, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
