"""Train batches of one process that go on, after a checkpoint, with the very example that comes next."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler

from radargate_pl.data.examples import Batch, Collator, Example
from radargate_pl.data.length_windows import LengthWindows
from radargate_pl.data.mixing import MixtureSampler
from radargate_pl.data.tokenised_tasks import content_changes
from radargate_pl.data.workers import leave_signals_to_the_main_process


class MixtureBatches(Sampler[list[int]]):
    """The batches of one process: its share of every stretch of ``batch_size * world_size`` examples of an epoch.

    Positions count the examples of all processes together: of each stretch, process r of w takes positions r, r + w,
    ... So a checkpoint's position means the same for any number of processes, and one process with batches of 8 sees
    in every step what two with batches of 4 see together. When the number of processes does not divide what is left
    of an epoch, its last examples (fewer than processes) are left out, for all to take equally many; other epochs
    have them elsewhere.

    Args:
        sampler: the order of all examples.
        batch_size: examples a batch of one process.
        rank: number of this process.
        world_size: number of processes.
        owner_of: tells which process has the example at an index, where examples belong to processes: then each takes
            its own from a stretch, none may be among them, and nothing is left out. ``None`` for everybody.
        length_windows: puts examples of like length into one stretch; ``None`` leaves the order as it is.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        owner_of: Callable[[int], int] | None = None,
        length_windows: LengthWindows | None = None,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.owner_of = owner_of
        self.length_windows = length_windows
        self.start = 0  # position of the first example of the next iteration

    @property
    def stretch(self) -> int:
        """Examples of one batch of every process."""
        return self.batch_size * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over what the epoch holds from position ``start`` on."""
        order = self.sampler.order(self.sampler.epoch).tolist()
        if self.length_windows is not None:
            order = self.length_windows.arrange(order, self.stretch, self.sampler.epoch)
        order = order[self.start : self.total]
        for begin in range(0, len(order), self.stretch):
            stretch = order[begin : begin + self.stretch]
            if self.owner_of is None:
                yield stretch[self.rank :: self.world_size]
            else:
                yield [index for index in stretch if self.owner_of(index) == self.rank]

    @property
    def total(self) -> int:
        """Examples of an epoch that all processes take together."""
        left_out = 0 if self.owner_of else len(self.sampler) % self.world_size
        return len(self.sampler) - left_out

    def describe(self) -> str:
        """Everything the order follows from, as text."""
        windows = self.length_windows.describe(self.stretch) if self.length_windows is not None else ""
        return self.sampler.describe() + windows

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return math.ceil(self.total / self.stretch)


class ResumableLoader:
    """Iterates over `MixtureBatches`, and knows how far it has come.

    Lightning stores ``state_dict`` in checkpoints and hands it back before it iterates. It is no DataLoader, so that
    Lightning has nothing to put a sampler of its own into.

    Args:
        examples: the train set.
        batches: which of them come when.
        collator: makes a batch.
        num_workers: processes that collate; 0 collates in the main one.
        contents: what the examples are, beside the order they come in (see `content_changes`); ``None`` compares
            nothing.

    Attributes:
        position: examples of this epoch that all processes together have been given.
    """

    def __init__(
        self,
        examples: Dataset[Example],
        batches: MixtureBatches,
        collator: Collator,
        num_workers: int,
        contents: Mapping[str, Any] | None = None,
    ) -> None:
        self.batch_sampler, self.contents = batches, contents
        self.position = 0
        self._is_restored = False
        self._loader = DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_the_main_process,
            generator=torch.Generator(),  # a loader draws a number; not one of those that training draws from
        )

    @property
    def dataset(self) -> Dataset[Example]:
        """The train set."""
        return self._loader.dataset

    @property
    def sampler(self) -> MixtureSampler:
        """The order; Lightning sets its epoch."""
        return self.batch_sampler.sampler

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Give out an epoch; its rest, the first time after a position was restored."""
        total = self.batch_sampler.total
        if not self._is_restored or self.position >= total:
            self.position = 0
        self._is_restored = False
        self.batch_sampler.start = self.position
        for batch in self._loader:
            self.position = min(self.position + self.batch_sampler.stretch, total)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: epoch, position, and what the order follows from."""
        state = {"epoch": self.sampler.epoch, "position": self.position, "order": self.batch_sampler.describe()}
        return state if self.contents is None else {**state, "contents": self.contents}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind that position.

        Raises:
            ValueError: If order or examples are others: the position would mean other examples.
        """
        if state["order"] != self.batch_sampler.describe():
            raise ValueError(
                "Expected the data of a resumed fit to be those of its checkpoint, but they were mixed from\n  "
                f"{state['order']}\nand are now\n  {self.batch_sampler.describe()}\n"
                "Resume with the tasks, limits, mixing, length window and seed of the checkpoint's config.yaml, or "
                "start a new run from its weights: --ckpt_path RUN/gate with another trainer.default_root_dir."
            )
        self._compare_contents(state.get("contents"))
        self.sampler.set_epoch(int(state["epoch"]))
        self.position = int(state["position"])
        self._is_restored = True

    def _compare_contents(self, saved: Mapping[str, Any] | None) -> None:
        if self.contents is None:
            return
        if saved is None:
            rank_zero_info(
                "The checkpoint is of an earlier version and holds only how many examples each task had: whether they "
                "are the same ones was not compared."
            )
        elif changes := content_changes(saved, self.contents):
            raise ValueError(
                f"Expected the data of a resumed fit to be those of its checkpoint, but they differ: {changes}. "
                "Restore them, or start a new run from its weights: --ckpt_path RUN/gate with another "
                "trainer.default_root_dir."
            )
