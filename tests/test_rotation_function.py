"""The rotation written by hand, forward and backward, against the same formulas in plain operations."""

import pytest
import torch
from builders import site_of

from radargate_pl.ops import rotate
from radargate_pl.rotation_function import RadarRotationFunction
from radargate_pl.rotations import RadarRotation


def make(out_features, norm, shape=(2, 5)):
    torch.manual_seed(out_features)
    rotation = RadarRotation(site_of(out_features), rotation_rank=3, angle_norm=norm).double()
    torch.nn.init.normal_(rotation.Q)
    v = torch.randn(*shape, out_features, dtype=torch.float64, requires_grad=True)
    total = torch.randn(*shape, out_features, dtype=torch.float64, requires_grad=True)
    return rotation, v, total


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("out_features", [6, 7])
def test_outputs_and_gradients_are_those_of_the_plain_formulas(out_features, norm):
    rotation, v, total = make(out_features, norm)
    inputs = [v, total, rotation.P, rotation.Q]
    rotated, angles = rotation.outputs(v, total, 0)
    plain_angles = rotation.angles(v, total)
    plain = rotate(v, plain_angles)
    torch.testing.assert_close(rotated, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(angles, plain_angles.detach(), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(rotated)
    found = torch.autograd.grad((rotated * weights).sum(), inputs)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("out_features", [4, 5])
def test_gradients_are_those_of_finite_differences(out_features, is_normed):
    rotation, v, total = make(out_features, "rms", shape=(3,))
    arguments = (v, total, rotation.P, rotation.Q)
    function = lambda *args: RadarRotationFunction.apply(*args, is_normed)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, arguments)


def test_a_gradient_that_is_not_contiguous_and_a_single_vector():
    rotation, v, total = make(6, "rms", shape=(4, 3))
    rotated, _ = rotation.outputs(v.transpose(0, 1), total.transpose(0, 1), 0)
    rotated.transpose(0, 1).square().sum().backward()
    # Rotations keep norms: the gradient of |v|^2 is 2 v, whatever the angles.
    torch.testing.assert_close(v.grad, 2 * v.detach(), rtol=1e-11, atol=1e-11)
    single, angles = rotation.outputs(v.detach()[0, 0], total.detach()[0, 0], 0)
    assert single.shape == (6,)
    assert angles.shape == (3,)
