"""Gram-Schmidt and the separate sum from latents against the same things done with whole expert outputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from builders import IN, OUT, assert_near, bank_of, experts_of, layer_of, randomise, recorded, site_of
from gate_cases import inputs
from reference import Expert, dense_layer

from radargate_pl.combines import COMBINES
from radargate_pl.gates import Context, FixedGate, RadarGate, Routing, StretchGate, TaskGate, UniformGate
from radargate_pl.mixture import mix
from radargate_pl.moe import MoELinear
from radargate_pl.rotations import NoRotation

COUNT = 4
GRAM_SCHMIDT = ("gram_schmidt", "gram_schmidt_unit")


def built(gate: partial, combine: str, experts: dict[str, Expert], expert: int = 2) -> MoELinear:
    context = Context()
    context.replace(expert=torch.tensor([expert]))
    layer = layer_of(experts, gate, context=context, combine=combine)
    if next(iter(experts.values())).lora_A.dtype == torch.float64:
        layer.gate.double()
    randomise(layer.gate)
    return layer


@pytest.mark.parametrize("combine", GRAM_SCHMIDT)
@pytest.mark.parametrize("top_k", [1, 2, 3, COUNT])
@pytest.mark.parametrize("gate", [StretchGate, partial(RadarGate, angle_norm="none"), RadarGate])
def test_gram_schmidt_equals_the_dense_one_with_gradients(gate: object, top_k: int, combine: str) -> None:
    experts, x = experts_of(COUNT), inputs().requires_grad_()
    layer = built(partial(gate, top_k=top_k), combine, experts)
    name, norm = (gate.func if isinstance(gate, partial) else gate).__name__, getattr(layer.gate, "angle_norm", "rms")
    dense = dense_layer(
        x, list(experts.values()), dict(layer.named_parameters()), gate=name, combine=combine, top_k=top_k,
        angle_norm=norm,
    )  # fmt: skip
    assert_near(layer(x), dense.output, 1e-10, "output")
    leaves = [x, *layer.gate.parameters()]
    probe = torch.randn(dense.output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad((layer(x) * probe).sum(), leaves)
    theirs = torch.autograd.grad((dense.output * probe).sum(), leaves)
    for leaf, one, other in zip(leaves, ours, theirs, strict=True):
        assert_near(one, other, 1e-8, f"gradient {tuple(leaf.shape)}")


@pytest.mark.parametrize("combine", GRAM_SCHMIDT)
def test_the_kept_outputs_become_orthogonal_whatever_their_weights(combine: str) -> None:
    experts, x = experts_of(3), inputs()
    bank = bank_of(experts)
    indices = torch.tensor([[2, 0], [0, 2], [1, 2], [2, 1], [0, 1]])
    rows = COMBINES[combine].basis(bank.project(x), indices.sort(-1).values, bank, None)
    outputs = torch.stack([e.scaling * (x @ e.lora_A.T) @ e.lora_B.T for e in experts.values()], 1)
    chosen = outputs.gather(1, indices.sort(-1).values.unsqueeze(-1).expand(-1, -1, OUT))
    made = rows @ chosen
    gram = made @ made.mT
    squares = gram.diagonal(dim1=-2, dim2=-1)
    assert (gram[:, 0, 1].abs() <= 1e-3 * squares.prod(-1).sqrt()).all()
    if combine.endswith("unit"):
        assert_near(squares, torch.ones(5, 2, dtype=torch.float64), 1e-2, "norms")


def test_kept_lengths_at_k_1_are_mole_bit_for_bit() -> None:
    experts = experts_of(COUNT, dtype=torch.float32)
    x = inputs(dtype=torch.float32)
    plain, ours = (built(partial(StretchGate, top_k=1), combine, experts) for combine in ("sum", "gram_schmidt"))
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [1, 2, COUNT])
def test_the_separate_sum_equals_the_dense_one_with_gradients(top_k: int) -> None:
    experts, x = experts_of(COUNT, ranks=(3,)), inputs().requires_grad_()
    layer = built(partial(StretchGate, top_k=top_k), "separate", experts)
    state = dict(layer.named_parameters())
    dense = dense_layer(x, list(experts.values()), state, gate="StretchGate", combine="separate", top_k=top_k)
    assert_near(layer(x), dense.output, 1e-12, "output")
    leaves = [x, *layer.gate.parameters()]
    for one, other in zip(
        torch.autograd.grad(layer(x).square().sum(), leaves),
        torch.autograd.grad(dense.output.square().sum(), leaves),
        strict=True,
    ):
        assert_near(one, other, 1e-11, "gradient")


@pytest.mark.parametrize("combine", [*GRAM_SCHMIDT, "separate"])
@pytest.mark.parametrize(
    ("gate", "fixed"),
    [
        (TaskGate, (0.0, 0.0, 1.0, 0.0)),
        (UniformGate, (0.25,) * 4),
        (partial(FixedGate, weights={"e0": 0.25, "e2": -1.5, "e3": 0.5}), (0.25, 0.0, -1.5, 0.5)),
    ],
    ids=["task", "uniform", "fixed"],
)
def test_gates_that_evaluate_some_experts_only(gate: object, fixed: tuple, combine: str) -> None:
    experts, x = experts_of(COUNT, ranks=(3,)), inputs().unsqueeze(0)
    layer = built(partial(gate), combine, experts)
    state = dict(layer.named_parameters())
    dense = dense_layer(x[0], list(experts.values()), state, gate="FixedGate", combine=combine, fixed=fixed)
    assert_near(layer(x)[0], dense.output, 1e-10, "output")


@pytest.mark.parametrize("combine", GRAM_SCHMIDT)
@pytest.mark.parametrize("gate", [StretchGate, RadarGate])
@pytest.mark.parametrize("top_k", [2, 3])
def test_identical_and_silent_experts_give_no_nan(gate: type, combine: str, top_k: int) -> None:
    same = experts_of(1, dtype=torch.float32)["e0"]
    silent = Expert(same.lora_A, torch.zeros_like(same.lora_B), 1.0)
    for library in ({"e0": same, "e1": same, "e2": same}, {"e0": silent, "e1": silent, "e2": same}):
        layer = built(partial(gate, top_k=top_k), combine, library)
        x = inputs(dtype=torch.float32).requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *layer.gate.parameters()])
        assert all(tensor.isfinite().all() for tensor in (y, *gradients))


@pytest.mark.parametrize("combine", GRAM_SCHMIDT)
def test_one_expert_is_not_rotated(combine: str) -> None:
    layer = built(partial(RadarGate, top_k=1), combine, experts_of(1, dtype=torch.float32))
    _, output = recorded(layer, inputs(dtype=torch.float32))
    assert torch.equal(output.angles, torch.zeros_like(output.angles))


@pytest.mark.parametrize("combine", GRAM_SCHMIDT)
def test_many_kept_experts_in_portions_are_the_same(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 experts of rank 1: 128 numbers a token against a bound of 18, so the tokens go in eight portions."""
    experts, x = experts_of(8, ranks=(1,)), inputs(tokens=17)
    layer = built(partial(RadarGate, top_k=8), combine, experts)
    together = layer(x)
    apart = torch.cat([layer(row) for row in x.split(1)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def test_bfloat16_experts_are_orthogonalised_in_double() -> None:
    experts = experts_of(3, dtype=torch.bfloat16)
    layer = built(partial(StretchGate, top_k=2), "gram_schmidt", experts)
    wide = {name: Expert(e.lora_A.float(), e.lora_B.float(), e.scaling) for name, e in experts.items()}
    x = inputs(dtype=torch.bfloat16)
    reference = built(partial(StretchGate, top_k=2), "gram_schmidt", wide)
    reference.load_state_dict(layer.state_dict())
    assert_near(layer(x).float(), reference(x.float()), 2**-6, "output")


def test_similar_bfloat16_experts_are_not_rounded_to_noise() -> None:
    """Unit lengths blow up what is left of an expert much like another one."""
    first = experts_of(1, dtype=torch.float32, ranks=(3,))["e0"]
    noise = 0.03 * torch.randn(first.lora_B.shape, generator=torch.Generator().manual_seed(1))
    narrow = {
        "e0": Expert(first.lora_A.bfloat16(), first.lora_B.bfloat16(), 1.0),
        "e1": Expert(first.lora_A.bfloat16(), (first.lora_B + noise).bfloat16(), 1.0),
    }
    bank, x = bank_of(narrow), inputs(dtype=torch.bfloat16, tokens=50)
    latents = bank.project(x)
    wide = bank_of({name: Expert(e.lora_A.double(), e.lora_B.double(), 1.0) for name, e in narrow.items()})
    routing = Routing(torch.full((50, 2), 0.5), None, None)
    rotation, combine = NoRotation(site_of()), COMBINES["gram_schmidt_unit"]
    ours = mix(latents, routing, bank, combine, rotation, x)
    expected = mix(latents.double(), Routing(routing.weights.double(), None, None), wide, combine, rotation, x.double())
    assert_near(ours.double(), expected, 2**-6, "mixture")


def test_what_does_not_go_together_is_refused_at_start() -> None:
    for gate, combine, ranks, message in (
        (RadarGate, "separate", (3,), r"without rotation with combine: separate.*RadarGate at layer has RadarRotation"),
        (StretchGate, "separate", (3, 2), r"one rank with combine: separate.*'e0': 3, 'e1': 2"),
        (Ragged, "gram_schmidt", (3,), r"equally many experts for every token.*Ragged at layer does not"),
    ):
        with pytest.raises(ValueError, match=message):
            built(partial(gate), combine, experts_of(COUNT, ranks=ranks))


def test_a_scaling_without_a_root_is_refused_for_separate_sums() -> None:
    experts = {name: e._replace(scaling=-1.0) for name, e in experts_of(2, ranks=(3,)).items()}
    with pytest.raises(ValueError, match=r"scalings above 0 with combine: separate.*'e0': -1.0"):
        built(partial(StretchGate), "separate", experts)


class Ragged(UniformGate):
    """A gate that says tokens keep different numbers of experts."""

    is_ragged = True


@pytest.mark.parametrize("combine", COMBINES)
def test_shapes(combine: str) -> None:
    layer = built(partial(StretchGate, top_k=2), combine, experts_of(3, ranks=(2,), dtype=torch.float32))
    assert layer(torch.randn(2, 5, IN)).shape == (2, 5, OUT)
