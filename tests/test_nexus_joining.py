"""An expert joins a fitted NexusGate without training: what changes for the others, and what must not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from builders import assert_near, bank_of, experts_of, layer_of, randomise, recorded, tiny_llama
from dense_comparison import dense_of
from torch import Tensor, nn

from radargate_pl.gates import Context, NexusGate
from radargate_pl.moe import MoELinear, attach, moe_layers
from radargate_pl.records import record_gates


def joined(
    width: int,
    rank: int,
    count: int,
    *,
    top_k: int = 2,
    out: int | None = None,
    scalings: tuple[float, ...] = (2.0,),
    **options: object,
) -> tuple[MoELinear, MoELinear]:
    """A layer of `count` experts, and the same with one more at the end, which took no training."""
    experts = experts_of(
        count + 1, in_features=width, out_features=out or width, ranks=(rank,), scalings=scalings, dtype=torch.float32
    )
    before = layer_of({n: experts[n] for n in list(experts)[:-1]}, partial(NexusGate, top_k=top_k, **options)).eval()
    after = layer_of(experts, partial(NexusGate, top_k=top_k, **options)).eval()
    join_gate(before.gate, after.gate)
    return before, after


def join_gate(before: NexusGate, after: NexusGate, seed: int = 3) -> None:
    """Fitted parameters for the first; the second takes them over and has the newcomer's domain."""
    domains = after.domain_embeddings.detach().clone()
    randomise(before, seed)
    fitted = before.state_dict()
    known = fitted["domain_embeddings"]
    with torch.no_grad():
        known.copy_(domains[: len(known)])
    after.load_state_dict({**fitted, "domain_embeddings": domains})


def unchanged(before: Tensor | None, after: Tensor, count: int) -> Tensor:
    """Which tokens keep the same experts: indices (..., K), `None` for all of `count`."""
    if before is None:
        before = torch.arange(count).expand(*after.shape[:-1], count)
    return (before.sort(-1).values == after.sort(-1).values).all(-1)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 15, 16])
@pytest.mark.parametrize("width", [6, 33, 64])
def test_scores_and_weights_stay_the_same_to_the_last_bit(width: int, count: int) -> None:
    before, after = joined(width, 3, count)
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = (recorded(layer, x)[1] for layer in (before, after))
    assert torch.equal(new.logits[:, :count], old.logits)
    same = unchanged(old.indices, new.indices, count)
    assert same.any()
    weights = [dense_of(r.weights, r.indices, n)[same, :count] for r, n in ((old, count), (new, count + 1))]
    assert torch.equal(*weights)


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize(("width", "rank"), [(6, 3), (32, 2), (32, 3), (64, 8), (256, 8)])
@pytest.mark.parametrize(
    ("top_k", "count"), [(2, 2), (2, 4), (3, 4), (2, 5), (3, 5), (2, 7), (2, 8), (3, 8), (2, 16), (2, 40)]
)
def test_outputs_of_tokens_whose_experts_stay_are_bit_equal(
    top_k: int, count: int, width: int, rank: int, tokens: int
) -> None:
    """The fused GEMMs of other gates differ in 1e-7 relative: at 40 experts of rank 8, and at small ranks."""
    before, after = joined(width, rank, count, top_k=top_k)
    for seed in range(4):
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            (y_before, old), (y_after, new) = recorded(before, x), recorded(after, x)
        same = unchanged(old.indices, new.indices, count)
        assert torch.equal(y_after[same], y_before[same])
        assert (y_after[~same] != y_before[~same]).any(-1).all()


def test_a_newcomer_with_another_scaling_changes_nothing_either() -> None:
    before, after = joined(64, 8, 4, scalings=(2.0, 2.0, 2.0, 2.0, 0.7))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (y_before, old), (y_after, new) = recorded(before, x), recorded(after, x)
    same = unchanged(old.indices, new.indices, 4)
    assert same.any()
    assert torch.equal(y_after[same], y_before[same])


def test_blocks_give_what_one_gemm_gives() -> None:
    bank = bank_of(experts_of(11))
    x = torch.randn(5, 6, dtype=torch.float64)
    weights = torch.randn(5, 11, dtype=torch.float64)
    plain = bank.weighted_sum(bank.project(x), weights)
    bank.in_blocks = True
    assert_near(bank.weighted_sum(bank.project(x), weights), plain, 1e-13, "weighted sum")
    assert_near(bank.total(bank.project(x)), bank.weighted_sum(bank.project(x), torch.ones_like(weights)), 1e-13, "S")


def gated(count: int, seed: int = 0) -> nn.Module:
    """A tiny Llama with the first `count` of five experts at q_proj and v_proj."""
    model, banks = tiny_llama(), {}
    for number, (path, module) in enumerate(model.named_modules()):
        if path.endswith(("q_proj", "v_proj")):
            sizes = {"in_features": module.in_features, "out_features": module.out_features}
            experts = experts_of(5, ranks=(8,), scalings=(2.0,), dtype=torch.float32, seed=number, **sizes)
            banks[path] = bank_of({f"e{i}": experts[f"e{i}"] for i in range(count)})
    attach(model, banks, partial(NexusGate, top_k=2), context=Context())
    return model.eval()


@torch.no_grad()
def test_in_a_model_tokens_that_no_layer_changed_are_bit_equal() -> None:
    """A token may change through any token before it: those count whose whole past kept its experts everywhere."""
    before, after = gated(4), gated(5)
    for seed, (old, new) in enumerate(zip(moe_layers(before).values(), moe_layers(after).values(), strict=True)):
        new.gate.domain_embeddings[-1] *= 0.3  # a newcomer that few tokens choose
        join_gate(old.gate, new.gate, seed)
    ids = torch.randint(97, (24, 6), generator=torch.Generator().manual_seed(1))
    with record_gates(before) as first:
        y_before = before(ids).logits
    with record_gates(after) as second:
        y_after = after(ids).logits
    kept = torch.ones_like(ids, dtype=torch.bool)
    for path, output in first.items():
        kept &= unchanged(output.indices, second[path].indices, 4)
    kept = kept.cumprod(1).bool()
    assert 10 < kept.sum() < kept.numel() - 10
    assert torch.equal(y_after[kept], y_before[kept])
    assert not torch.equal(y_after[~kept], y_before[~kept])


@torch.no_grad()
def test_at_one_expert_per_token_only_the_denominator_grows() -> None:
    before, after = joined(64, 8, 4, top_k=1)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    (y_before, old), (y_after, new) = recorded(before, x), recorded(after, x)
    same = unchanged(old.indices, new.indices, 4)
    base = before.base_layer(x)
    factor = old.logits.logsumexp(-1).exp() / new.logits.logsumexp(-1).exp()
    expected = base + factor.unsqueeze(-1) * (y_before - base)
    assert_near(y_after[same], expected[same], 1e-5, "output")
    assert (factor[same] < 1).all()
