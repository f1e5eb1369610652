"""No tensor of a layer is wider than its bound, and little is kept for the backward pass, counted op by op.

Sizes are primes, so that no two dimensions can be confused, and there are more tokens than any weight has rows: every
tensor made from parameters alone is then far below the per-token bound and nothing needs to be left out of the count.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from builders import experts_of, layer_of, randomise
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from radargate_pl.gates import (
    Context,
    ExpertChoiceGate,
    FixedGate,
    NexusGate,
    RadarGate,
    RotationGate,
    RotMoLEGate,
    StretchGate,
    TaskGate,
    TutelGate,
    UniformGate,
)
from radargate_pl.moe import MoELinear

EXPERTS, RANK, IN, OUT = 41, 3, 47, 53
TOKENS = 1009  # more than EXPERTS * RANK * OUT / (2 * OUT), so that weights stay below the bound
WIDEST = max(EXPERTS * RANK, 2 * OUT)

GATES = [
    *(
        partial(RadarGate, top_k=k, scorer=s, angle_norm=a)
        for k in (2, EXPERTS)
        for s, a in (("x", "rms"), ("experts", "none"))
    ),
    *(partial(StretchGate, top_k=k, scorer=s, renormalize="never") for k in (2, EXPERTS) for s in ("x", "experts")),
    *(partial(RotationGate, top_k=k) for k in (2, EXPERTS)),
    *(partial(RadarGate, top_k=k, rotation_sharing="per_expert", rotation_rank=2) for k in (2, EXPERTS)),
    partial(RadarGate, rotation_rank="full", angle_bound=1.0, temperature="learned", output_scale="learned"),
    *(partial(RotMoLEGate, top_k=k, trunk_rank=r) for k, r in ((2, None), (EXPERTS, 2))),
    *(partial(TutelGate, top_k=k, kind=kind, projection=64) for k in (2, EXPERTS) for kind in ("linear", "cosine")),
    *(partial(NexusGate, top_k=k) for k in (1, 2, EXPERTS)),
    ExpertChoiceGate,
    UniformGate,
    partial(FixedGate, weights={f"e{i}": 1.0 / (i + 1) for i in range(0, EXPERTS, 3)}),
    TaskGate,
]


def name_of(gate: Any) -> str:
    return f"{gate.func.__name__}-{gate.keywords}"[:60] if isinstance(gate, partial) else gate.__name__


class TensorCounter(TorchDispatchMode):
    """Remembers the widest tensor any operation returned, and which storages operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.widest, self.operation = 0, ""
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            # Views that repeat memory (expand) cost nothing: what counts is what the storage holds.
            size = min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
            if size > self.widest:
                self.widest, self.operation = size, f"{func} -> {tuple(tensor.shape)}"
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() // tensor.element_size())
        return result

    def alive(self, *excluded: Tensor) -> int:
        """Elements in storages made under this mode that still live, without those of the excluded tensors."""
        gc.collect()
        without = {tensor.untyped_storage()._cdata for tensor in excluded}
        return sum(n for key, (ref, n) in self.storages.items() if not ref.expired() and key not in without)


@contextmanager
def saved_tensors(*excluded: Tensor) -> Iterator[dict[tuple[int, int], int]]:
    """Elements autograd saves for the backward pass, once for each distinct storage."""
    without = {tensor.untyped_storage()._cdata for tensor in excluded}
    saved: dict[tuple[int, int], int] = {}
    kept = []  # storages stay alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in without:
            saved[storage._cdata] = storage.nbytes() // tensor.element_size()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def build(
    gate: Any,
    *,
    equal_scaling: bool = False,
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
    combine: str = "sum",
) -> MoELinear:
    scalings = (2.0,) if equal_scaling else (2.0, 1.0, 3.27)
    experts = experts_of(EXPERTS, in_features=IN, out_features=OUT, ranks=(RANK,), scalings=scalings, dtype=dtype)
    context = Context()
    layer = layer_of(experts, gate, context=context, trainable=trainable, combine=combine)
    context.replace(expert=torch.arange(TOKENS) % (EXPERTS + 1) - 1)
    randomise(layer.gate)
    return layer


def test_the_weights_alone_are_below_the_bound() -> None:
    layer = build(partial(RadarGate, scorer="experts"))
    assert max(parameter.numel() for parameter in layer.parameters()) <= TOKENS * WIDEST


@pytest.mark.parametrize("gate", GATES, ids=name_of)
@pytest.mark.parametrize("equal_scaling", [False, True], ids=["mixed scaling", "equal scaling"])
def test_no_tensor_of_forward_or_backward_is_wider_than_the_bound(gate: Any, equal_scaling: bool) -> None:
    layer = build(gate, equal_scaling=equal_scaling)
    x = torch.randn(TOKENS, 1, IN, requires_grad=True)
    with TensorCounter() as counter:
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert counter.widest >= TOKENS * OUT  # it did see the layer
    assert counter.widest <= TOKENS * WIDEST, f"{counter.widest / TOKENS:.1f} per token: {counter.operation}"
    assert x.grad is not None


COMBINED = [
    (StretchGate, 2, "gram_schmidt"),
    (StretchGate, EXPERTS, "gram_schmidt_unit"),
    (RadarGate, 2, "gram_schmidt"),
    *((StretchGate, k, "separate") for k in (2, EXPERTS)),
]


