"""torch.func, forward-mode derivatives and tracing give what loops and autograd give."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from builders import experts_of, layer_of, randomise
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from radargate_pl.gates import RadarGate, RotMoLEGate, StretchGate

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:There is a performance drop"
)

GATES = {
    "radar": partial(RadarGate, rotation_rank=3, top_k=2),
    "radar, all": partial(RadarGate, rotation_rank=3, top_k=5),
    "stretch": partial(StretchGate, top_k=2),
    "rotmole": RotMoLEGate,
}


def layer(gate: Any, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    made = layer_of(experts_of(5, dtype=dtype), gate)
    randomise(made.gate)
    return made.to(dtype).eval()


def inputs(rows: int, made: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, made.base_layer.in_features, dtype=dtype, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("grads", [True, False])
def test_vmap_is_the_loop(gate: Any, grads: bool) -> None:
    made = layer(gate)
    x = inputs(4, made)
    with torch.set_grad_enabled(grads):
        expected = torch.stack([made(row) for row in x])
        torch.testing.assert_close(vmap(made)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gradients_of_each_sample_are_those_of_autograd(gate: Any) -> None:
    made = layer(gate)
    x, trained = inputs(3, made), {name: p for name, p in made.named_parameters() if p.requires_grad}
    detached = {name: p.detach() for name, p in trained.items()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(made, parameters, (row,)).sin().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(detached, x)
    for number, row in enumerate(x):
        expected = torch.autograd.grad(made(row).sin().sum(), list(trained.values()), allow_unused=True)
        for name, one in zip(trained, expected, strict=True):
            one = torch.zeros_like(trained[name]) if one is None else one
            torch.testing.assert_close(found[name][number], one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_forward_mode_is_the_jacobian(gate: Any) -> None:
    made = layer(gate)
    x = inputs(1, made)[0]
    tangent = torch.randn_like(x)
    jacobian = jacrev(made)(x)
    expected = torch.einsum("abij,ij->ab", jacobian, tangent)
    torch.testing.assert_close(jvp(made, (x,), (tangent,))[1], expected, rtol=1e-9, atol=1e-10)
    with torch.no_grad(), forward_ad.dual_level():
        y = made(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_a_trace_computes_what_the_layer_computes(gate: Any) -> None:
    """Native code writes into memory that a tracer does not see: a trace of it returned whatever lay there."""
    made = layer(gate, torch.float32)
    x = inputs(2, made, torch.float32)
    with torch.no_grad():
        made(x[:1])
        traced = torch.jit.trace(made, (x[:1],), check_trace=False)
        for one in (x[:1], 2 * x[1:]):
            torch.testing.assert_close(traced(one), made(one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_an_export_computes_what_the_layer_computes(gate: Any) -> None:
    made = layer(gate, torch.float32)
    x = inputs(2, made, torch.float32)
    with torch.no_grad():
        exported = torch.export.export(made, (x,)).module()
        torch.testing.assert_close(exported(2 * x), made(2 * x), rtol=1e-4, atol=1e-4)
