"""ExpertBank: everything it computes from latents equals the same thing computed from full expert outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import IN, OUT, bank_of, experts_of
from reference import Expert, expert_outputs, scores_of_experts
from torch import Tensor, nn

from radargate_pl.experts import ExpertBank
from radargate_pl.trainable_experts import TrainableExpertBank, state_key

TOKENS = 6
COUNT = 4


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def close(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    relative = {torch.float64: 1e-13, torch.float32: 3e-6}[dtype]
    torch.testing.assert_close(
        ours, expected.to(ours.dtype), rtol=0, atol=relative * float(expected.abs().max()) + 1e-30
    )


@pytest.fixture(params=["frozen", "trainable"])
def trainable(request: pytest.FixtureRequest) -> bool:
    return request.param == "trainable"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scalings", [(4.0,), (4.0, 1.0, 13.06, 0.5)], ids=["equal scaling", "mixed scaling"])
def test_everything_from_latents_equals_the_dense_outputs(trainable: bool, dtype: torch.dtype, scalings: tuple) -> None:
    experts = experts_of(COUNT, dtype=dtype, scalings=scalings)
    bank, x = bank_of(experts, trainable=trainable), tokens(dtype)
    wide = [Expert(e.lora_A.double(), e.lora_B.double(), e.scaling) for e in experts.values()]
    outputs = expert_outputs(x.double(), wide)
    stacked = torch.stack(outputs, dim=1)  # (T, E, out)
    latents = bank.project(x)
    assert latents.shape == (TOKENS, COUNT, max(e.lora_A.shape[0] for e in wide))
    close(bank.total(latents), stacked.sum(1), dtype)
    for i in range(COUNT):
        close(bank.lift_expert(latents, i), outputs[i], dtype)
    indices = torch.tensor([3, 0, 1, 1, 2, 3])
    close(bank.lift(latents, indices), stacked[torch.arange(TOKENS), indices], dtype)
    weights = torch.randn(TOKENS, COUNT, dtype=torch.float64).to(dtype)
    close(bank.weighted_sum(latents, weights), (weights.double().unsqueeze(-1) * stacked).sum(1), dtype)
    close(bank.norms(latents), stacked.norm(dim=-1), dtype)
    gram = stacked @ stacked.mT
    close(bank.gram(latents), gram, dtype)
    pairs = torch.stack([indices, (indices + 1) % COUNT], dim=-1)
    chosen = torch.gather(stacked, 1, pairs.unsqueeze(-1).expand(-1, -1, OUT))
    close(bank.gram(latents, pairs), chosen @ chosen.mT, dtype)
    theta = torch.randn(COUNT, COUNT * OUT, dtype=torch.float64).to(dtype)
    close(bank.layer_norm_logits(latents, theta), scores_of_experts(outputs, theta.double()), dtype)


def test_gradients_of_everything_equal_the_dense_ones(trainable: bool) -> None:
    experts = experts_of(COUNT)
    bank, x = bank_of(experts, trainable=trainable), tokens().requires_grad_()
    if trainable:
        live = [Expert(*bank.expert_weights(name), experts[name].scaling) for name in bank.names]
    else:
        live = list(experts.values())
    leaves = (x, *(t for e in live for t in e[:2])) if trainable else (x,)
    theta = torch.randn(COUNT, COUNT * OUT, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(TOKENS, COUNT, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([3, 0, 1, 1, 2, 3])

    def dense(name: str) -> Tensor:
        outputs = expert_outputs(x, live)
        stacked = torch.stack(outputs, dim=1)
        return {
            "total": lambda: stacked.sum(1),
            "lift": lambda: stacked[torch.arange(TOKENS), indices],
            "lift_expert": lambda: outputs[2],
            "weighted_sum": lambda: (weights.unsqueeze(-1) * stacked).sum(1),
            "norms": lambda: stacked.norm(dim=-1),
            "gram": lambda: stacked @ stacked.mT,
            "layer_norm_logits": lambda: scores_of_experts(outputs, theta),
        }[name]()

    arguments = {"lift": (indices,), "lift_expert": (2,), "weighted_sum": (weights,), "layer_norm_logits": (theta,)}
    for name in ("total", "lift", "lift_expert", "weighted_sum", "norms", "gram", "layer_norm_logits"):
        ours = getattr(bank, name)(bank.project(x), *arguments.get(name, ()))
        expected = dense(name)
        direction = torch.randn(expected.shape, dtype=torch.float64)
        all_leaves = (*leaves, theta, weights)
        grads = [
            torch.autograd.grad((out * direction).sum(), all_leaves, allow_unused=True, materialize_grads=True)
            for out in (ours, expected)
        ]
        for got, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * (1 + float(wanted.abs().max())), msg=name)


def test_a_subset_of_experts_is_evaluated_alone_and_leaves_the_rest_without_gradients() -> None:
    experts = experts_of(COUNT)
    bank, x = bank_of(experts, trainable=True), tokens()
    for active in ((2,), (0, 3)):
        bank.zero_grad(set_to_none=True)
        latents = bank.project(x, active)
        assert latents.shape == (TOKENS, len(active), bank.rank)
        weights = torch.zeros(TOKENS, COUNT, dtype=torch.float64)
        weights[:, list(active)] = torch.rand(TOKENS, len(active), dtype=torch.float64)
        outputs = torch.stack(expert_outputs(x, list(experts.values())), dim=1)
        mixed = bank.weighted_sum(latents, weights, active)
        torch.testing.assert_close(mixed, (weights.unsqueeze(-1) * outputs).sum(1), rtol=0, atol=1e-12)
        mixed.sum().backward()
        for i, name in enumerate(bank.names):
            assert all((parameter.grad is not None) == (i in active) for parameter in bank.expert_weights(name))


def test_absent_experts_are_not_in_the_bank_but_keep_their_ids() -> None:
    experts = experts_of(COUNT)
    library = ("z", "e3", "other", "e0", "e1", "e2")
    bank = bank_of(experts, library=library)
    assert bank.names == ("e3", "e0", "e1", "e2")
    assert bank.ids == (1, 3, 4, 5)
    assert bank.library == library
    assert bank.scaling == tuple(experts[name].scaling for name in bank.names)
    for name in bank.names:
        lora_A, lora_B = bank.expert_weights(name)
        assert torch.equal(lora_A, experts[name].lora_A)
        assert torch.equal(lora_B, experts[name].lora_B)
    ordered = [experts[name] for name in bank.names]
    torch.testing.assert_close(bank.lift_expert(bank.project(tokens()), 1), expert_outputs(tokens(), ordered)[1])


def test_state_dict_keys_and_what_trains() -> None:
    experts = experts_of(2)
    frozen, training = bank_of(experts), bank_of(experts, trainable=True)
    assert set(frozen.state_dict()) == {"lora_A", "lora_B"}
    assert frozen.lora_A.shape == (2, 3, IN)
    assert frozen.lora_B.shape == (2, OUT, 3)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert set(training.state_dict()) == {"lora_A.e0", "lora_A.e1", "lora_B.e0", "lora_B.e1"}
    assert training.state_dict()["lora_A.e1"].shape == (1, IN)  # unpadded
    assert all(parameter.requires_grad for parameter in training.parameters())


@pytest.mark.parametrize(
    "name", ["qwen2.5-maths", "keys", "items", "training", "update", "half", "weight", "a b", "_x", "ä"]
)
def test_any_folder_name_can_be_a_training_expert(name: str) -> None:
    expert = experts_of(1)["e0"]
    bank = TrainableExpertBank({name: expert.lora_A}, {name: expert.lora_B}, {name: 2.0})
    assert torch.equal(bank.expert_weights(name)[0], expert.lora_A)
    assert set(bank.state_dict()) == {f"lora_A.{state_key(name)}", f"lora_B.{state_key(name)}"}
    bank.total(bank.project(tokens())).sum().backward()
    assert all(parameter.grad is not None for parameter in bank.expert_weights(name))
    bank.load_state_dict(bank.state_dict())
    bank.train().eval().half()
    assert len(list(copy.deepcopy(bank).parameters())) == 2


def test_fresh_experts_add_nothing_and_have_finite_gradients(trainable: bool) -> None:
    experts = {name: e._replace(lora_B=torch.zeros_like(e.lora_B)) for name, e in experts_of(COUNT).items()}
    bank, x = bank_of(experts, trainable=trainable), tokens().requires_grad_()
    theta = torch.randn(COUNT, COUNT * OUT, dtype=torch.float64, requires_grad=True)
    latents = bank.project(x)
    logits = bank.layer_norm_logits(latents, theta)
    assert torch.equal(logits, torch.zeros_like(logits))
    assert torch.equal(bank.total(latents), torch.zeros(TOKENS, OUT, dtype=torch.float64))
    (logits.sum() + bank.total(latents).sum() + bank.gram(latents).sum()).backward()
    gradients = [x.grad, theta.grad, *(p.grad for p in bank.parameters() if p.requires_grad)]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_norms_of_zero_outputs_are_differentiable_without_nan() -> None:
    experts = {name: e._replace(lora_B=torch.zeros_like(e.lora_B)) for name, e in experts_of(2).items()}
    x = tokens().requires_grad_()
    bank = bank_of(experts)
    bank.norms(bank.project(x)).sum().backward()
    assert x.grad.isfinite().all()


def test_layer_norm_logits_hold_for_tiny_variances() -> None:
    """Variances of real experts fall to 3e-6; eps is 1e-8, so it must not hide them and its place must be right."""
    experts = {name: e._replace(scaling=1e-3) for name, e in experts_of(COUNT).items()}
    wide = list(experts.values())
    theta = torch.randn(COUNT, COUNT * OUT, dtype=torch.float64)
    for size in (1.0, 0.1, 1e-3):
        x = size * tokens()
        ours = bank_of(experts).layer_norm_logits(bank_of(experts).project(x), theta)
        close(ours, scores_of_experts(expert_outputs(x, wide), theta), torch.float64)


def test_frozen_experts_take_the_backbones_dtype_and_training_ones_stay_float32() -> None:
    experts = experts_of(2, dtype=torch.float32)
    frozen, training = bank_of(experts).to(torch.bfloat16), bank_of(experts, trainable=True).to(torch.bfloat16)
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in training.parameters()} == {torch.float32}
    assert frozen.scaling == tuple(e.scaling for e in experts.values())  # Python floats: nothing rounds them
    assert all(torch.equal(training.expert_weights(n)[0], experts[n].lora_A) for n in training.names)
    narrow = experts_of(2, dtype=torch.bfloat16)
    assert {p.dtype for p in bank_of(narrow, trainable=True).parameters()} == {torch.float32}
    latents = frozen.project(tokens().bfloat16())
    assert latents.dtype == torch.bfloat16
    for wide in (frozen.total(latents), frozen.norms(latents), frozen.gram(latents), frozen.lift_expert(latents, 0)):
        assert wide.dtype == torch.float32


def test_bfloat16_statistics_are_accumulated_in_float32() -> None:
    experts = experts_of(COUNT, dtype=torch.bfloat16)
    bank = bank_of(experts)
    latents = bank.project(tokens().bfloat16())
    wide_bank = bank_of({n: Expert(e.lora_A.double(), e.lora_B.double(), e.scaling) for n, e in experts.items()})
    theta = torch.randn(COUNT, COUNT * OUT)
    torch.testing.assert_close(
        bank.layer_norm_logits(latents, theta).double(),
        wide_bank.layer_norm_logits(latents.double(), theta.double()),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(bank.norms(latents).double(), wide_bank.norms(latents.double()), rtol=1e-6, atol=0)


def _arguments() -> tuple[dict, dict, dict]:
    experts = experts_of(2)
    return tuple({n: e[field] for n, e in experts.items()} for field in range(3))  # type: ignore[return-value]


def test_bad_experts_are_named() -> None:
    lora_A, lora_B, scaling = _arguments()
    with pytest.raises(ValueError, match="at least one"):
        ExpertBank({}, {}, {})
    with pytest.raises(ValueError, match=r"scaling=\['e0'\]"):
        ExpertBank(lora_A, lora_B, {"e0": 1.0})
    with pytest.raises(ValueError, match=r"library=\['e0'\]"):
        ExpertBank(lora_A, lora_B, scaling, library=["e0"])
    with pytest.raises(ValueError, match=rf"expert 'e1' to have lora_A \(r, {IN}\)"):
        ExpertBank(lora_A | {"e1": torch.zeros(1, IN + 1)}, lora_B, scaling)
    with pytest.raises(ValueError, match=rf"expert 'e1' .* got \(1, {IN}\) and \({OUT}, 2\)"):
        ExpertBank(lora_A, lora_B | {"e1": torch.zeros(OUT, 2)}, scaling)


def test_a_bank_survives_a_round_trip_through_its_state_dict(trainable: bool) -> None:
    first, second = bank_of(experts_of(3), trainable=trainable), bank_of(experts_of(3, seed=8), trainable=trainable)
    second.load_state_dict(first.state_dict())
    latents = first.project(tokens())
    assert torch.equal(second.total(latents), first.total(latents))
    assert isinstance(second, nn.Module)


def test_experts_given_the_same_A_share_one_parameter() -> None:
    """HydraLoRA: one A, a B for each expert; the gradient of A is the sum over the experts."""
    experts, shared = experts_of(2, ranks=(3,)), torch.randn(3, IN, dtype=torch.float64)
    lora_B, scaling = {n: e.lora_B for n, e in experts.items()}, {n: e.scaling for n, e in experts.items()}
    bank = TrainableExpertBank({"e0": shared, "e1": shared}, lora_B, scaling)
    assert bank.expert_weights("e0")[0] is bank.expert_weights("e1")[0]
    assert len(list(bank.parameters())) == 3
    bank.total(bank.project(tokens())).sum().backward()
    leaf = shared.clone().requires_grad_()
    sum(expert_outputs(tokens(), [e._replace(lora_A=leaf) for e in experts.values()])).sum().backward()
    torch.testing.assert_close(bank.expert_weights("e0")[0].grad, leaf.grad, rtol=1e-13, atol=0)


def test_a_shared_A_is_projected_once_and_gives_what_copies_of_it_give(trainable: bool) -> None:
    experts = experts_of(COUNT, ranks=(3,))
    shared = next(iter(experts.values())).lora_A
    copies = {name: Expert(shared.clone(), e.lora_B, e.scaling) for name, e in experts.items()}
    kind = TrainableExpertBank if trainable else ExpertBank
    lora_B = {name: e.lora_B for name, e in experts.items()}
    bank = kind(dict.fromkeys(experts, shared), lora_B, {name: e.scaling for name, e in experts.items()})
    apart, x = bank_of(copies, trainable=trainable), tokens()
    assert bank.shares_A
    assert not apart.shares_A
    assert sum(p.numel() for name, p in bank.named_parameters() if "lora_A" in name) == shared.numel()
    for active in (None, (1, 3)):
        weights = torch.randn(TOKENS, COUNT, dtype=torch.float64)
        ours, theirs = (b.weighted_sum(b.project(x, active), weights, active) for b in (bank, apart))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    torch.testing.assert_close(bank.gram(bank.project(x)), apart.gram(apart.project(x)), rtol=0, atol=1e-12)
    assert all(torch.equal(bank.expert_weights(name)[0], shared) for name in experts)
    if trainable:
        for each in (bank, apart):
            each.weighted_sum(each.project(x), weights).square().sum().backward()
        summed = sum(apart.expert_weights(name)[0].grad for name in experts)
        torch.testing.assert_close(bank.expert_weights("e0")[0].grad, summed, rtol=1e-12, atol=0)
