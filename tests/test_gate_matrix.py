"""One matrix over all gates: shapes, dtypes, state, printing, learning; TaskGate's ids; bad arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from builders import IN, NEEDED, OUT, assert_near, experts_of, layer_of, randomise
from gate_cases import COUNT
from reference import Expert

from radargate_pl.arguments import line_of, spec_of
from radargate_pl.class_specs import factory_of
from radargate_pl.gates import (
    ALL_GATES,
    Context,
    ExpertChoiceGate,
    FixedGate,
    LoraHub,
    NexusGate,
    RadarGate,
    RotationGate,
    RotMoLEGate,
    Site,
    StretchGate,
    TaskGate,
    TutelGate,
)
from radargate_pl.moe import MoELinear
from radargate_pl.rotations import Rotation


def any_gate(gate: type, experts: Mapping[str, Expert], expert_ids: list[int], seed: int = 3) -> MoELinear:
    context = Context()
    context.replace(expert=torch.tensor(expert_ids))
    layer = layer_of(experts, partial(gate, **NEEDED.get(gate, {})), context=context)
    randomise(layer.gate, seed)
    return layer


@pytest.mark.parametrize("gate", ALL_GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (3, 7)], ids=str)
def test_every_gate_keeps_shape_and_dtype(gate: type, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    layer = any_gate(gate, experts_of(3, dtype=dtype), [0, 2, -1][: shape[0]])
    x = torch.randn(*shape, IN).to(dtype)
    y = layer.eval()(x)
    assert y.shape == (*shape, OUT)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x))
    for row in range(shape[0]):  # a token's result depends on no other token
        layer.context.replace(expert=torch.tensor([[0, 2, -1][row]]))
        alone = layer(x[row : row + 1])
        assert_near(
            alone, y[row : row + 1], {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype], "row"
        )


@pytest.mark.parametrize("gate", ALL_GATES)
def test_every_gate_takes_inputs_that_are_not_contiguous(gate: type) -> None:
    layer = any_gate(gate, experts_of(3), [0, 2])
    layer.gate.double()
    x = torch.randn(7, 2, 2 * IN, dtype=torch.float64).transpose(0, 1)[..., ::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ALL_GATES)
def test_every_gates_state_is_what_the_format_says_and_loads_back(gate: type) -> None:
    first, second = (any_gate(gate, experts_of(3, dtype=torch.float32), [0], seed) for seed in (1, 2))
    rotation = {"gate.rotation.P", "gate.rotation.Q"}
    keys = {
        RadarGate: rotation | {"gate.scorer.weight"},
        RotationGate: rotation,
        RotMoLEGate: {"gate.scorer.weight", "gate.rotation.weight"},
        StretchGate: {"gate.scorer.weight"},
        TutelGate: {"gate.scorer.weight"},
        NexusGate: {"gate.projection.up", "gate.projection.down"},
        ExpertChoiceGate: {"gate.scorer.weight"},
        LoraHub: {"gate.weights"},
    }.get(gate, set())
    fixed = {NexusGate: {"gate.domain_embeddings"}}.get(gate, set())
    assert {key for key in first.state_dict() if key.startswith("gate.")} == keys | fixed
    assert {name for name, p in first.named_parameters() if p.requires_grad} == keys
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, IN)
    assert torch.equal(first(x[:1]), second(x[:1]))


@pytest.mark.parametrize("gate", ALL_GATES)
def test_every_gate_prints_its_arguments(gate: type) -> None:
    layer = any_gate(gate, experts_of(3), [0])
    arguments = layer.gate.arguments()
    line = layer.gate.line()
    assert line.startswith(f"{gate.__name__}(")
    shown = {name: line_of(value) if isinstance(value, Rotation) else value for name, value in arguments.items()}
    assert all(f"{name}={value}" in line for name, value in shown.items())
    rebuilt = factory_of(spec_of(layer.gate))(layer.gate.site)
    assert rebuilt.line() == line
    if gate is RadarGate:
        assert arguments == {
            "top_k": 2,
            "scorer": "x",
            "temperature": 1.0,
            "renormalize": "auto",
            "output_scale": 1.0,
            "rotation_rank": 8,
            "rotation_sharing": "shared",
            "angle_norm": "rms",
            "angle_bound": None,
        }
    if gate is StretchGate:
        assert "rotation" not in line


@pytest.mark.parametrize("gate", [StretchGate, RadarGate, RotationGate, RotMoLEGate])
def test_every_gate_parameter_learns_from_the_published_start(gate: type) -> None:
    torch.manual_seed(0)
    layer = layer_of(experts_of(3, dtype=torch.float32), gate)
    optimizer = torch.optim.SGD(layer.gate.parameters(), lr=0.1)
    touched = {name: False for name, _ in layer.gate.named_parameters()}
    x, direction = torch.randn(20, IN), torch.randn(20, OUT)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) * direction).sum().backward()
        touched = {n: touched[n] or bool((p.grad != 0).any()) for n, p in layer.gate.named_parameters()}
        optimizer.step()
    assert touched
    assert all(touched.values())


def test_the_scorers_start_uniform_within_one_over_root_fan_in() -> None:
    torch.manual_seed(0)
    site = Site("layer", 64, 48, 2, ("a", "b", "c"), "decoder")
    by_input, by_experts = StretchGate(site).scorer.weight, StretchGate(site, scorer="experts").scorer.weight
    for weight, fan_in in ((by_input, 64), (by_experts, 3 * 48)):
        assert weight.shape == (3, fan_in)
        assert weight.dtype == torch.float32
        assert weight.abs().max() <= fan_in**-0.5
        assert weight.std().item() == pytest.approx(fan_in**-0.5 / math.sqrt(3), rel=0.15)


@pytest.mark.parametrize("gate", [StretchGate, RadarGate])
def test_gates_start_in_float32_whatever_the_default_dtype(gate: type) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = gate(Site("layer", 8, 6, 2, ("a", "b"), "decoder"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in built.parameters()} == {torch.float32}


def test_task_gate_gives_each_row_its_own_expert_and_minus_one_nothing() -> None:
    experts = experts_of(COUNT)
    library = ("nobody", *experts)
    context = Context()
    layer, x = layer_of(experts, TaskGate, library=library, context=context), torch.randn(5, 3, IN, dtype=torch.float64)
    ids = [library.index("e2"), -1, library.index("e0"), library.index("nobody"), library.index("e2")]
    context.replace(expert=torch.tensor(ids))
    base = layer.base_layer(x)
    y = layer(x)
    for row, name in enumerate(["e2", None, "e0", None, "e2"]):
        expected = base[row]
        if name is None:
            assert torch.equal(y[row], expected)
            continue
        e = experts[name]
        expected = expected + e.scaling * (x[row] @ e.lora_A.T @ e.lora_B.T)
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-13)
    context.replace(expert=torch.tensor([-1, 0]))
    assert torch.equal(layer(x[:2]), layer.base_layer(x[:2]))


def test_task_gate_follows_rows_repeated_side_by_side_and_flattened_inputs() -> None:
    context = Context()
    layer = layer_of(experts_of(3), TaskGate, context=context)
    x = torch.randn(2, 4, IN, dtype=torch.float64)
    context.replace(expert=torch.tensor([2, 1]))
    y = layer(x)
    beams = x.repeat_interleave(3, dim=0)
    torch.testing.assert_close(layer(beams), y.repeat_interleave(3, dim=0), rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(x.reshape(8, IN)), y.reshape(8, OUT), rtol=0, atol=1e-14)


def test_task_gate_without_ids_or_with_rows_that_do_not_fit_says_so() -> None:
    context = Context()
    layer = layer_of(experts_of(3), TaskGate, context=context)
    with pytest.raises(ValueError, match="TaskGate at layer: expected the batch to carry the expert id"):
        layer(torch.randn(2, 4, IN, dtype=torch.float64))
    context.replace(expert=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="3"):
        layer(torch.randn(3, 4, IN, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(StretchGate, top_k=0), "top_k to be at least 1, but got 0"),
        (partial(RotationGate, top_k=-1), "top_k to be at least 1, but got -1"),
        (partial(RadarGate, top_k=5), r"top_k to be at most the number of experts, 3 \(e0, e1, e2\), but got 5"),
        (partial(RotationGate, top_k=4), "top_k to be at most the number of experts, 3"),
        (partial(StretchGate, top_k=4), "top_k to be at most the number of experts, 3"),
        (partial(StretchGate, temperature=0.0), "temperature to be positive and finite, but got 0"),
        (partial(StretchGate, temperature=math.nan), "temperature to be positive and finite, but got nan"),
        (partial(RadarGate, renormalize="sometimes"), "renormalize to be .* but got 'sometimes'"),
        (partial(RadarGate, scorer="y"), "scorer to be one of .* but got 'y'"),
        (partial(RadarGate, angle_norm="l2"), "angle_norm to be .* but got 'l2'"),
        (partial(RadarGate, rotation_rank=0), "rotation_rank to be at least 1, or 'full', but got 0"),
        (partial(RotMoLEGate, trunk_rank=0), "trunk_rank to be at least 1, or null .* but got 0"),
        (partial(FixedGate, weights={}), "weights to name at least one expert"),
        (partial(FixedGate, weights={"e0": 1.0, "e9": 1.0}), r"weights to name experts of .* but got \['e9'\]"),
    ],
)
def test_bad_arguments_are_named_with_their_value(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(experts_of(3), make)
