"""FLAN's mixing: how many examples of each task an epoch holds, and in which order they come."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

Mixing = Literal["proportional", "equal"] | dict[str, float]


def mixing_rates(
    sizes: Mapping[str, int], mixing: Mixing = "proportional", cap: int = 3000, temperature: float = 1.0
) -> dict[str, float]:
    """Rate of each task, not normalised.

    proportional: min(size, cap) ** (1 / temperature); equal: 1; weights: as given.

    Args:
        sizes: Train examples of each task.
        mixing: `proportional`, `equal`, or a weight for every task by name.
        cap: FLAN's mixing rate maximum; a task counts as no larger (proportional only).
        temperature: 1 keeps the proportions, larger flattens them towards equal (proportional only).

    Raises:
        ValueError: If an argument is out of range, or weights and tasks do not match.
    """
    if cap < 1:
        raise ValueError(f"Expected mixing_cap to be 1 or more, but got {cap}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"Expected mixing_temperature to be above 0, but got {temperature}.")
    if isinstance(mixing, Mapping):
        return _checked_weights(sizes, mixing)
    if mixing == "equal":
        return dict.fromkeys(sizes, 1.0)
    if mixing != "proportional":
        raise ValueError(f"Expected mixing to be proportional, equal or {{task: weight}}, but got {mixing!r}.")
    return {name: min(size, cap) ** (1 / temperature) for name, size in sizes.items()}


def epoch_counts(
    sizes: Mapping[str, int], mixing: Mixing = "proportional", cap: int = 3000, temperature: float = 1.0
) -> dict[str, int]:
    """Examples of each task in one epoch.

    An epoch has N examples: the sum of min(size, cap) for `proportional`, the sum of sizes otherwise. They are
    divided by the rates with the largest remainder method (ties to the earlier task), so the counts add up to N and
    none is off by one or more from its exact share. Capped tasks show other examples in the next epoch.

    Args:
        sizes: Train examples of each task.
        mixing: See mixing_rates.
        cap: See mixing_rates.
        temperature: See mixing_rates.
    """
    rates = mixing_rates(sizes, mixing, cap, temperature)
    capped = mixing == "proportional"
    total = sum(min(size, cap) if capped else size for size in sizes.values())
    if capped and temperature == 1:
        return {name: min(size, cap) for name, size in sizes.items()}
    exact = {name: total * rate / sum(rates.values()) for name, rate in rates.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


class MixtureSampler(Sampler[int]):
    """Indices of a train set in an order that is a pure function of (seed, epoch), the same on every machine.

    Each task is an endless row of passes; a pass shows every example of the task once, in an order of its own. Epoch
    e takes the next `count` of that row, so examples of a capped task rotate and nothing repeats within a pass. Which
    task comes when is a permutation of the epoch. A task's row does not depend on which other tasks there are.

    Args:
        sizes: Train examples of each task, in the order in which the train set holds them.
        counts: Examples of each task in an epoch.
        seed: Seed of all orders.
    """

    def __init__(self, sizes: Mapping[str, int], counts: Mapping[str, int], seed: int) -> None:
        assert list(sizes) == list(counts)
        self.sizes = dict(sizes)
        self.counts = dict(counts)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls this."""
        self.epoch = epoch

    def describe(self) -> str:
        """Everything the order follows from, as text."""
        tasks = ", ".join(f"{name}: {count} of {self.sizes[name]}" for name, count in self.counts.items())
        return f"seed {self.seed}; examples of an epoch: {tasks}"

    def order(self, epoch: int) -> Tensor:
        """All indices of an epoch.

        Returns:
            (sum of counts,) int64, indices into the concatenation of the tasks' train examples.
        """
        picks = []
        offset = 0
        for name, size in self.sizes.items():
            picks.append(offset + self._stretch(name, epoch * self.counts[name], self.counts[name]))
            offset += size
        task_of_slot = torch.cat([torch.full_like(pick, task) for task, pick in enumerate(picks)])
        task_of_slot = task_of_slot[self._permutation(len(task_of_slot), "epoch", epoch)]
        order = torch.empty_like(task_of_slot)
        for task, pick in enumerate(picks):
            order[task_of_slot == task] = pick
        return order

    def _stretch(self, name: str, start: int, count: int) -> Tensor:
        """Elements start ... start + count of the endless row of one task: (count,) int64 below its size."""
        size = self.sizes[name]
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        passes = range(start // size, (start + count - 1) // size + 1)
        row = torch.cat([self._permutation(size, name, number) for number in passes])
        begin = start - passes.start * size
        return row[begin : begin + count]

    def _permutation(self, size: int, purpose: str, number: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{purpose}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(size, generator=generator)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the epoch."""
        yield from self.order(self.epoch).tolist()

    def __len__(self) -> int:
        """Examples in an epoch."""
        return sum(self.counts.values())


def _checked_weights(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    missing = [name for name in sizes if name not in weights]
    unknown = [name for name in weights if name not in sizes]
    if missing or unknown:
        raise ValueError(
            f"Expected mixing to give a weight for each of {list(sizes)}, but "
            + " and ".join(_says("lacks", missing) + _says("has unknown", unknown))
            + "."
        )
    bad = {name: weight for name, weight in weights.items() if not (weight >= 0 and math.isfinite(weight))}
    if bad or not sum(weights.values()) > 0:
        raise ValueError(f"Expected the weights of mixing to be 0 or more and not all 0, but got {dict(weights)}.")
    return {name: float(weights[name]) for name in sizes}


def _says(verb: str, names: Sequence[str]) -> list[str]:
    return [f"it {verb} {', '.join(names)}"] if names else []