@pytest.mark.parametrize(("gate", "top_k", "combine"), COMBINED)
def test_the_bounds_hold_however_outputs_are_combined(gate: type, top_k: int, combine: str) -> None:
    layer = build(partial(gate, top_k=top_k), combine=combine)
    x = torch.randn(TOKENS, 1, IN, requires_grad=True)
    with TensorCounter() as counter:
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert counter.widest <= TOKENS * WIDEST, f"{counter.widest / TOKENS:.1f} per token: {counter.operation}"
    parameters = list(layer.parameters())
    del y
    with TensorCounter() as counter:
        y = layer(x)
    outlives = counter.alive(y, *parameters) + x.numel()
    bound = TOKENS * (EXPERTS * RANK + 4 * top_k * OUT)
    assert outlives <= bound, f"{outlives / TOKENS:.1f} per token, bound {bound / TOKENS}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [TaskGate, partial(RadarGate, scorer="experts")], ids=name_of)
def test_the_bound_holds_while_experts_train_and_in_bfloat16(gate: Any, dtype: torch.dtype) -> None:
    layer = build(gate, dtype=dtype, trainable=True)
    x = torch.randn(TOKENS, 1, IN, dtype=dtype, requires_grad=True)
    with TensorCounter() as counter:
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert counter.widest <= TOKENS * WIDEST, f"{counter.widest / TOKENS:.1f} per token: {counter.operation}"
    assert any(p.grad is not None for p in layer.bank.parameters())


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_decoding_a_few_tokens_makes_nothing_wider_than_the_weights(tokens: int, top_k: int) -> None:
    """Here weights exceed tokens * bound; a gather of `lora_B` per token would exceed the weights at 17 tokens."""
    layer = build(partial(RadarGate, top_k=top_k))
    weights = EXPERTS * RANK * max(IN, OUT)
    with torch.no_grad():
        for _ in range(3):  # in the first the layer watches, in the second it fuses its weights
            with TensorCounter() as counter:
                layer(torch.randn(tokens, 1, IN))
    assert counter.widest <= max(tokens * WIDEST, weights), counter.operation


@pytest.mark.parametrize("gate", GATES, ids=name_of)
def test_little_is_saved_for_the_backward_pass(gate: Any) -> None:
    """Counted twice: what autograd packs, and every storage of the forward that outlives it whoever holds it.

    The second count also sees what recomputation keeps outside autograd's view (arguments of checkpointed functions).
    """
    layer = build(gate)
    top_k = getattr(layer.gate, "top_k", EXPERTS)
    bound = TOKENS * (EXPERTS * RANK + 4 * top_k * OUT)
    x = torch.randn(TOKENS, 1, IN, requires_grad=True)
    layer(x)  # whatever a bank remembers of its frozen weights is made now
    parameters = list(layer.parameters())
    with saved_tensors(*parameters) as saved:
        y = layer(x)
    assert sum(saved.values()) <= bound
    del y
    with TensorCounter() as counter:
        y = layer(x)
    outlives = counter.alive(y, *parameters)
    x_is_saved = x.numel()  # made before the forward, so the second count does not see it
    assert outlives + x_is_saved <= bound, f"{(outlives + x_is_saved) / TOKENS:.1f} per token, bound {bound / TOKENS}"


def test_what_is_saved_for_all_experts_hardly_grows_with_k() -> None:
    """Every kept expert is recomputed: at k = n a layer keeps latents, S, x and its routing, not n outputs."""
    kept = {}
    for top_k in (2, EXPERTS):
        layer, x = build(partial(RadarGate, top_k=top_k)), torch.randn(TOKENS, IN, requires_grad=True)
        with TensorCounter() as counter:
            y = layer(x)
        kept[top_k] = counter.alive(y, *layer.parameters()) / TOKENS
    assert kept[EXPERTS] <= 2 * (EXPERTS * RANK + 2 * OUT) + 4 * EXPERTS


class WideBackward(torch.autograd.Function):
    """Makes a wide tensor in the backward pass alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * gradient.new_zeros(TOKENS, EXPERTS, OUT)[:, 0, :1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_counter_catches_dense_experts(dtype: torch.dtype) -> None:
    """The instrument itself: (T, E, out) is seen in the forward, in the backward, and among what is kept."""
    layer, x = build(UniformGate, dtype=dtype), torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True)
    with TensorCounter() as counter:
        outputs = torch.einsum("ter,eor->teo", layer.bank.project(x), layer.bank.lora_B)
        y = outputs.sin().sum(1)
    assert counter.widest == TOKENS * EXPERTS * OUT
    assert counter.alive(y, *layer.parameters()) >= TOKENS * EXPERTS * OUT
    with TensorCounter() as counter:
        WideBackward.apply(x).sum().backward()
    assert counter.widest == TOKENS * EXPERTS * OUT
    with saved_tensors(*layer.parameters()) as saved:
        nn.functional.linear(layer.bank.project(x).sin().flatten(1), layer.bank.lora_B.transpose(0, 1).flatten(1)).sin()
    assert sum(saved.values()) >= TOKENS * (EXPERTS * RANK + OUT)
