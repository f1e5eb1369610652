"""Each auxiliary loss equals a slow loop in float64 and what transformers computes, with gradients; padding is nothing.

How they reach a network's training is proved in test_auxiliary_terms.py.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import reference_losses
import torch
from builders import bank_of, experts_of
from reference import choose
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

from radargate_pl import auxiliary_losses
from radargate_pl.auxiliary_losses import gshard, load_balancing, mole_balance, orthogonality, variance, z_loss
from radargate_pl.gates import Context, Site, StretchGate
from radargate_pl.ops import select_top_k

EPS = auxiliary_losses.ORTHOGONALITY_EPS
TOKENS, EXPERTS = 7, 4
REAL = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)


def logits_of(experts=EXPERTS, tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)).requires_grad_()


def gram_of(outputs):
    return outputs @ outputs.mT


# Loss name -> (ours of (input, indices, mask), the reference of (real rows of the input, chosen experts of these)).
LOSSES = {
    "load_balancing": (load_balancing, reference_losses.load_balancing),
    "gshard": (gshard, reference_losses.gshard),
    "mole_balance": (
        lambda x, _, mask: mole_balance([x], [mask]),
        lambda x, _: reference_losses.mole_balance([(x, range(x.shape[1]))], x.shape[1]),
    ),
    "z": (lambda x, _, mask: z_loss(x, mask), lambda x, _: reference_losses.z_loss(x)),
    "orthogonality": (
        lambda x, _, mask: orthogonality(gram_of(x.unflatten(-1, (2, -1))), mask),
        lambda x, _: reference_losses.orthogonality(x.unflatten(-1, (2, -1)), EPS),
    ),
    "variance_tokens": (
        lambda x, _, mask: variance(x, mask, over="tokens"),
        lambda x, _: reference_losses.variance_over_tokens(x),
    ),
    "variance_experts": (
        lambda x, _, mask: variance(x.softmax(-1), mask, over="experts"),
        lambda x, _: reference_losses.variance_over_experts(
            torch.stack([torch.stack(reference_losses.probabilities(row)) for row in x])
        ),
    ),
}


def value_and_gradient(function, x):
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


# ---- against loops ----


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("mask", [REAL, REAL.long(), REAL.double(), torch.ones(TOKENS)], ids=["bool", "int", "f", "1"])
def test_values_and_gradients_are_those_of_the_loops(name, top_k, mask):
    ours, reference = LOSSES[name]
    x, indices = logits_of(), select_top_k(logits_of(), top_k, renormalize=True)[1]
    real = mask.bool()
    chosen = [row for row, kept in zip(choose(x, top_k), real.tolist(), strict=True) if kept]
    found, gradient = value_and_gradient(lambda x: ours(x, indices, mask), x)
    expected, slope = value_and_gradient(lambda x: reference(x[real], chosen), x)
    assert found.dtype == torch.float64
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)
    assert gradient[~real].abs().sum() == 0
    assert gradient[real].abs().max() > 1e-5
    assert torch.autograd.gradcheck(lambda x: ours(x, indices, mask), x)


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_the_rank_space_form_of_orthogonality_is_exact(slots):
    """From a bank's Gram, for each choice of experts, against projections of outputs that are really made."""
    experts = experts_of(5)
    bank, x = bank_of(experts), torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    indices = select_top_k(logits_of(5, 6), slots, renormalize=True)[1]
    every = torch.stack([e.scaling * (x @ e.lora_A.T @ e.lora_B.T) for e in experts.values()], 1)
    kept = every.gather(1, indices.unsqueeze(-1).expand(-1, -1, every.shape[-1]))
    found = orthogonality(bank.gram(bank.project(x), indices), torch.ones(6))
    torch.testing.assert_close(found, reference_losses.orthogonality(kept, EPS), rtol=1e-12, atol=0)


def test_mole_balance_runs_over_layers_with_other_tokens_and_absent_experts():
    first, second, third = logits_of(4, 5), logits_of(2, 3, seed=1), logits_of(3, 6, seed=2)
    ids, masks = [range(4), (1, 3), (0, 2, 3)], [torch.ones(5), torch.tensor([1, 0, 1]), torch.tensor([0, 1] * 3)]

    def ours(*layers):
        aligned = [
            torch.full((len(logits), 4), -math.inf, dtype=torch.float64).index_copy(1, torch.tensor(list(i)), logits)
            for logits, i in zip(layers, ids, strict=True)
        ]
        return mole_balance(aligned, masks)

    inputs = (first, second, third)
    rows = [(logits[m.bool()], i) for logits, m, i in zip(inputs, masks, ids, strict=True)]
    found, expected = ours(*inputs), reference_losses.mole_balance(rows, 4)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
    assert torch.autograd.gradcheck(ours, inputs)


