"""Prototypes: the dense SVD and PEFT's own power iteration are the oracles."""

from __future__ import annotations

import pytest
import torch
from builders import bank_of, experts_of
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from reference import Expert
from reference_rules import dense_prototype

from radargate_pl.prototypes import leading_directions, prototypes


def dense(experts: dict[str, Expert]) -> tuple[torch.Tensor, torch.Tensor]:
    found = [dense_prototype(expert) for expert in experts.values()]
    return torch.stack([direction for direction, _ in found]), torch.stack([value for _, value in found])


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("width", "out"), [(6, 9), (2, 9), (17, 2)])  # also narrower than the ranks, which are ragged
def test_they_are_those_of_the_dense_svd(trainable: bool, width: int, out: int) -> None:
    experts = experts_of(5, in_features=width, out_features=out)
    directions, strengths = leading_directions(bank_of(experts, trainable=trainable))
    expected, values = dense(experts)
    torch.testing.assert_close(directions, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(strengths, values, rtol=1e-12, atol=0)
    assert torch.equal(prototypes(bank_of(experts)), directions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_float32_and_exact_for_the_experts_as_rounded(dtype: torch.dtype) -> None:
    experts = experts_of(4, in_features=40, out_features=30, dtype=dtype)
    directions, strengths = leading_directions(bank_of(experts))
    assert (directions.dtype, strengths.dtype) == (torch.float32, torch.float32)
    assert not directions.requires_grad
    wide = {n: Expert(e.lora_A.double(), e.lora_B.double(), e.scaling) for n, e in experts.items()}
    torch.testing.assert_close(directions.double(), dense(wide)[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(4), rtol=0, atol=1e-6)


def test_nearly_equal_singular_values_are_told_apart() -> None:
    """Where 15 power iterations are far from done: the second value is 0.999 of the first."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64)).Q.mT
    columns = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64)).Q
    expert = Expert(rows, columns * torch.tensor([0.999, 1.0, 0.5]), 2.0)
    (direction,), (strength,) = leading_directions(bank_of({"e": expert}))
    assert float((direction @ rows[1]).abs()) == pytest.approx(1.0, abs=1e-12)
    assert float(strength) == pytest.approx(2.0, abs=1e-12)


def test_the_largest_coordinate_is_positive() -> None:
    experts = experts_of(3)
    flipped = {n: Expert(-e.lora_A, e.lora_B, e.scaling) for n, e in experts.items()}
    directions = prototypes(bank_of(experts))
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(prototypes(bank_of(flipped)), directions, rtol=0, atol=1e-14)


def test_an_expert_without_an_update_has_a_zero_prototype() -> None:
    experts = experts_of(4)
    fresh = experts["e0"]
    experts["e0"] = Expert(fresh.lora_A, torch.zeros_like(fresh.lora_B), fresh.scaling)
    experts["e1"] = Expert(torch.zeros_like(experts["e1"].lora_A), experts["e1"].lora_B, 1.0)
    experts["e2"] = Expert(experts["e2"].lora_A, experts["e2"].lora_B, 0.0)
    vectors = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    A, B = torch.zeros(2, 6, dtype=torch.float64), torch.zeros(9, 2, dtype=torch.float64)
    A[0], B[:, 1] = vectors[:, 0], 1.0  # both are non-zero, their product is not
    experts["e3"] = Expert(A, B, 1.0)
    directions, strengths = leading_directions(bank_of(experts))
    assert torch.equal(directions, torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(strengths, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_they_are_pefts_up_to_sign_where_its_power_iteration_converges(seed: int) -> None:
    """PEFT's error is (s2 / s1)^30; the experts here have a second value of at most half the first: 1e-9."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.linalg.qr(torch.randn(24, 4, generator=generator)).Q.mT
    B = torch.linalg.qr(torch.randn(20, 4, generator=generator)).Q * torch.tensor([0.4, 1.0, 0.5, 0.1])
    config = ArrowConfig(rng_seed=seed)
    config.task_adapter_names = ["e"]  # as create_arrow_model does
    theirs = ArrowLoraLinearLayer(24, config).top_right_singular_vec_from_BA(A, B)
    (ours,) = prototypes(bank_of({"e": Expert(A, B, 2.0)}))
    assert float((ours @ theirs).abs()) == pytest.approx(1.0, abs=2e-7)
    torch.testing.assert_close(ours * (ours @ theirs).sign(), theirs, rtol=0, atol=5e-7)
