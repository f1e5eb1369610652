"""What a bank remembers of its frozen experts (Gram blocks) must never outlive the weights it came from."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import numpy
import pytest
import torch
from builders import IN, OUT, assert_near, bank_of, experts_of, layer_of, randomise
from reference import Expert, expert_outputs
from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gates import RadarGate
from radargate_pl.remembered import Remembered

TOKENS = 6
COUNT = 4


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_remembered_of_frozen_experts_follows_new_weights(assign: bool) -> None:
    experts, others = experts_of(COUNT), experts_of(COUNT, seed=5)
    bank, fresh = bank_of(experts), bank_of(others)
    latents = fresh.project(tokens())
    bank.norms(latents)  # may remember the Gram blocks of the first weights
    bank.load_state_dict(fresh.state_dict(), assign=assign)
    torch.testing.assert_close(bank.norms(latents), fresh.norms(latents), rtol=1e-14, atol=0)


def test_what_is_remembered_under_inference_mode_can_be_trained_through() -> None:
    """Lightning validates before it trains, in inference mode."""
    bank, theta = bank_of(experts_of(COUNT)), torch.randn(COUNT, COUNT * OUT, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        bank.norms(bank.project(tokens()))
    x = tokens().requires_grad_()
    bank.layer_norm_logits(bank.project(x), theta).sum().backward()
    assert x.grad.isfinite().all()


def test_a_bank_made_in_inference_mode_works_there() -> None:
    with torch.inference_mode():
        bank = bank_of(experts_of(COUNT))
        norms = bank.norms(bank.project(tokens()))
    expected = torch.stack(expert_outputs(tokens(), list(experts_of(COUNT).values())), dim=1).norm(dim=-1)
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)


def test_copies_and_dtype_changes_forget_what_was_remembered() -> None:
    bank = bank_of(experts_of(COUNT, dtype=torch.float32))
    first = bank.norms(bank.project(tokens(torch.float32)))
    wide = copy.deepcopy(bank).double()
    ours = wide.norms(wide.project(tokens()))
    assert ours.dtype == torch.float64
    expected = torch.stack(
        expert_outputs(
            tokens(), [Expert(a.double(), b.double(), s) for a, b, s in experts_of(COUNT, dtype=torch.float32).values()]
        ),
        1,
    )
    torch.testing.assert_close(ours, expected.norm(dim=-1), rtol=1e-13, atol=0)
    assert torch.equal(bank.norms(bank.project(tokens(torch.float32))), first)


def by_scaling(bank: ExpertBank) -> None:
    bank.scaling = tuple(3 * factor for factor in bank.scaling)


def by_new_memory(bank: ExpertBank) -> None:
    bank.lora_A.data = 2 * bank.lora_A
    bank.lora_B.data = -3 * bank.lora_B


CHANGES = [by_scaling, by_new_memory]


def test_memory_that_was_remembered_from_is_held_until_the_next_look() -> None:
    """An address tells memory apart only while nothing else can come to lie there."""
    array, remembered = numpy.zeros(4, numpy.float32), Remembered()
    weight, memory = torch.from_numpy(array), weakref.ref(array)
    del array
    assert remembered.get([weight], weight.max) == 0
    weight.data = torch.ones(4)
    assert memory() is not None
    assert remembered.get([weight], weight.max) == 1
    assert memory() is None


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_what_is_remembered_follows_changes_that_count_no_version(change: Callable, in_blocks: bool) -> None:
    bank = bank_of(experts_of(COUNT))
    bank.in_blocks = in_blocks
    theta = torch.randn(COUNT, COUNT * OUT, dtype=torch.float64)
    for step in (None, change):
        if step is not None:
            step(bank)
        found, fresh = (
            [each.norms(latents), each.layer_norm_logits(latents, theta), each.total(latents)]
            for each in (bank, copy.deepcopy(bank))
            for latents in [each.project(tokens())]
        )
        for ours, expected in zip(found, fresh, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("count", [COUNT, 40])
def test_a_mixture_follows_changes_that_count_no_version(change: Callable, count: int) -> None:
    """From latents and, with many experts, from the input."""
    layer = layer_of(experts_of(count, dtype=torch.float32), RadarGate)
    randomise(layer.gate)
    x = tokens(torch.float32).requires_grad_()
    found = []
    layer(x)
    change(layer.bank)
    for mixture in ("auto", "plain"):
        layer.mixture = mixture
        found.append([layer(x), *torch.autograd.grad(layer(x).sin().sum(), [x, *layer.gate.parameters()])])
    for ours, plain in zip(*found, strict=True):
        assert_near(ours, plain, 2e-4, f"{tuple(plain.shape)}")