def test_a_layer_of_padding_is_as_if_it_were_not_there():
    first, second, padding = logits_of(tokens=5), logits_of(tokens=3, seed=1), logits_of(tokens=6, seed=2)
    masks = [torch.ones(5), torch.tensor([1, 0, 1]), torch.zeros(6)]
    found = mole_balance([first, second, padding], masks)
    torch.testing.assert_close(found, mole_balance([first, second], masks[:2]), rtol=1e-14, atol=0)
    assert torch.autograd.grad(found, padding)[0].abs().sum() == 0


# ---- uniform routing, extremes ----


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (6, 3), (5, 5)])
def test_even_routing_gives_one_for_any_k(experts, top_k):
    tokens = experts
    indices = (torch.arange(tokens)[:, None] + torch.arange(top_k)) % experts
    logits, mask = torch.zeros(tokens, experts, dtype=torch.float64), torch.ones(tokens)
    assert load_balancing(logits, indices, mask).item() == pytest.approx(1, abs=1e-14)
    assert gshard(logits, indices, mask).item() == pytest.approx(1, abs=1e-14)
    assert mole_balance([logits], [mask]).item() == pytest.approx(reference_losses.smallest_mole_balance(experts))
    assert z_loss(logits, mask).item() == pytest.approx(math.log(experts) ** 2)


def test_all_kept_is_always_one_and_the_first_choice_is_the_most_probable():
    logits, mask = logits_of(), torch.ones(TOKENS)
    assert load_balancing(logits, None, mask).item() == pytest.approx(1, abs=1e-14)
    order = logits.detach().argsort(dim=-1, descending=True, stable=True)
    assert gshard(logits, None, mask) == gshard(logits, order, mask)
    assert gshard(logits, None, mask) == load_balancing(logits, order[:, :1], mask)
    tied = torch.zeros(3, 4, dtype=torch.float64)
    assert gshard(tied, None, torch.ones(3)) == gshard(tied, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3))


def test_one_expert_for_all_costs_most():
    logits = torch.zeros(8, 4, dtype=torch.float64)
    logits[:, 2] = 50.0
    mask = torch.ones(8)
    indices = logits.argmax(-1, keepdim=True)
    assert load_balancing(logits, indices, mask).item() == pytest.approx(4)
    assert mole_balance([logits], [mask]).item() == pytest.approx(150)  # -3 log exp(-50)


def test_underflow_leaves_mole_balance_a_gradient():
    logits = torch.tensor([[0.0, -500.0]], dtype=torch.float32, requires_grad=True)
    loss = mole_balance([logits], [torch.ones(1)])
    loss.backward()
    assert loss.item() == pytest.approx(500)
    assert logits.grad.tolist() == [[1.0, -1.0]]


def test_orthogonal_and_parallel_outputs():
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    assert orthogonality(gram_of(eye), torch.ones(2)) == 0
    parallel = torch.tensor([[[3.0, 4.0], [6.0, 8.0]]], dtype=torch.float64)  # |v| = 5 and 10
    assert orthogonality(gram_of(parallel), torch.ones(1), eps=0.0).item() == pytest.approx((25 + 100) / 2)


def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="over to be 'tokens' or 'experts', but got 'layers'"):
        variance(torch.ones(1, 1), torch.ones(1), over="layers")


# ---- padding and degenerate batches ----


# The test's own product and softmax would already differentiate infinities to NaN.
FILLERS = {"orthogonality": (0.0, 1e4), "variance_experts": (0.0, 1e4)}


