"""The pure operations of layer 0 against explicit matrices, hand computation and `gradcheck`."""

from __future__ import annotations

import math

import pytest
import torch
from reference import choose, rotate_rows, softmax_top_k

from radargate_pl.ops import (
    dense_weights,
    gate_dtype,
    largest,
    one_hot_like,
    pack_latents,
    rms_normalize,
    rotate,
    routing_entropy,
    select_top_k,
)

WIDTHS = [1, 2, 3, 8, 11]


def vectors(width: int, tokens: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    angles = 3 * torch.randn(tokens, width // 2, generator=generator, dtype=torch.float64)
    return v, angles


@pytest.mark.parametrize("width", WIDTHS)
def test_rotate_equals_one_explicit_matrix_per_token(width: int) -> None:
    v, angles = vectors(width)
    torch.testing.assert_close(rotate(v, angles), rotate_rows(v, angles), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", [0, 1])
def test_rotate_keeps_norms_inner_products_and_the_odd_coordinate(width: int, seed: int) -> None:
    v, angles = vectors(width, seed=seed)
    u = vectors(width, seed=seed + 50)[0]
    rotated = rotate(v, angles)
    torch.testing.assert_close(rotated.norm(dim=-1), v.norm(dim=-1), rtol=1e-14, atol=0)
    torch.testing.assert_close((rotated * rotate(u, angles)).sum(-1), (v * u).sum(-1), rtol=1e-12, atol=1e-13)
    if width % 2:
        assert torch.equal(rotated[..., -1], v[..., -1])


@pytest.mark.parametrize("width", WIDTHS)
def test_rotations_form_a_group(width: int) -> None:
    v, a = vectors(width)
    b = vectors(width, seed=9)[1]
    torch.testing.assert_close(rotate(rotate(v, a), -a), v, rtol=0, atol=1e-14)
    torch.testing.assert_close(rotate(rotate(v, a), b), rotate(v, a + b), rtol=0, atol=1e-13)
    assert torch.equal(rotate(v, torch.zeros_like(a)), v)


def test_sign_follows_equations_17_and_18_and_not_the_row_form_of_equation_6() -> None:
    v, a = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), torch.tensor([0.3, -0.7], dtype=torch.float64)
    c, s = a.cos(), a.sin()
    by_hand = torch.stack(
        [v[0] * c[0] - v[1] * s[0], v[0] * s[0] + v[1] * c[0], v[2] * c[1] - v[3] * s[1], v[2] * s[1] + v[3] * c[1]]
    )
    torch.testing.assert_close(rotate(v, a), by_hand, rtol=1e-15, atol=0)
    row_form = [v[2 * m : 2 * m + 2] @ torch.tensor([[c[m], -s[m]], [s[m], c[m]]], dtype=v.dtype) for m in range(2)]
    torch.testing.assert_close(rotate(v, -a), torch.cat(row_form), rtol=1e-15, atol=0)
    quarter = rotate(torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([math.pi / 2], dtype=torch.float64))
    torch.testing.assert_close(quarter, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)


def test_rotate_broadcasts_over_any_leading_dimensions_and_strides() -> None:
    v, a = torch.randn(2, 3, 4, 7), torch.randn(2, 3, 4, 3)
    flat = rotate(v.reshape(-1, 7), a.reshape(-1, 3)).reshape(2, 3, 4, 7)
    assert torch.equal(rotate(v, a), flat)
    assert torch.equal(rotate(v.transpose(0, 2), a.transpose(0, 2)), flat.transpose(0, 2))


@pytest.mark.parametrize("width", [2, 5])
def test_gradcheck_rotate_and_rms_normalize(width: int) -> None:
    v, a = (t[:2].clone().requires_grad_() for t in vectors(width))
    assert torch.autograd.gradcheck(rotate, (v, a))
    assert torch.autograd.gradgradcheck(rotate, (v, a))
    assert torch.autograd.gradcheck(rms_normalize, (v,))


def test_rms_normalize_is_scale_free_and_finite_at_zero() -> None:
    v = torch.randn(4, 7, dtype=torch.float64)
    expected = v / torch.sqrt((v * v).mean(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(rms_normalize(v), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(rms_normalize(v), rms_normalize(1e3 * v), rtol=1e-6, atol=0)
    zero = torch.zeros(2, 5, requires_grad=True)
    rms_normalize(zero).sum().backward()
    torch.testing.assert_close(zero.grad, torch.full((2, 5), 1e4))


@pytest.mark.parametrize("experts", [1, 2, 5, 41])
@pytest.mark.parametrize("renormalize", [True, False])
def test_select_top_k_equals_a_python_sort(experts: int, renormalize: bool) -> None:
    logits = 2 * torch.randn(9, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(experts))
    for top_k in {1, 2, 3, experts, experts + 2}:
        weights, indices = select_top_k(logits, top_k, renormalize=renormalize)
        kept = min(top_k, experts)
        expected, chosen = softmax_top_k(logits, kept, 1.0, "always" if renormalize else "never")
        assert weights.shape == (9, kept)
        if indices is None:
            assert kept == experts
        else:
            assert [tuple(row) for row in indices.tolist()] == chosen
            assert indices.dtype == torch.int64
        torch.testing.assert_close(dense_weights(weights, indices, experts), expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("experts", [2, 5, 8, 40])
@pytest.mark.parametrize("renormalize", [True, False])
def test_ties_go_to_the_lowest_index(experts: int, renormalize: bool) -> None:
    logits = torch.zeros(3, experts)
    for top_k in range(1, min(experts, 4)):
        weights, indices = select_top_k(logits, top_k, renormalize=renormalize)
        assert indices is not None
        assert indices.tolist() == [list(range(top_k))] * 3
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / top_k if renormalize else 1 / experts))
    partly = torch.tensor([[0.0, 1.0, 1.0, -1.0, 1.0]])
    assert select_top_k(partly, 2, renormalize=True)[1].tolist() == [[1, 2]]
    assert choose(partly, 2) == [(1, 2)]


@pytest.mark.parametrize("experts", [1, 3, 9, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_are_those_of_a_stable_sort(experts: int, dtype: torch.dtype) -> None:
    """With many ties, infinities of both signs and numbers that are none; more of them than maxima are looked for."""
    generator = torch.Generator().manual_seed(experts)
    values = torch.randint(-2, 3, (400, experts), generator=generator).to(dtype)
    for special in (-torch.inf, torch.inf, torch.nan):
        values[torch.rand(values.shape, generator=generator) < 0.15] = special
    values[0] = -torch.inf
    values[1] = torch.nan
    before = values.clone()
    order = values.sort(dim=-1, descending=True, stable=True).indices
    for count in range(1, experts + 1):
        assert torch.equal(largest(values, count), order[:, :count])
    assert torch.equal(values.nan_to_num(7), before.nan_to_num(7))


def test_select_top_k_survives_logits_a_softmax_would_lose() -> None:
    logits = torch.tensor([[200.0, 0.0, -1.0], [-1e4, -1e4, -2e4]], requires_grad=True)
    weights, indices = select_top_k(logits, 2, renormalize=True)
    assert indices.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    weights.square().sum().backward()
    assert logits.grad.isfinite().all()


def test_select_top_k_gradients() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.9], [1.5, 0.1, -0.2, 0.8]], dtype=torch.float64, requires_grad=True)
    for renormalize in (True, False):
        for top_k in (1, 2, 4):
            assert torch.autograd.gradcheck(
                lambda z, k=top_k, r=renormalize: dense_weights(*select_top_k(z, k, renormalize=r), 4), (logits,)
            )
    (renormalised,) = torch.autograd.grad(select_top_k(logits, 2, renormalize=True)[0].square().sum(), logits)
    assert renormalised[0, :2].abs().max() == 0  # not kept, no gradient
    (raw,) = torch.autograd.grad(select_top_k(logits, 2, renormalize=False)[0].sum(), logits)
    assert (raw != 0).all()  # the denominator reaches every logit
    (only,) = torch.autograd.grad(select_top_k(logits, 1, renormalize=True)[0].sum(), logits)
    assert only.abs().max() == 0


def test_dense_weights_pack_latents_and_one_hot() -> None:
    weights, indices = torch.tensor([[0.7, 0.3], [1.0, 0.0]]), torch.tensor([[2, 0], [1, 2]])
    assert torch.equal(dense_weights(weights, indices, 3), torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]]))
    assert dense_weights(weights, None, 2) is weights
    latents = torch.arange(12.0).reshape(2, 3, 2)
    packed = pack_latents(latents, torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]))
    assert packed.tolist() == [[0, 1, 4, 6, 12, 15], [0, 0, 8, 9, 0, 0]]
    assert pack_latents(latents.bfloat16(), torch.ones(2, 3)).dtype == torch.bfloat16
    assert one_hot_like(torch.tensor([2, 0]), 3, torch.float64).tolist() == [[0, 0, 1], [1, 0, 0]]
    leaf = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: dense_weights(w, indices, 3), (leaf,))


def test_routing_entropy_by_hand() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.2, 0.2], [0.0, 0.0, 0.0]])
    expected = torch.tensor([math.log(2), 0.0, math.log(3), 0.0])
    torch.testing.assert_close(routing_entropy(weights), expected)
    p = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    assert routing_entropy(7 * p).item() == pytest.approx(-sum(q * math.log(q) for q in p.tolist()), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_gate_dtype_is_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert gate_dtype(dtype) == expected


def test_entropy_of_weights_with_zeros_has_a_finite_gradient() -> None:
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    routing_entropy(weights).sum().backward()
    assert weights.grad.isfinite().all()
