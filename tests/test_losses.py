"""The loss is the mean over examples of the mean over their answer tokens, and adds up over parts of a batch."""

from __future__ import annotations

import math

import pytest
import torch

from radargate_pl.losses import example_mean_cross_entropy, token_cross_entropy


def labelled(counts: list[int], vocabulary: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(counts)
    logits = 3 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    example = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    return logits, targets, example


def by_hand(logits: torch.Tensor, targets: torch.Tensor, example: torch.Tensor, num_examples: int) -> float:
    per_example: list[list[float]] = [[] for _ in range(num_examples)]
    for row, target, owner in zip(logits.tolist(), targets.tolist(), example.tolist(), strict=True):
        per_example[owner].append(math.log(sum(math.exp(z) for z in row)) - row[target])
    return sum(sum(losses) / len(losses) if losses else 0.0 for losses in per_example) / num_examples


@pytest.mark.parametrize("counts", [[1], [3, 1, 7], [2, 0, 5], [0, 4]])
def test_equals_hand_computation(counts: list[int]) -> None:
    logits, targets, example = labelled(counts)
    loss = example_mean_cross_entropy(logits, targets, example, len(counts))
    assert loss.item() == pytest.approx(by_hand(logits, targets, example, len(counts)), rel=1e-13)


def test_examples_weigh_the_same_whatever_their_length_and_order() -> None:
    logits, targets, example = labelled([1, 9])
    parts = [
        example_mean_cross_entropy(logits[example == i], targets[example == i], 0 * example[example == i], 1)
        for i in (0, 1)
    ]
    whole = example_mean_cross_entropy(logits, targets, example, 2)
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2, rtol=1e-14, atol=0)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    shuffled = example_mean_cross_entropy(logits[order], targets[order], example[order], 2)
    torch.testing.assert_close(whole, shuffled, rtol=1e-14, atol=0)
    assert (
        abs(whole.item() - token_cross_entropy(logits, targets).mean().item()) > 1e-3
    )  # a mean over tokens is another number


def test_a_batch_without_labels_costs_nothing_and_stays_differentiable() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = example_mean_cross_entropy(logits, nothing, nothing, 2)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropy_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, targets, example = labelled([4, 2])
    narrow = logits.to(dtype)
    loss = example_mean_cross_entropy(narrow, targets, example, 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(narrow.double(), targets, example, 2), rel=1e-6)


def test_gradcheck() -> None:
    logits, targets, example = labelled([2, 1, 3])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: example_mean_cross_entropy(z, targets, example, 3), (logits,))
    assert torch.autograd.gradcheck(lambda z: token_cross_entropy(z, targets), (logits,))