@pytest.mark.parametrize(
    ("name", "filler"), [(n, f) for n in LOSSES for f in FILLERS.get(n, (0.0, 1e4, math.inf, math.nan))]
)
def test_appended_padding_changes_nothing(name, filler):
    ours, _ = LOSSES[name]
    x, indices = logits_of(), select_top_k(logits_of(), 2, renormalize=True)[1]
    expected, slope = value_and_gradient(lambda x: ours(x, indices, REAL), x)
    longer = torch.cat([x.detach(), torch.full((5, EXPERTS), filler, dtype=torch.float64)]).requires_grad_()
    padding = torch.zeros(5, dtype=torch.bool)
    more = torch.cat([indices, torch.zeros(5, 2, dtype=torch.int64)])
    found, gradient = value_and_gradient(lambda x: ours(x, more, torch.cat([REAL, padding])), longer)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient[:TOKENS], slope, rtol=1e-13, atol=1e-17)
    assert gradient[TOKENS:].abs().sum() == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_batch_of_padding_gives_zero_and_no_gradient(name, dtype, tokens):
    ours, _ = LOSSES[name]
    x = logits_of(tokens=tokens).detach().to(dtype).requires_grad_()
    indices = torch.zeros(tokens, 1, dtype=torch.int64)
    value, gradient = value_and_gradient(lambda x: ours(x, indices, torch.zeros(tokens)), x)
    assert value == 0
    assert value.dtype == dtype
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_one_token_and_one_expert(name):
    ours, _ = LOSSES[name]
    one = torch.zeros(1, 1, dtype=torch.int64)
    value, gradient = value_and_gradient(lambda x: ours(x, one, torch.ones(1)), logits_of(tokens=1))
    assert value.isfinite()
    assert gradient.isfinite().all()
    if name == "variance_tokens":
        assert value == gradient.abs().sum() == 0
    if name == "orthogonality":
        return  # one expert: below
    value, gradient = value_and_gradient(
        lambda x: ours(x, one.expand(3, 1), torch.ones(3)), logits_of(experts=1, tokens=3)
    )
    assert value.isfinite()
    assert gradient.isfinite().all()
    if name not in ("z", "variance_tokens"):
        assert gradient.abs().sum() == 0
        assert value.item() == {"load_balancing": 1.0, "gshard": 1.0}.get(name, 0.0)


def test_orthogonality_of_one_expert_and_of_zero_outputs():
    lone = torch.randn(4, 1, 3, dtype=torch.float64, requires_grad=True)
    value, gradient = value_and_gradient(lambda v: orthogonality(gram_of(v), torch.ones(4)), lone)
    assert value == gradient.abs().sum() == 0
    for dtype in (torch.float32, torch.float64):
        fresh = torch.zeros(4, 3, 5, dtype=dtype, requires_grad=True)  # experts whose B is still zero
        value, gradient = value_and_gradient(lambda v: orthogonality(gram_of(v), torch.ones(4)), fresh)
        assert value == gradient.abs().sum() == 0


# ---- against transformers ----


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_is_that_of_transformers_divided_by_k(top_k, padded):
    """Theirs leaves k in: `transformers.models.mixtral`, which Mixtral, Qwen-MoE and OLMoE train with."""
    layers = tuple(logits_of(5, 12, seed).detach().float().requires_grad_() for seed in (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]) if padded else None
    theirs = load_balancing_loss_func(layers, 5, top_k, mask)
    logits = torch.cat(layers)  # they pool the tokens of all layers
    indices = select_top_k(logits, top_k, renormalize=True)[1]
    real = torch.ones(24) if mask is None else mask.flatten().repeat(2)
    ours = load_balancing(logits, indices, real)
    torch.testing.assert_close(ours, theirs / top_k, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, layers),
        tuple(g / top_k for g in torch.autograd.grad(theirs, layers)),
        rtol=1e-5,
        atol=1e-8,
    )


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_softmax_top_k_is_the_routing_of_mixtral(top_k):
    """Weights, experts and their order; Mixtral divides by the sum for k = 1 too (`renormalize: always`)."""
    torch.manual_seed(0)
    router = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=top_k))
    torch.nn.init.normal_(router.weight)
    experts = experts_of(8, in_features=16, dtype=torch.float32)
    bank = bank_of(experts)
    site = Site("layer", 16, bank.out_features, bank.rank, bank.names, "decoder")
    gate = partial(StretchGate, top_k=top_k, renormalize="always")(site)
    with torch.no_grad():
        gate.scorer.weight.copy_(router.weight)
    x = torch.randn(3, 5, 16, requires_grad=True)
    routing = gate(x, bank.project(x), bank, Context())
    logits, weights, indices = router(x)
    torch.testing.assert_close(routing.logits.flatten(0, 1), logits, rtol=1e-6, atol=1e-6)
    if top_k == 8:  # all are kept, in the experts' order
        weights = torch.zeros_like(weights).scatter(1, indices, weights)
    else:
        assert torch.equal(routing.indices.flatten(0, 1), indices)
    torch.testing.assert_close(routing.weights.flatten(0, 1), weights, rtol=1e-5, atol=1e-7)
    if top_k > 1:
        pattern = torch.arange(1, weights.numel() + 1).view_as(weights).float().cos()
        (theirs,) = torch.autograd.grad((weights * pattern).sum(), router.weight)
        (ours,) = torch.autograd.grad((routing.weights.flatten(0, 1) * pattern).sum(), gate.scorer.weight)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
