"""What a bank remembers of its frozen experts (Gram blocks) must never outlive the weights it came from."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import IN, OUT, bank_of, experts_of
from reference import Expert, expert_outputs
from torch import Tensor

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
