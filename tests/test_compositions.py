"""DirectLoRA, PEMs and LoraHub as gates: against merged matrices."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from builders import IN, assert_near, experts_of, layer_of, recorded
from dense_comparison import assert_finite
from gate_cases import COUNT, inputs
from reference import Expert
from reference_rules import merged_apart, merged_updates
from torch import Tensor

from radargate_pl.gates import DirectLoRA, FixedGate, LoraHub, PEMs, UniformGate

SIGNED = {"e0": 1.0, "e2": -0.75, "e3": 0.5}


def listed(weights: dict[str, float]) -> list[float]:
    return [weights.get(f"e{i}", 0.0) for i in range(COUNT)]


def update(gate: object, experts: dict[str, Expert], combine: str, values: list[float] | None = None) -> Tensor:
    """The layer's update as a matrix (out, in), read off the unit vectors."""
    layer = layer_of(experts, gate, combine=combine)
    if values is not None:
        layer.gate.double()
        layer.gate.weights.data.copy_(torch.tensor(values))
    x = torch.eye(IN, dtype=torch.float64)
    return (layer(x) - layer.base_layer(x)).detach().T


def test_direct_lora_is_that_lora_and_evaluates_no_other() -> None:
    experts = experts_of(COUNT)
    broken = {n: e if n == "e2" else Expert(e.lora_A * torch.nan, e.lora_B, e.scaling) for n, e in experts.items()}
    expected = merged_updates(list(experts.values()), listed({"e2": 1.0}))
    for combine, given in itertools.product(("sum", "separate"), (experts, broken)):
        if combine == "sum":
            assert_near(update(partial(DirectLoRA, expert="e2"), given, combine), expected, 1e-13, combine)
    with pytest.raises(ValueError, match=r"expert to name experts of \['e0'.*but got \['e9'\]"):
        layer_of(experts, partial(DirectLoRA, expert="e9"))


def test_direct_lora_absent_from_a_layer_changes_nothing_there() -> None:
    experts = experts_of(2)
    layer = layer_of(experts, partial(DirectLoRA, expert="x"), library=("x", *experts))
    assert torch.equal(layer(inputs()), layer.base_layer(inputs()))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("combine", ["sum", "separate"])
def test_pems_add_and_negate_as_whole_matrices(combine: str, normalize: bool) -> None:
    """Under `separate` a negative weight turns B alone; on both factors it would cancel."""
    experts = experts_of(COUNT, ranks=(2,))
    weights = listed(SIGNED)
    weights = [w / sum(weights) for w in weights] if normalize else weights
    ordered = list(experts.values())
    wanted = merged_updates(ordered, weights) if combine == "sum" else merged_apart(ordered, weights, sign_of_A=False)
    found = update(partial(PEMs, weights=SIGNED, normalize=normalize), experts, combine)
    assert_near(found, wanted, 1e-12, "update")
    if combine == "separate":
        assert float((merged_apart(ordered, weights) - wanted).abs().max()) > 0.1


def test_negating_one_module_is_minus_it() -> None:
    experts = experts_of(COUNT, ranks=(2,))
    for combine in ("sum", "separate"):
        gate = partial(PEMs, weights={"e1": -0.5}, normalize=False)
        factor = -0.5 if combine == "sum" else -0.25
        expected = merged_updates(list(experts.values()), listed({"e1": factor}))
        assert_near(update(gate, experts, combine), expected, 1e-13, combine)


def test_pems_by_default_are_the_papers_average() -> None:
    experts = experts_of(COUNT)
    found = update(partial(PEMs, weights=dict.fromkeys(experts, 1.0)), experts, "sum")
    assert_near(found, update(UniformGate, experts, "sum"), 1e-14, "average")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"e0": 1.0, "e1": -1.0}}, "sum is not 0.*normalize: false"),
        ({"weights": {"e0": 0.1, "e1": 0.2, "e2": -0.3}}, "sum is not 0"),  # 5.6e-17 in floating point
        ({"weights": {"e0": 0.0}}, "sum is not 0"),
        ({"weights": {"e0": float("inf")}}, "finite"),
        ({"weights": {"e0": float("nan")}, "normalize": False}, "finite"),
        ({"weights": {"e0": float("inf"), "e1": -float("inf")}}, "finite"),
        ({"weights": {}}, "at least one expert"),
        ({"weights": {"e9": 1.0}}, r"weights to name experts of .* got \['e9'\]"),
    ],
)
def test_bad_weights_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(experts_of(COUNT), partial(PEMs, **options))
    if "sum" not in message:
        with pytest.raises(ValueError, match=message):
            layer_of(experts_of(COUNT), partial(FixedGate, weights=options["weights"]))


@pytest.mark.parametrize("combine", ["sum", "separate"])
def test_lorahub_weighs_by_its_parameter_with_the_sign_on_both_factors(combine: str) -> None:
    experts = experts_of(COUNT, ranks=(2,))
    values = listed(SIGNED)
    wanted = (merged_updates if combine == "sum" else merged_apart)(list(experts.values()), values)
    assert_near(update(LoraHub, experts, combine, values), wanted, 1e-12, "update")


def test_lorahub_starts_at_the_bare_backbone_and_has_no_gradient() -> None:
    layer, x = layer_of(experts_of(COUNT, dtype=torch.float32), LoraHub), inputs(dtype=torch.float32)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer(x).requires_grad
    assert layer.gate.weights.requires_grad
    assert layer.gate.weights.dtype == torch.float32


def test_lorahubs_weights_are_the_librarys_also_where_experts_are_absent() -> None:
    experts = experts_of(2)
    layer = layer_of(experts, LoraHub, library=("x", "e0", "y", "e1"))
    assert layer.gate.weights.shape == (4,)
    layer.gate.weights.data.copy_(torch.tensor([9.0, 0.5, 9.0, -2.0]))
    _, record = recorded(layer, inputs(), angles=False)
    assert record.weights[0].tolist() == [0.5, -2.0]
    assert {key for key in layer.state_dict() if key.startswith("gate.")} == {"gate.weights"}


@pytest.mark.parametrize(
    "gate",
    [partial(DirectLoRA, expert="e0"), partial(PEMs, weights={"e0": 1.0}), LoraHub],
    ids=["direct", "pems", "hub"],
)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("combine", ["sum", "separate"])
def test_zero_and_identical_experts_are_finite(gate: object, count: int, combine: str) -> None:
    experts = experts_of(count, ranks=(2,))
    first = experts["e0"]
    for same in (first, Expert(first.lora_A, torch.zeros_like(first.lora_B), first.scaling)):
        layer = layer_of(dict.fromkeys(experts, same), gate, combine=combine)
        layer.gate.double()
        assert_finite(layer, inputs())
