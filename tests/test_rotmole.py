"""RankRotation and RotMoLEGate against the dense reference; zero angles are StretchGate; padding is never mixed in."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from builders import IN, OUT, assert_near, bank_of, experts_of, layer_of, randomise, recorded
from gate_cases import COUNT, TOKENS, Case, build, inputs
from reference import expert_outputs
from reference_rotations import dense_rotated_layer, rank_angles, rank_rotated_outputs
from torch import Tensor

from radargate_pl.experts import ExpertBank
from radargate_pl.gates import Context, Gate, RotMoLEGate, Routing, Site, StretchGate
from radargate_pl.rank_rotation import RankRotation

RANKS = [(2,), (3,), (1,), (5, 8, 1, 2), (8, 5, 4, 7)]


def wide_experts(ranks: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict:
    return experts_of(COUNT, in_features=11, out_features=9, ranks=ranks, dtype=dtype)


def wide_inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(tokens, 11, generator=generator, dtype=torch.float64).to(dtype)


def built(ranks: tuple[int, ...], dtype: torch.dtype = torch.float64, **options: object):
    return build(Case(RotMoLEGate, options), wide_experts(ranks, dtype))


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("trunk_rank", [None, 3])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
@pytest.mark.parametrize("trainable", [False, True])
def test_outputs_and_gradients_equal_the_dense_reference(
    ranks: tuple, trunk_rank: int | None, top_k: int, trainable: bool
) -> None:
    options = {"top_k": top_k, "trunk_rank": trunk_rank}
    experts = wide_experts(ranks)
    layer = build(Case(RotMoLEGate, options), experts, trainable=trainable)
    x = wide_inputs().requires_grad_()
    y, state = layer(x), dict(layer.named_parameters())
    expected = dense_rotated_layer(x, list(experts.values()), state, gate="RotMoLEGate", **options)
    assert_near(y, expected.output, 1e-12, "output")
    parameters = dict(layer.gate.named_parameters())
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    leaves = (x, *parameters.values())
    ours = torch.autograd.grad((y * direction).sum(), leaves)
    wanted = torch.autograd.grad((expected.output * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    for name, got, want in zip(["x", *parameters], ours, wanted, strict=True):
        if got.numel():  # experts of rank 1 have no angles
            assert_near(got, want, 1e-11, f"gradient of {name}")
    turns = max(ranks) > 1
    assert bool((parameters["rotation.weight"].numel() > 0) == turns)
    assert not turns or ours[[*parameters].index("rotation.weight") + 1].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(("trunk_rank", "scorer"), [(None, "x"), (3, "experts")])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
def test_zero_angles_are_the_stretch_gate_bit_for_bit(
    dtype: torch.dtype, ranks: tuple, trunk_rank: int | None, scorer: str, top_k: int
) -> None:
    """As built (the map starts at zero), and in the gradients that both gates have."""
    experts = wide_experts(ranks, dtype)
    make = partial(layer_of, experts)
    stretch = make(partial(StretchGate, top_k=top_k, scorer=scorer))
    turned = make(partial(RotMoLEGate, top_k=top_k, scorer=scorer, trunk_rank=trunk_rank))
    if dtype == torch.float64:
        stretch.gate.double(), turned.gate.double()
    assert torch.equal(stretch.gate.scorer.weight, turned.gate.scorer.weight)
    x = wide_inputs(16, dtype)
    first, second = stretch(x), turned(x)
    assert torch.equal(first, second)
    direction = torch.randn(first.shape).to(dtype)
    for y in (first, second):
        (y * direction).sum().backward()
    assert torch.equal(stretch.gate.scorer.weight.grad, turned.gate.scorer.weight.grad)
    if max(ranks) > 1:
        assert turned.gate.rotation.weight.grad.abs().max() > 0  # zero start, nonzero gradient


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_norms_of_latents_are_kept_and_padding_stays_out(ranks: tuple) -> None:
    layer = built(ranks)
    rotation, bank, x = layer.gate.rotation, layer.bank, wide_inputs()
    randomise(rotation, scale=30.0)
    h = bank.project(x)
    turned = rotation.latents(h, x, None)
    torch.testing.assert_close(turned.norm(dim=-1), h.norm(dim=-1), rtol=1e-13, atol=0)
    for i, rank in enumerate(bank.ranks):
        assert (turned[:, i, rank:] == 0).all()
        if rank % 2:
            assert torch.equal(turned[:, i, rank - 1], h[:, i, rank - 1])
        if rank > 1:
            assert (turned[:, i, : rank - 1] - h[:, i, : rank - 1]).abs().max() > 1e-2


def test_an_expert_of_rank_5_in_a_bank_of_8_has_two_planes() -> None:
    layer = built((5, 8, 1, 2))
    rotation, x = layer.gate.rotation, wide_inputs()
    angles = rotation.latent_angles(x)
    assert rotation.weight.shape == (COUNT, 4, 11)
    assert (angles[:, 0, 2:] == 0).all()
    state = {"gate.rotation.weight": rotation.weight}
    assert_near(angles[:, 0, :2], rank_angles(x, state, 0, 2), 1e-13, "angles")
    assert angles[:, 1].abs().min(dim=0).values.min() > 0
    assert (angles[:, 2] == 0).all()


def test_experts_of_equal_even_rank_need_no_mask_and_nothing_extra_is_saved() -> None:
    layer = built((4,))
    assert layer.gate.rotation.has_plane is None
    assert set(built((4, 3)).gate.state_dict()) == {"scorer.weight", "rotation.weight"}
    assert set(built((4,), trunk_rank=2).gate.state_dict()) == {
        *("scorer.weight", "rotation.weight", "rotation.trunk"),
    }


def test_gradcheck_of_the_rotation_of_latents() -> None:
    experts = experts_of(2, ranks=(3, 4))
    rotation = RankRotation(Site("layer", IN, OUT, 4, tuple(experts))).double()
    rotation.bind(bank_of(experts))
    randomise(rotation)
    h = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = inputs(3).requires_grad_()
    arguments = (h, x, rotation.weight)
    function = lambda h, x, _: rotation.latents(h, x, None)  # noqa: E731
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_bfloat16_latents_stay_bfloat16_and_follow_float32() -> None:
    narrow, wide = built((5, 8, 1, 2), torch.bfloat16), built((5, 8, 1, 2), torch.float32)
    wide.gate.load_state_dict(narrow.gate.state_dict())
    x = wide_inputs(dtype=torch.bfloat16)
    h = narrow.bank.project(x)
    assert h.dtype == narrow.gate.rotation.latents(h, x, None).dtype == torch.bfloat16
    assert_near(narrow(x).float(), wide(x.float()), 2**-5, "output")


class TurnedUniform(Gate):
    """Every expert the same, after a rotation of latents: how any gate takes one."""

    def __init__(self, site: Site, rotation=RankRotation) -> None:
        super().__init__(site)
        self.rotation = rotation(site)

    def forward(self, x: Tensor, latents: Tensor, bank: ExpertBank, context: Context) -> Routing:
        weights = latents.new_full((*latents.shape[:-2], bank.num_experts), 1 / bank.num_experts)
        return Routing(weights.to(torch.promote_types(latents.dtype, torch.float32)), None, None)


@pytest.mark.parametrize("trunk_rank", [None, 2])
def test_any_gate_may_take_it_and_the_ranks_are_bound_by_the_layer(trunk_rank: int | None) -> None:
    experts = wide_experts((5, 8, 1, 2))
    layer = layer_of(experts, partial(TurnedUniform, rotation=partial(RankRotation, trunk_rank=trunk_rank)))
    randomise(layer.gate.double())
    assert layer.gate.rotation.has_plane is not None
    x, state = wide_inputs(), dict(layer.named_parameters())
    state["gate.scorer.weight"] = torch.zeros(COUNT, 11, dtype=torch.float64)
    expected = dense_rotated_layer(x, list(experts.values()), state, gate="RotMoLEGate", top_k=COUNT)
    assert_near(layer(x), expected.output, 1e-12, "output")


@pytest.mark.parametrize("ranks", [(4,), (5, 8, 1, 2)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
@pytest.mark.parametrize("padded", [False, True])
def test_recorded_angles_and_their_statistics_equal_hand_computation(ranks: tuple, top_k: int, padded: bool) -> None:
    context = Context()
    experts = wide_experts(ranks)
    layer = layer_of(experts, partial(RotMoLEGate, top_k=top_k), context=context)
    randomise(layer.gate.double())
    x = wide_inputs(6).view(2, 3, 11)
    real = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool) if padded else torch.ones(2, 3, dtype=torch.bool)
    context.replace(tokens={"decoder": real} if padded else {})
    _, record = recorded(layer, x)
    state = dict(layer.named_parameters())
    indices = torch.arange(COUNT).expand(2, 3, COUNT) if record.indices is None else record.indices
    before, after = expert_outputs(x, list(experts.values())), []
    for row in x:
        after.append(torch.stack(rank_rotated_outputs(row, list(experts.values()), state), dim=1))
    sums = {name: torch.zeros(COUNT, dtype=torch.float64) for name in ("count", "mean_sum", "abs_sum", "square_sum")}
    cosines = {name: torch.zeros(COUNT, COUNT, dtype=torch.float64) for name in ("cosine_before", "cosine_after")}
    for row, position in itertools.product(range(2), range(3)):
        kept = indices[row, position].tolist()
        for slot, expert in enumerate(kept):
            planes = layer.bank.ranks[expert] // 2
            angles = rank_angles(x[row, position : position + 1], state, expert, planes)[0]
            if planes:
                assert_near(record.angles[row, position, slot, :planes], angles, 1e-12, "angles")
            assert (record.angles[row, position, slot, planes:] == 0).all()
            if real[row, position]:
                for name, value in (("count", 1), ("mean_sum", angles.sum()), ("abs_sum", angles.abs().sum())):
                    sums[name][expert] += value
                sums["square_sum"][expert] += angles.square().sum()
        for a, b in itertools.permutations(kept if real[row, position] else [], 2):
            first = (before[a][row, position], before[b][row, position])
            second = (after[row][position, a], after[row][position, b])
            cosines["cosine_before"][a, b] += torch.cosine_similarity(*first, dim=0)
            cosines["cosine_after"][a, b] += torch.cosine_similarity(*second, dim=0)
    stats = record.angle_stats
    assert stats.pairs == tuple(rank // 2 for rank in layer.bank.ranks)
    for name, value in (sums | cosines).items():
        torch.testing.assert_close(getattr(stats, name), value, rtol=1e-10, atol=1e-12, msg=name)
    planes = torch.tensor(stats.pairs)
    assert torch.equal(stats.angle_count, stats.count * planes)


def test_experts_of_rank_1_leave_nothing_to_record() -> None:
    assert recorded(built((1,)), wide_inputs())[1].angle_stats is None


@pytest.mark.parametrize("kind", ["one", "identical", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_experts_give_no_nan(kind: str, dtype: torch.dtype) -> None:
    first = experts_of(1, dtype=dtype, ranks=(3,))["e0"]
    count = 1 if kind == "one" else 3
    experts = {f"e{i}": first._replace(lora_B=first.lora_B * (kind != "zero")) for i in range(count)}
    for top_k in {1, count}:
        layer = layer_of(experts, partial(RotMoLEGate, top_k=top_k))
        randomise(layer.gate)
        x = inputs(dtype=dtype).requires_grad_()
        y = layer(x)
        (y.float() * torch.randn(y.shape)).sum().backward()
        assert y.isfinite().all()
        assert all(tensor.grad.isfinite().all() for tensor in (x, *layer.gate.parameters()))


def test_experts_absent_at_a_layer_have_no_angles_there() -> None:
    everyone = wide_experts((5, 8, 1, 2))
    present = {name: everyone[name] for name in ("e0", "e3")}
    layer = layer_of(present, RotMoLEGate, library=tuple(everyone))
    randomise(layer.gate.double())
    assert layer.gate.rotation.weight.shape == (2, 2, 11)
    x = wide_inputs()
    expected = dense_rotated_layer(x, list(present.values()), dict(layer.named_parameters()), gate="RotMoLEGate")
    assert_near(layer(x), expected.output, 1e-12, "output")
    assert recorded(layer, x)[1].weights.shape == (TOKENS, 2)
