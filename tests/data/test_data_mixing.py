"""FLAN's mixing: exact counts, and an order that depends on seed and epoch alone."""

import itertools
import math
from collections import Counter

import pytest

from radargate_pl.data.mixing import MixtureSampler, epoch_counts, mixing_rates

SIZES = {"big": 9000, "middle": 1000, "small": 50}


def test_proportional_with_cap_is_min_of_size_and_cap():
    assert epoch_counts(SIZES) == {"big": 3000, "middle": 1000, "small": 50}
    assert epoch_counts(SIZES, cap=100) == {"big": 100, "middle": 100, "small": 50}


def test_temperature_flattens_and_keeps_the_length():
    # rates: square roots of 100, 100, 25 -> 10, 10, 5 of 25; N = 225
    assert epoch_counts({"a": 500, "b": 100, "c": 25}, cap=100, temperature=2) == {"a": 90, "b": 90, "c": 45}


def test_equal_divides_the_sum_and_gives_the_rest_to_the_first():
    assert epoch_counts({"a": 10, "b": 3, "c": 1}, "equal") == {"a": 5, "b": 5, "c": 4}


def test_fixed_weights():
    counts = epoch_counts({"a": 50, "b": 50}, {"b": 3, "a": 1})
    assert counts == {"a": 25, "b": 75}
    assert epoch_counts({"a": 5, "b": 5}, {"a": 1, "b": 2}) == {"a": 3, "b": 7}  # 3.33 and 6.67: the rest goes to b
    assert epoch_counts({"a": 5, "b": 5}, {"a": 1, "b": 0}) == {"a": 10, "b": 0}


@pytest.mark.parametrize("sizes", list(itertools.product([1, 7, 100], [3, 64], [2, 3001])))
@pytest.mark.parametrize("mixing", ["proportional", "equal", {"a": 0.2, "b": 1.7, "c": 3.1}])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_counts_add_up_and_none_is_off_by_one(sizes, mixing, temperature):
    sizes = dict(zip("abc", sizes, strict=True))
    counts = epoch_counts(sizes, mixing, 3000, temperature)
    rates = mixing_rates(sizes, mixing, 3000, temperature)
    total = sum(min(size, 3000) if mixing == "proportional" else size for size in sizes.values())
    assert sum(counts.values()) == total
    for name, count in counts.items():
        assert abs(count - total * rates[name] / sum(rates.values())) < 1


def sampler(sizes=None, seed=0, mixing="equal", **options):
    sizes = sizes or {"a": 5, "b": 7, "c": 2}
    return MixtureSampler(sizes, epoch_counts(sizes, mixing, **options), seed)


def test_exact_order_for_a_seed():
    # Recorded from this implementation: runs of users must not change order under an update.
    assert sampler().order(0).tolist() == [9, 4, 13, 5, 0, 3, 2, 12, 12, 8, 1, 13, 11, 6]
    assert sampler().order(1).tolist() == [12, 7, 10, 0, 2, 13, 3, 6, 8, 11, 1, 4, 13, 12]


def test_order_is_a_function_of_seed_and_epoch_alone():
    first = sampler()
    first.order(7)
    assert first.order(3).equal(sampler().order(3))
    assert not first.order(0).equal(first.order(1))
    assert not first.order(0).equal(sampler(seed=1).order(0))


def test_epochs_go_through_every_example_before_any_comes_again():
    mixture = sampler({"a": 10, "b": 4}, mixing="equal")  # 7 of each an epoch
    seen = {"a": [], "b": []}
    for epoch in range(4):
        for index in mixture.order(epoch).tolist():
            seen["a" if index < 10 else "b"].append(index)
    assert [len(indices) for indices in seen.values()] == [28, 28]
    assert sorted(seen["a"][:10]) == sorted(seen["a"][10:20]) == list(range(10))
    for start in range(0, 28, 4):
        assert sorted(seen["b"][start : start + 4]) == [10, 11, 12, 13]


def test_capped_task_rotates_over_the_epochs():
    mixture = sampler({"a": 6, "b": 2}, mixing="proportional", cap=2)
    seen = [index for epoch in range(3) for index in mixture.order(epoch).tolist() if index < 6]
    assert sorted(seen) == list(range(6))


def test_a_tasks_row_does_not_depend_on_the_others():
    alone, together = sampler({"a": 6}), sampler({"b": 6, "a": 6})
    assert alone.order(2).tolist() == [index - 6 for index in together.order(2).tolist() if index >= 6]


def test_iteration_follows_the_epoch():
    mixture = sampler()
    mixture.set_epoch(1)
    assert list(mixture) == mixture.order(1).tolist()
    assert len(mixture) == 14


def test_tasks_are_spread_over_the_epoch():
    sizes = {"a": 1000, "b": 1000}
    first_half = Counter(index // 1000 for index in sampler(sizes).order(0).tolist()[:1000])
    assert abs(first_half[0] - 500) < 3 * math.sqrt(1000 / 8)  # 3 sigma of the hypergeometric distribution


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cap": 0}, "mixing_cap to be 1 or more, but got 0"),
        ({"temperature": 0.0}, r"mixing_temperature to be above 0, but got 0\.0"),
        ({"mixing": "even"}, "mixing to be proportional, equal or {task: weight}, but got 'even'"),
        ({"mixing": {"big": 1.0, "tiny": 1.0}}, "it lacks middle, small and it has unknown tiny"),
        ({"mixing": {"big": -1.0, "middle": 1, "small": 1}}, "weights of mixing to be 0 or more"),
        ({"mixing": {"big": 0.0, "middle": 0, "small": 0}}, "not all 0"),
        ({"mixing": {"big": math.nan, "middle": 1, "small": 1}}, "weights of mixing to be 0 or more"),
    ],
)
def test_faults(options, reason):
    with pytest.raises(ValueError, match=reason):
        epoch_counts(SIZES, **options)
