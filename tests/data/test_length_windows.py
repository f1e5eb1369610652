"""Windows of batches sorted by length: the same examples, less padding, the same order everywhere."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path

import pytest
import torch
from test_resumable_loader import Numbers
from torch import Tensor

from radargate_pl.data import FlanMixture
from radargate_pl.data.length_windows import LengthWindows
from radargate_pl.data.mixing import MixtureSampler
from radargate_pl.data.resumable_loader import MixtureBatches, ResumableLoader

SIZES = {"a": 301, "b": 806}


def lengths() -> Tensor:
    """Long tails, as texts have them."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(sum(SIZES.values()), generator=generator).mul(0.6).exp() * 60).long() + 1


def batches_of(window: int | None = 50, batch_size: int = 4, rank: int = 0, world_size: int = 1) -> MixtureBatches:
    windows = LengthWindows(window, lengths(), seed=5) if window else None
    return MixtureBatches(MixtureSampler(SIZES, SIZES, 5), batch_size, rank, world_size, None, windows)


def padded_tokens(batches: list[list[int]]) -> int:
    return sum(len(batch) * int(lengths()[batch].max()) for batch in batches)


def test_every_window_holds_what_it_held_and_batches_are_of_like_length() -> None:
    found, before = list(batches_of()), list(batches_of(window=None))
    assert [len(batch) for batch in found] == [len(batch) for batch in before]
    for begin in range(0, len(found), 50):
        some, others = found[begin : begin + 50], before[begin : begin + 50]
        assert Counter(chain(*some)) == Counter(chain(*others))
    in_first = [lengths()[batch].tolist() for batch in found[:50]]
    assert in_first != sorted(in_first)  # batches come in an order of chance
    assert all(one[-1] <= two[0] for one, two in pairwise(sorted(in_first)))
    assert found[-1] == before[-1]  # what fills no batch stays last


@pytest.mark.parametrize(("batch_size", "at_most"), [(4, 0.65), (16, 0.46)])
def test_padding_nearly_vanishes(batch_size: int, at_most: float) -> None:
    ratio = padded_tokens(list(batches_of(50, batch_size))) / padded_tokens(list(batches_of(None, batch_size)))
    assert ratio < at_most + 0.1


def test_two_processes_share_each_batch_of_one() -> None:
    whole = list(batches_of(batch_size=8))
    halves = [list(batches_of(batch_size=4, rank=rank, world_size=2)) for rank in (0, 1)]
    for number, batch in enumerate(whole[:-1]):
        assert halves[0][number] + halves[1][number] == batch[::2] + batch[1::2]


def test_epochs_differ_and_repeat() -> None:
    one = batches_of()
    first = list(one)
    one.sampler.set_epoch(1)
    assert list(one) != first
    one.sampler.set_epoch(0)
    assert list(one) == first


def loader(**options: int) -> ResumableLoader:
    return ResumableLoader(Numbers(), batches_of(**options), list, 0)


def test_it_goes_on_in_the_middle_of_a_window_and_with_other_batches_not_at_all() -> None:
    whole = list(loader())
    one = loader()
    begun = list(islice(one, 70))
    state = copy.deepcopy(one.state_dict())
    two = loader()
    two.load_state_dict(state)
    assert begun + list(two) == whole
    for changed in ({"batch_size": 8}, {"window": 40}):
        with pytest.raises(ValueError, match=r"sorted by length within 50 batches of 4 examples"):
            loader(**changed).load_state_dict(state)


def test_the_mixture_reads_lengths_of_prompt_and_answer(tmp_path: Path) -> None:
    rows = [f'{{"source": "{"word " * (n % 13 + 1)}", "target": "{"yes" * (n % 3 + 1)}"}}' for n in range(90)]
    (tmp_path / "t.train.jsonl").write_text("\n".join(rows) + "\n")
    options = {"tokenizer": "debug-tiny", "validation_examples": 2, "batch_size": 4, "seed": 1}
    padding = {}
    for window in (1, 10):
        data = FlanMixture([str(tmp_path / "t.train.jsonl")], length_window=window, **options)
        data.prepare_data()
        data.setup("fit")
        batches = list(data.train_dataloader())
        padding[window] = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
        examples = data.examples("train")
        expected = [len(example.prompt) + len(example.answer) for example in map(examples.__getitem__, range(88))]
        assert examples.lengths().tolist() == expected
    assert padding[10] < padding[1] / 3
    with pytest.raises(ValueError, match="Expected length_window to be 1 or more batches, but got 0"):
        FlanMixture([str(tmp_path / "t.train.jsonl")], length_window=0, **options)
