"""The train loader: a pure function of seed, epoch and position, for any number of processes and workers."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from radargate_pl.data.mixing import MixtureSampler
from radargate_pl.data.resumable_loader import MixtureBatches, ResumableLoader

SIZES = {"a": 7, "b": 12}


class Numbers(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


def sampler(seed: int = 3) -> MixtureSampler:
    return MixtureSampler(SIZES, SIZES, seed)


def loader(batch_size: int = 4, rank: int = 0, world_size: int = 1, workers: int = 0, **options) -> ResumableLoader:
    batches = MixtureBatches(sampler(options.pop("seed", 3)), batch_size, rank, world_size, **options)
    return ResumableLoader(Numbers(), batches, list, workers)


def epoch(loaders: list[ResumableLoader], number: int) -> list[list[list[int]]]:
    """Batches of one epoch of every process."""
    for one in loaders:
        one.sampler.set_epoch(number)
    return [list(one) for one in loaders]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_it_goes_on_behind_its_position_also_twice_and_into_the_next_epoch(stop: int, workers: int) -> None:
    whole = epoch([loader()], 1)[0]
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 3]
    state = None
    found: list[list[int]] = []
    for until in (1, stop, 5):  # a new process each time
        one = loader(workers=workers)
        one.sampler.set_epoch(1)
        if state is not None:
            one.load_state_dict(copy.deepcopy(state))
        found += list(islice(one, until - len(found)))
        state = one.state_dict()
    assert found == whole
    assert state["position"] == 19
    one = loader(workers=workers)
    one.load_state_dict(state)
    assert epoch([one], 2)[0] == epoch([loader()], 2)[0]


def test_an_epoch_that_is_cut_short_is_followed_by_a_whole_one() -> None:
    """As with trainer.limit_train_batches."""
    one = loader()
    list(islice(one, 2))
    assert epoch([one], 1) == epoch([loader()], 1)


def test_what_workers_have_fetched_ahead_is_not_counted() -> None:
    one = loader(workers=2)
    list(islice(one, 2))
    assert one.state_dict()["position"] == 8


def test_two_processes_see_in_each_step_what_one_sees() -> None:
    alone = epoch([loader(4)], 0)[0]
    first, second = epoch([loader(2, rank, 2) for rank in range(2)], 0)
    assert len(first) == len(second) == 5
    for one, left, right in zip(alone[:4], first, second, strict=False):
        assert sorted(one) == sorted(left + right)
    assert len(first[4]) == len(second[4]) == 1  # 19 examples: one is left out, for both to take equally many
    assert set(first[4] + second[4]) < set(alone[4])


@pytest.mark.parametrize("before", [1, 2])
def test_the_number_of_processes_may_change_in_the_middle_of_an_epoch(before: int) -> None:
    after = 3 - before
    loaders = [loader(4 // before, rank, before) for rank in range(before)]
    seen = [index for one in loaders for batch in islice(one, 2) for index in batch]
    (state,) = {str(one.state_dict()): one.state_dict() for one in loaders}.values()
    later = [loader(4 // after, rank, after) for rank in range(after)]
    for one in later:
        one.load_state_dict(state)
    rest = [index for one in later for batch in one for index in batch]
    order = sampler().order(0).tolist()
    assert sorted(seen) == sorted(order[:8])
    assert sorted(rest) == sorted(order[8 : 19 - 11 % after])


def test_processes_that_own_examples_take_theirs_of_each_global_batch() -> None:
    def owner_of(index: int) -> int:
        return int(index >= 7)  # task b

    loaders = [loader(2, rank, 2, owner_of=owner_of) for rank in range(2)]
    first, second = epoch(loaders, 0)
    alone = epoch([loader(4)], 0)[0]
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in alone]
    assert all(index < 7 for batch in first for index in batch)
    assert any(not batch for batch in first + second), "an empty batch must have been tried"


def test_other_data_are_refused_with_both_descriptions() -> None:
    state = loader().state_dict()
    with pytest.raises(ValueError, match=r"seed 3; .*a: 7 of 7, b: 12 of 12\s+and are now\s+seed 4") as error:
        loader(seed=4).load_state_dict(state)
    assert "--ckpt_path RUN/gate" in str(error.value)


def test_loading_draws_no_number_that_training_would_draw() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    list(loader(workers=0))
    assert torch.equal(torch.rand(2), expected)
