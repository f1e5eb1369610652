"""One comparison of a layer with a dense oracle: output, weights, selections, logits, every gradient; float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from builders import assert_near, layer_of, randomise, recorded
from reference import Expert, expert_outputs, mixture
from torch import Tensor

from radargate_pl.gates import Context
from radargate_pl.moe import MoELinear

Weights = Callable[..., tuple]


def layer_in_float64(gate: type, experts: Mapping[str, Expert], *, seed: int = 3, **options: object) -> MoELinear:
    """The product's layer in evaluation mode, every parameter of the gate away from its start."""
    layer = layer_of(experts, partial(gate, **options), context=Context())
    layer.gate.double()
    randomise(layer.gate, seed)
    return layer.eval()


def assert_equals_dense(
    layer: MoELinear, experts: Mapping[str, Expert], x: Tensor, weights_of: Weights, **options: object
) -> None:
    """Compare on x (T, in); `options` go to the oracle."""
    x = x.detach().requires_grad_()
    torch.manual_seed(17)
    y, record = recorded(layer, x, angles=False)
    state = dict(layer.named_parameters())
    outputs = expert_outputs(x, list(experts.values()))
    weights, logits, chosen = weights_of(x, outputs, list(experts.values()), state, **options)
    P, Q = state.get("gate.rotation.P"), state.get("gate.rotation.Q")
    expected = x @ state["base_layer.weight"].T + state["base_layer.bias"] + mixture(outputs, weights, P, Q, "rms")[0]
    assert_near(y, expected, 1e-12, "output")
    assert_near(dense_of(record.weights, record.indices, len(experts)), weights, 1e-12, "weights")
    assert_near(record.logits, logits, 1e-12, "logits")
    if record.indices is not None:
        assert [tuple(row) for row in record.indices.tolist()] == chosen
    trained = {name: p for name, p in layer.gate.named_parameters() if p.requires_grad}
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    leaves = (x, *trained.values())
    given = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad((y * direction).sum(), leaves, **given)
    wanted = torch.autograd.grad((expected * direction).sum(), leaves, **given)
    for name, got, want in zip(["x", *trained], ours, wanted, strict=True):
        assert_near(got, want, 1e-10, f"gradient of {name}")


def dense_of(weights: Tensor, indices: Tensor | None, count: int) -> Tensor:
    """Weights (T, K) spread over all experts."""
    if indices is None:
        return weights
    return torch.zeros(len(weights), count, dtype=weights.dtype).scatter_(1, indices, weights.detach())


def assert_finite(layer: MoELinear, x: Tensor) -> None:
    """Output and all gradients, also where they are zero."""
    x = x.detach().requires_grad_()
    y = layer(x)
    parameters = [p for p in layer.gate.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y.square().sum(), (x, *parameters), allow_unused=True, materialize_grads=True)
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
