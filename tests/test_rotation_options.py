"""Per-expert angles, a whole angle matrix, bounded angles, learned temperatures and scales, against dense oracles."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from builders import IN, OUT, assert_near, experts_of, layer_of, randomise, recorded, site_of
from gate_cases import COUNT, TOKENS, Case, build, inputs
from reference import Expert, rotate_rows
from reference_rotations import angle_matrix, dense_rotated_layer
from torch import Tensor

from radargate_pl.gates import RadarGate, RotationGate, StretchGate
from radargate_pl.moe import MoELinear
from radargate_pl.ops import rotate
from radargate_pl.rotations import RadarRotation

ROTATIONS = [
    {"rotation_rank": rank, "rotation_sharing": sharing, "angle_norm": norm, "angle_bound": bound}
    for rank, sharing in ((3, "per_expert"), ("full", "shared"), (3, "shared"))
    for norm in ("none", "rms")
    for bound in (None, 0.4)
]
LEARNED = [
    {"temperature": "learned"},
    {"output_scale": "learned"},
    {"output_scale": 2.5},
    {"temperature": "learned", "output_scale": "learned"},
]


def compare(layer: MoELinear, x: Tensor, experts: dict[str, Expert], gate: str, **options: object) -> None:
    """Outputs, and gradients of x and of every parameter of the gate, in float64."""
    x = x.requires_grad_()
    y, record = recorded(layer, x)
    expected = dense_rotated_layer(x, list(experts.values()), dict(layer.named_parameters()), gate=gate, **options)
    assert_near(y, expected.output, 1e-12, "output")
    if expected.logits is not None:
        assert_near(record.logits, expected.logits, 1e-12, "logits")
    if expected.angles is not None:
        indices = torch.arange(COUNT).expand(TOKENS, -1) if record.indices is None else record.indices
        wanted = torch.stack([expected.angles[t, indices[t]] for t in range(TOKENS)])
        assert_near(record.angles, wanted, 1e-10, "angles")
    parameters = dict(layer.gate.named_parameters())
    assert parameters
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    leaves = (x, *parameters.values())
    ours = torch.autograd.grad((y * direction).sum(), leaves)
    wanted = torch.autograd.grad((expected.output * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    for name, got, want in zip(["x", *parameters], ours, wanted, strict=True):
        assert_near(got, want, 1e-10, f"gradient of {name}")
    if options.get("top_k", 2) > 1:  # at 1 a renormalised weight says nothing to the scorer
        assert all(float(gradient.abs().max()) > 0 for gradient in ours)


@pytest.mark.parametrize("options", ROTATIONS, ids=str)
@pytest.mark.parametrize("gate", [RadarGate, RotationGate])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
def test_rotations_equal_the_dense_reference(gate: type, options: dict, top_k: int) -> None:
    experts, options = experts_of(COUNT), {"top_k": top_k, **options}
    compare(build(Case(gate, options), experts), inputs(), experts, gate.__name__, **options)


@pytest.mark.parametrize("options", LEARNED, ids=str)
@pytest.mark.parametrize("gate", [StretchGate, RadarGate])
@pytest.mark.parametrize("renormalize", ["auto", "always", "never"])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
def test_learned_scalars_equal_the_dense_reference(gate: type, options: dict, renormalize: str, top_k: int) -> None:
    experts, options = experts_of(COUNT), {"top_k": top_k, "renormalize": renormalize, **options}
    compare(build(Case(gate, options), experts), inputs(), experts, gate.__name__, **options)


@pytest.mark.parametrize("options", ROTATIONS, ids=str)
@pytest.mark.parametrize("out_features", [1, 6, 7])
def test_the_function_by_hand_is_the_plain_formula(options: dict, out_features: int) -> None:
    rotation = RadarRotation(site_of(out_features), **options).double()
    randomise(rotation)
    generator = torch.Generator().manual_seed(4)
    v, total, direction = torch.randn(3, 2, 5, out_features, dtype=torch.float64, generator=generator)
    leaves = (v.requires_grad_(), total.requires_grad_(), *rotation.parameters())
    for expert in (1, torch.randint(3, (2, 5), generator=generator)):
        rotated, angles = rotation.outputs(v, total, expert)
        plain_angles = rotation.angles(v, total, expert)
        plain = rotate(v, plain_angles)
        torch.testing.assert_close(rotated, plain, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(angles, plain_angles.detach(), rtol=1e-11, atol=1e-12)
        options_ = {"allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad((rotated * direction).sum(), leaves, **options_)
        wanted = torch.autograd.grad((plain * direction).sum(), leaves, **options_)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", ROTATIONS, ids=str)
def test_gradients_are_those_of_finite_differences(options: dict) -> None:
    rotation = RadarRotation(site_of(5), **options).double()
    randomise(rotation)
    v, total = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    leaves = (v.requires_grad_(), total.requires_grad_(), *rotation.parameters())
    expert = torch.tensor([2, 0, 2])
    assert torch.autograd.gradcheck(lambda a, b, *_: rotation.outputs(a, b, expert)[0], leaves)


def test_shared_factors_repeated_for_every_expert_are_the_shared_rotation() -> None:
    experts = experts_of(COUNT)
    shared = build(Case(RadarGate, {"rotation_rank": 3}), experts)
    own = build(Case(RadarGate, {"rotation_rank": 3, "rotation_sharing": "per_expert"}), experts)
    state = shared.gate.state_dict()
    for name in ("rotation.P", "rotation.Q"):
        state[name] = state[name].expand(COUNT, -1, -1)
    own.gate.load_state_dict(state)
    assert_near(own(inputs()), shared(inputs()), 1e-13, "output")


def test_an_experts_own_factors_turn_only_that_expert() -> None:
    experts = experts_of(COUNT)
    layer = build(Case(RotationGate, {"rotation_rank": 3, "rotation_sharing": "per_expert", "top_k": COUNT}), experts)
    before = recorded(layer, inputs())[1].angles
    with torch.no_grad():
        layer.gate.rotation.Q[2] *= 2
    after = recorded(layer, inputs())[1].angles
    assert_near(after[:, 2], 2 * before[:, 2], 1e-12, "own")
    assert torch.equal(after[:, [0, 1, 3]], before[:, [0, 1, 3]])


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"rotation_rank": 2}, {"P": (9, 2), "Q": (2, 4)}),
        ({"rotation_rank": 2, "rotation_sharing": "per_expert"}, {"P": (3, 9, 2), "Q": (3, 2, 4)}),
        ({"rotation_rank": "full"}, {"theta": (9, 4)}),
    ],
    ids=str,
)
def test_a_fresh_rotation_turns_nothing_but_learns_at_once(options: dict, shapes: dict) -> None:
    layer = layer_of(experts_of(3, dtype=torch.float32), partial(RadarGate, **options))
    rotation = layer.gate.rotation
    assert {name: tuple(p.shape) for name, p in rotation.named_parameters()} == shapes
    assert {p.dtype for p in rotation.parameters()} == {torch.float32}
    x = torch.randn(20, IN)
    y, record = recorded(layer, x)
    assert record.angles.abs().max() == 0
    (y * torch.randn(20, OUT)).sum().backward()
    started = rotation.theta if "theta" in shapes else rotation.Q
    assert (started.detach() == 0).all()
    assert started.grad.abs().max() > 1e-4  # zero start, nonzero gradient


def test_a_fresh_per_expert_start_is_bounded_and_differs_between_experts() -> None:
    rotation = RadarRotation(site_of(64), rotation_rank=4, rotation_sharing="per_expert")
    assert rotation.P.abs().max() <= 64**-0.5
    assert not torch.equal(rotation.P[0], rotation.P[1])


def test_bounded_angles_stay_below_the_bound_and_small_ones_are_untouched() -> None:
    experts = experts_of(COUNT)
    free, bounded = (build(Case(RadarGate, {"angle_bound": bound}), experts) for bound in (None, 0.5))
    randomise(free.gate, scale=20.0)
    bounded.gate.load_state_dict(free.gate.state_dict())
    assert recorded(free, inputs())[1].angles.abs().max() > 10
    turned = recorded(bounded, inputs())[1].angles.abs().max()
    assert 0.49 < turned <= 0.5
    with torch.no_grad():
        free.gate.rotation.Q *= 1e-9
    bounded.gate.load_state_dict(free.gate.state_dict())
    assert_near(recorded(bounded, inputs())[1].angles, recorded(free, inputs())[1].angles, 1e-6, "small angles")


@pytest.mark.parametrize("options", [o for o in ROTATIONS if o["angle_norm"] == "rms"], ids=str)
@pytest.mark.parametrize("kind", ["one", "identical", "zero", "opposite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_experts_give_no_nan(options: dict, kind: str, dtype: torch.dtype) -> None:
    first = experts_of(1, dtype=dtype, ranks=(3,))["e0"]
    signs = {"one": [1], "identical": [1, 1, 1], "zero": [0, 0, 0], "opposite": [1, -1, 1, -1]}[kind]
    experts = {f"e{i}": first._replace(lora_B=first.lora_B * sign) for i, sign in enumerate(signs)}
    for top_k in {1, min(2, len(signs)), len(signs)}:
        scalars = {"temperature": "learned", "output_scale": "learned"}
        layer = layer_of(experts, partial(RadarGate, top_k=top_k, **options, **scalars))
        randomise(layer.gate)
        x = inputs(dtype=dtype).requires_grad_()
        y = layer(x)
        (y.float() * torch.randn(y.shape)).sum().backward()
        assert y.isfinite().all()
        assert all(tensor.grad.isfinite().all() for tensor in (x, *layer.gate.parameters()))


def test_the_rotation_of_one_expert_is_its_own_matrix() -> None:
    """By hand, outside any layer: expert 1 of three, one token."""
    rotation = RadarRotation(site_of(4), rotation_rank=2, rotation_sharing="per_expert", angle_norm="none").double()
    randomise(rotation)
    v, total = torch.randn(2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = {f"gate.rotation.{name}": p for name, p in rotation.named_parameters()}
    angles = (v * (total - v)) @ angle_matrix(state, 1, 2, "per_expert")
    for expert in (1, torch.tensor([1])):
        rotated, found = rotation.outputs(v, total, expert)
        assert_near(found, angles, 1e-13, "angles")
        assert_near(rotated, rotate_rows(v, angles), 1e-13, "rotated")


@pytest.mark.parametrize("gate", [StretchGate, RadarGate])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
def test_learned_scalars_start_neutral_bit_for_bit(gate: type, top_k: int) -> None:
    experts = experts_of(COUNT, dtype=torch.float32)
    options = {"top_k": top_k, "temperature": "learned", "output_scale": "learned"}
    plain, learned = layer_of(experts, partial(gate, top_k=top_k)), layer_of(experts, partial(gate, **options))
    names = {name for name, _ in learned.gate.named_parameters()} - {name for name, _ in plain.gate.named_parameters()}
    assert names == {"log_temperature", "output_scale_weight"}
    assert {tuple(dict(learned.gate.named_parameters())[name].shape) for name in names} == {(1,)}
    assert torch.equal(plain(inputs(dtype=torch.float32)), learned(inputs(dtype=torch.float32)))


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_scale_changes_the_length_of_the_update_and_not_its_direction(top_k: int) -> None:
    layer = build(Case(RadarGate, {"top_k": top_k, "output_scale": "learned"}), experts_of(COUNT))
    updates = []
    for scale in (1.0, 3.0):
        torch.nn.init.constant_(layer.gate.output_scale_weight, scale)
        updates.append(layer(inputs()) - layer.base_layer(inputs()))
    assert_near(updates[1], 3 * updates[0], 1e-12, "update")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(RadarGate, rotation_sharing="x"), "rotation_sharing to be 'shared' or 'per_expert', but got 'x'"),
        (
            partial(RadarGate, rotation_rank="full", rotation_sharing="per_expert"),
            "under rotation_sharing 'per_expert'",
        ),
        (partial(RotationGate, rotation_rank="half"), "rotation_rank to be at least 1, or 'full', but got 'half'"),
        (partial(RadarGate, angle_bound=0.0), "angle_bound to be positive and finite"),
        (partial(RotationGate, angle_bound=math.inf), "angle_bound to be positive and finite"),
        (partial(StretchGate, temperature="taught"), "temperature to be positive and finite, but got taught"),
        (partial(RadarGate, output_scale=-1.0), "output_scale to be positive and finite, but got -1"),
        (partial(StretchGate, output_scale=math.nan), "output_scale to be positive and finite, but got nan"),
    ],
)
def test_bad_arguments_are_named(make: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(site_of())
