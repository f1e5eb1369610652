"""RadarRotation against the dense formula, and where it must do nothing."""

from __future__ import annotations

import pytest
import torch
from builders import randomise, site_of
from reference import plane_angles, rotate_rows
from torch import Tensor

from radargate_pl.rotations import NoRotation, RadarRotation


def rotation_of(width: int, norm: str, rank: int = 3, seed: int = 0) -> RadarRotation:
    rotation = RadarRotation(site_of(width), rotation_rank=rank, angle_norm=norm).double()
    randomise(rotation, seed=seed)
    return rotation


def vectors(width: int, tokens: int = 5, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v, others = torch.randn(2, tokens, width, generator=generator, dtype=torch.float64)
    return v, v + others


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("width", [1, 2, 7, 12])
def test_outputs_and_gradients_equal_the_dense_formula(width: int, norm: str) -> None:
    rotation = rotation_of(width, norm)
    v, total = (t.requires_grad_() for t in vectors(width))
    leaves = (v, total, rotation.P, rotation.Q)
    rotated, angles = rotation.outputs(v, total, 0)
    expected_angles = plane_angles(v, total - v, rotation.P, rotation.Q, norm)
    expected = rotate_rows(v, expected_angles)
    torch.testing.assert_close(angles, expected_angles, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(rotated, expected, rtol=1e-13, atol=1e-14)
    direction = torch.randn(rotated.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad((rotated * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    dense = torch.autograd.grad((expected * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    for ours_, dense_ in zip(ours, dense, strict=True):
        torch.testing.assert_close(ours_, dense_, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_gradcheck(norm: str) -> None:
    rotation = rotation_of(5, norm)
    v, total = (t[:2].clone().requires_grad_() for t in vectors(5))
    assert torch.autograd.gradcheck(lambda a, b, *_: rotation.outputs(a, b, 0), (v, total, rotation.P, rotation.Q))


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_norms_are_kept(norm: str) -> None:
    v, total = vectors(11)
    rotated, _ = rotation_of(11, norm).outputs(v, 50 * total, 0)
    torch.testing.assert_close(rotated.norm(dim=-1), v.norm(dim=-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_a_fresh_rotation_turns_nothing_but_can_learn(norm: str) -> None:
    torch.manual_seed(0)
    rotation = RadarRotation(site_of(10), rotation_rank=4, angle_norm=norm)
    assert rotation.P.abs().max() <= 10**-0.5
    assert rotation.P.std() > 0.1
    v, total = (t.float() for t in vectors(10))
    rotated, angles = rotation.outputs(v, total, 0)
    assert torch.equal(rotated, v)
    assert angles.abs().max() == 0
    rotated.square().sum().backward()  # a norm: rotation cannot change it
    assert rotation.Q.grad.abs().max() < 1e-5
    rotation.zero_grad()
    (rotation.outputs(v, total, 0)[0] * torch.randn(5, 10)).sum().backward()
    assert rotation.Q.grad.abs().max() > 1e-3
    assert rotation.P.grad.abs().max() == 0  # only on the first step, as in LoRA


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_without_other_experts_nothing_turns_and_gradients_are_finite(norm: str) -> None:
    rotation = rotation_of(8, norm)
    v = vectors(8)[0].requires_grad_()
    rotated, angles = rotation.outputs(v, v, 0)
    assert angles.abs().max() == 0
    torch.testing.assert_close(rotated, v, rtol=0, atol=0)
    rotated.sin().sum().backward()
    assert all(t.grad.isfinite().all() for t in (v, rotation.P, rotation.Q))


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_zero_outputs_give_finite_values_and_gradients(norm: str) -> None:
    rotation = rotation_of(8, norm)
    zero = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    rotated, _ = rotation.outputs(zero, zero * 2, 0)
    (rotated * torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    assert torch.equal(rotated, torch.zeros_like(rotated))
    assert all(t.grad.isfinite().all() for t in (zero, rotation.P, rotation.Q))


def test_rms_angles_do_not_depend_on_the_size_of_the_outputs_but_raw_ones_do() -> None:
    v, total = vectors(8)
    scale_free, raw = rotation_of(8, "rms"), rotation_of(8, "none")
    torch.testing.assert_close(
        scale_free.outputs(10 * v, 10 * total, 0)[1], scale_free.outputs(v, total, 0)[1], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        raw.outputs(10 * v, 10 * total, 0)[1], 100 * raw.outputs(v, total, 0)[1], rtol=1e-12, atol=0
    )


def test_no_rotation_returns_its_input() -> None:
    v, total = vectors(6)
    rotated, angles = NoRotation(site_of(6)).outputs(v, total, 0)
    assert rotated is v
    assert angles is None
    assert not NoRotation.acts_on_outputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation_rank": 0}, r"rotation_rank to be at least 1, or 'full', but got 0"),
        ({"angle_norm": "l2"}, r"angle_norm to be 'none' or 'rms', but got 'l2'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadarRotation(site_of(6), **arguments)


def test_shapes_of_the_angle_factors_with_an_odd_width() -> None:
    rotation = RadarRotation(site_of(9), rotation_rank=2)
    assert rotation.P.shape == (9, 2)
    assert rotation.Q.shape == (2, 4)
    assert {name for name, _ in rotation.named_parameters()} == {"P", "Q"}
