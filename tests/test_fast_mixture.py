"""The fast mixture against plain operations and the dense oracle: results, gradients, what is kept, when it is used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from builders import IN, assert_near, bank_of, batch, experts_of, gated_llama, layer_of, randomise, recorded, site_of
from mixture_switch import IS_PLAIN
from reference import Expert, expert_outputs
from reference_rotations import dense_rotated_layer
from test_memory_bound import TensorCounter, saved_tensors
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from radargate_pl import fast_mixture
from radargate_pl.combines import COMBINES
from radargate_pl.fast_mixture import reads_input
from radargate_pl.gates import Context, NexusGate, RadarGate, RotationGate, Routing, StretchGate, TaskGate, TutelGate
from radargate_pl.kept_grams import kept_gram
from radargate_pl.mixture import mix
from radargate_pl.moe import MoELinear, attach, moe_layers
from radargate_pl.rotations import NoRotation, RadarRotation

pytestmark = pytest.mark.skipif(IS_PLAIN, reason="this run is on plain operations")

FEW, MANY = 4, 14  # with top_k 2 and a rotation: from latents, and from the input
GATES = [
    *(partial(RadarGate, top_k=k, angle_norm=norm) for k in (1, 2, 3) for norm in ("none", "rms")),
    partial(RadarGate, top_k=2, scorer="experts", renormalize="never", temperature=0.7, output_scale="learned"),
    partial(RadarGate, top_k=FEW),
    *(partial(StretchGate, top_k=k) for k in (1, 2)),
    partial(StretchGate, top_k=2, scorer="experts"),
    partial(RotationGate, top_k=2),
]


def name_of(gate: partial) -> str:
    return "-".join([gate.func.__name__, *map(str, gate.keywords.values())])


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each fast mixture that is made: whether it started from the input."""
    calls = []

    def counted(latents: Tensor, *rest: object, **options: object) -> Tensor:
        calls.append(latents.shape[-1] == 0)
        return fast_mixture.fast_mix(latents, *rest, **options)

    monkeypatch.setattr("radargate_pl.mixture.fast_mix", counted)
    return calls


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 11) -> Tensor:
    return (0.5 * torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def trained(layer: MoELinear) -> list[Tensor]:
    return [parameter for parameter in layer.gate.parameters() if parameter.requires_grad]


def results(layer: MoELinear, x: Tensor, mixture: str, run: Callable | None = None) -> list[Tensor]:
    """Output and gradients of x and of all that trains."""
    layer.mixture = mixture
    x = x.detach().requires_grad_()
    y = layer(x) if run is None else run(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * direction).sum(), [x, *trained(layer)])]


def layer_in(dtype: torch.dtype, gate: Callable, count: int, **sizes: object) -> MoELinear:
    layer = layer_of(experts_of(count, dtype=dtype, **sizes), gate)
    if dtype == torch.float64:
        layer.gate.double()
    randomise(layer.gate)
    return layer


@pytest.mark.parametrize("gate", GATES, ids=name_of)
@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize(
    "sizes", [{"out_features": 9}, {"out_features": 8, "scalings": (2.0,), "ranks": (2,)}], ids=str
)
def test_results_are_those_of_plain_operations(
    gate: partial, count: int, sizes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd and even widths, padded and equal ranks, several scalings and one."""
    calls = count_calls(monkeypatch)
    for dtype, relative in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        layer = layer_in(dtype, gate, count, **sizes)
        x = tokens(3, 5, dtype=dtype)
        forms = [results(layer, x, mixture) for mixture in ("auto", "torch", "plain")]
        for native, ours, plain in zip(*forms, strict=True):
            assert_near(native, plain, relative, f"{dtype} {tuple(plain.shape)}, native")
            assert_near(ours, plain, relative, f"{dtype} {tuple(plain.shape)}")
    reads_latents = gate.func is RotationGate or gate.keywords.get("scorer") == "experts"
    starts_from_input = reads_input(x, layer.gate, layer.bank, layer.combine, None)
    is_used = layer.gate.rotation.acts_on_outputs or count == MANY
    assert calls == [starts_from_input] * 4 * is_used
    assert starts_from_input <= (not reads_latents)
    if gate.func is RadarGate and gate.keywords["top_k"] == 2:
        assert starts_from_input == (count == MANY and not reads_latents)


# The oracle has no learned scale: with one, only plain operations are compared.
@pytest.mark.parametrize("gate", [g for g in GATES[:8] if "output_scale" not in g.keywords], ids=name_of)
@pytest.mark.parametrize("count", [FEW, MANY])
def test_results_are_those_of_dense_experts(gate: partial, count: int) -> None:
    experts = experts_of(count)
    layer, x = layer_in(torch.float64, gate, count), tokens(7).requires_grad_()
    y, record = recorded(layer, x, angles=False)
    options = {name: value for name, value in gate.keywords.items() if name not in ("output_scale", "temperature")}
    state = dict(layer.named_parameters())
    expected = dense_rotated_layer(x, list(experts.values()), state, gate=gate.func.__name__, **options)
    assert_near(y, expected.output, 1e-11, "output")
    if record.indices is not None:
        assert [tuple(row) for row in record.indices.tolist()] == expected.chosen
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaves = [x, *trained(layer)]
    ours = torch.autograd.grad((y * direction).sum(), leaves)
    dense = torch.autograd.grad((expected.output * direction).sum(), leaves, materialize_grads=True, allow_unused=True)
    for got, wanted in zip(ours, dense, strict=True):
        assert_near(got, wanted, 1e-10, f"gradient {tuple(wanted.shape)}")


# Without a rotation all experts are one product, and no form of this mixture.
@pytest.mark.parametrize(
    ("norm", "form"),
    [*((n, f) for n in ("none", "rms") for f in ("latents", "input", "all")), (None, "latents"), (None, "input")],
)
@pytest.mark.parametrize("may_be_native", [True, False], ids=["native", "torch"])
def test_gradients_are_those_of_finite_differences(norm: str | None, form: str, may_be_native: bool) -> None:
    bank, site = bank_of(experts_of(3, out_features=5)), site_of(5)
    rotation = NoRotation(site) if norm is None else RadarRotation(site, rotation_rank=2, angle_norm=norm).double()
    randomise(rotation)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, IN, dtype=torch.float64, generator=generator, requires_grad=True)
    latents = bank.project(x).detach().clone().requires_grad_() if form != "input" else x.new_empty(2, 3, 0)
    indices = None if form == "all" else torch.tensor([[2, 0], [1, 2]])
    weights = torch.rand(2, 3 if form == "all" else 2, dtype=torch.float64, generator=generator, requires_grad=True)
    source = x if form == "input" else latents

    def mixed(*_: Tensor) -> Tensor:
        return fast_mixture.fast_mix(latents, Routing(weights, indices, None), bank, rotation, x, may_be_native)

    assert torch.autograd.gradcheck(mixed, (source, weights, *rotation.parameters()))


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("count", [FEW, MANY])
def test_weights_of_zero_and_outputs_of_zero(norm: str, count: int) -> None:
    """An expert with weight zero still has a gradient for its weight; one that puts out nothing has finite ones."""
    bank, rotation = bank_of(experts_of(count)), RadarRotation(site_of(), angle_norm=norm).double()
    randomise(rotation)
    with torch.no_grad():
        bank.lora_B[1].zero_()
    generator = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(6)])
    indices[0] = torch.tensor([1, 0])
    given = torch.rand(6, 2, dtype=torch.float64, generator=generator)
    given[:, 1] = 0
    given[3] = 0
    found = []
    for mixture in ("auto", "plain"):
        x, weights = tokens(6).requires_grad_(), given.clone().requires_grad_()
        routing = Routing(weights, indices, None)
        latents = bank.project(x) if mixture == "plain" or count == FEW else x.new_empty(6, count, 0)
        mixed = mix(latents, routing, bank, COMBINES["sum"], rotation, x, mixture=mixture)
        found.append([mixed, *torch.autograd.grad(mixed.sin().sum(), (x, weights, rotation.P, rotation.Q))])
    for ours, plain in zip(*found, strict=True):
        assert_near(ours, plain, 1e-9, f"{tuple(plain.shape)}")
    assert found[0][2][:, 1].abs().max() > 1e-3


@pytest.mark.parametrize("gate", [RadarGate, StretchGate])
@pytest.mark.parametrize(("count", "width"), [(14, 64), (40, 8)])
def test_no_more_is_saved_than_latents_weights_and_indices(gate: type, count: int, width: int) -> None:
    sizes = {"in_features": width, "out_features": 53, "ranks": (3,)}
    layer = layer_of(experts_of(count, dtype=torch.float32, **sizes), partial(gate, top_k=2))
    x = torch.randn(101, width, requires_grad=True)
    layer(x)  # W_sum and the scalings are made now
    remembered = [kept._value for kept in layer.bank._cache.values()]
    with saved_tensors(x, *layer.parameters(), *remembered) as saved:
        y = layer(x)
    assert y.requires_grad
    assert 0 < sum(saved.values()) <= 101 * (count * 3 + 2 * 2)
    layer.mixture = "plain"
    with saved_tensors(x, *layer.parameters()) as plain:
        layer(x)
    assert sum(plain.values()) > sum(saved.values())


@pytest.mark.parametrize(("count", "width", "top_k"), [(9, 53, 2), (41, 20, 2), (41, 20, 41)])
def test_no_tensor_is_wider_than_the_bound(count: int, width: int, top_k: int) -> None:
    """From latents, from the input, and from latents with all experts kept."""
    sizes = {"in_features": width, "out_features": 53, "ranks": (3,)}
    layer = layer_of(experts_of(count, dtype=torch.float32, **sizes), partial(RadarGate, top_k=top_k))
    randomise(layer.gate)
    x = torch.randn(1009, width, requires_grad=True)
    with TensorCounter() as counter:
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert 1009 * 53 <= counter.widest <= 1009 * max(count * 3, 2 * 53, width), counter.operation
    with TensorCounter() as counter:
        y = layer(x)
    assert reads_input(x, layer.gate, layer.bank, layer.combine, None) == (count == 41 and top_k == 2)
    assert counter.alive(x, y, *layer.parameters()) <= 1009 * (count * 3 + 2 * top_k) + count + width * 53


@pytest.mark.parametrize("gate", [RadarGate, partial(RadarGate, angle_norm="none"), StretchGate])
@pytest.mark.parametrize("count", [FEW, 40])
def test_in_bfloat16_nothing_is_further_from_the_truth_than_plain_operations(gate: Callable, count: int) -> None:
    experts = experts_of(count, dtype=torch.bfloat16, out_features=12)
    layer = layer_in(torch.bfloat16, gate, count, out_features=12)
    wide = layer_of({n: Expert(a.double(), b.double(), s) for n, (a, b, s) in experts.items()}, gate)
    wide.load_state_dict(layer.state_dict())
    wide.double()
    x = tokens(64, dtype=torch.bfloat16)
    true = results(wide, x.double(), "plain")
    fast, plain = (results(layer, x, mixture) for mixture in ("auto", "plain"))
    for ours, theirs, expected in zip(fast, plain, true, strict=True):
        assert ours.dtype == theirs.dtype
        errors = [(found.double() - expected).norm() / expected.norm() for found in (ours, theirs)]
        assert errors[0] <= 1.2 * errors[1] + 2**-9, f"{tuple(expected.shape)}: {errors}"


@pytest.mark.parametrize("count", [FEW, 40])
def test_autocast_changes_what_it_changes_in_plain_operations_and_no_more(count: int) -> None:
    """Also where the backward pass runs inside it."""
    layer, x = layer_in(torch.float32, RadarGate, count), tokens(16, dtype=torch.float32)
    expected = results(layer, x, "plain")
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(layer, x, "auto")
    for ours, plain in zip(inside, expected, strict=True):
        assert (ours - plain).norm() <= 0.03 * plain.norm()


@pytest.mark.parametrize("gate", [RadarGate, StretchGate, TutelGate])
@pytest.mark.parametrize("count", [FEW, 40])
def test_activation_checkpointing_and_records_change_nothing(gate: type, count: int) -> None:
    """A recorder sees latents with a gradient, also where the mixture makes none; recomputation has no recorder."""
    layer, x = layer_in(torch.float64, gate, count), tokens(2, 5)
    records = []
    layer.recorder = lambda *seen: records.append(seen)
    found = results(layer, x, "auto", lambda z: checkpoint(_recorded_once, layer, z, use_reentrant=False))
    layer.recorder = None
    for ours, plain in zip(found, results(layer, x, "plain"), strict=True):
        assert_near(ours, plain, 1e-11, f"{tuple(plain.shape)}")
    latents = records[0][2]
    assert len(records) == 1
    assert_near(latents, layer.bank.project(x), 1e-13, "latents")


def _recorded_once(layer: MoELinear, x: Tensor) -> Tensor:
    try:
        return layer(x)
    finally:
        layer.recorder = None


@pytest.mark.parametrize("gate", [RadarGate, StretchGate])
def test_inner_products_of_recorded_outputs_have_the_gradients_of_plain_operations(gate: type) -> None:
    from radargate_pl.records import record_gates

    layer, found = layer_in(torch.float64, gate, 40), []
    for mixture in ("auto", "plain"):
        layer.mixture, x = mixture, tokens(4).requires_grad_()
        model = torch.nn.ModuleDict({"layer": layer})
        with record_gates(model, latents=True) as outputs:
            layer(x)
        found.append(torch.autograd.grad(kept_gram(layer, outputs["layer"]).sin().sum(), x)[0])
    assert_near(*found, 1e-10, "gradient of x")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of what torch does there itself
@pytest.mark.parametrize("scalings", [(2.0, 1.0, 3.27), (2.0,)])
@pytest.mark.parametrize("top_k", [1, 2, FEW])
def test_inside_compile_only_native_code_is_not_plain(
    top_k: int, scalings: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    for gate, mixture in ((RadarGate, "auto"), (RadarGate, "torch"), (StretchGate, "auto")):
        layer = layer_in(torch.float64, partial(gate, top_k=top_k), FEW, scalings=scalings)
        x = tokens(5)
        expected = results(layer, x, "plain")
        calls.clear()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        for ours, plain in zip(results(layer, x, mixture, compiled), expected, strict=True):
            assert_near(ours, plain, 1e-12, f"{tuple(plain.shape)}")
        assert calls == [False] * (gate is RadarGate and mixture == "auto")
        torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("scalings", [(2.0, 1.0, 3.27), (2.0,)])
def test_a_graph_starts_from_the_input_where_eager_code_does(
    scalings: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    layer, x = layer_in(torch.float64, RadarGate, MANY, scalings=scalings), tokens(5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    layer.mixture = "plain"
    assert not layer.fold_for_graph(x)
    for _ in range(2):
        expected = results(layer, x, "plain")
        layer.mixture = "auto"
        assert layer.fold_for_graph(x)
        for ours, plain in zip(results(layer, x, "auto", compiled), expected, strict=True):
            assert_near(ours, plain, 1e-12, f"{tuple(plain.shape)}")
        with torch.no_grad():
            layer.bank.lora_B.mul_(-0.7)  # seen by the next step
    assert set(calls) == {True}
    layer.mixture = "torch"
    assert not layer.fold_for_graph(x)
    assert layer.bank.W_sum.value is None
    assert not layer_in(torch.float64, RadarGate, FEW).fold_for_graph(x)
    assert not layer_in(torch.float64, StretchGate, MANY).fold_for_graph(x)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("count", "gate", "options"),
    [
        (1, partial(RadarGate, top_k=1), {}),
        (4, RadarGate, {"trainable": True}),
        (4, TaskGate, {}),
        (4, NexusGate, {}),
        (4, StretchGate, {"combine": "gram_schmidt"}),
        (4, StretchGate, {"combine": "separate"}),
        (4, partial(StretchGate, top_k=4), {}),
        (12, StretchGate, {}),
        (4, partial(RadarGate, rotation_sharing="per_expert"), {}),
        (4, partial(RadarGate, rotation_rank="full"), {}),
        (4, partial(RadarGate, angle_bound=1.0), {}),
    ],
    ids=str,
)
def test_it_steps_aside_for_everything_else(
    count: int, gate: Callable, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, context = count_calls(monkeypatch), Context()
    context.replace(expert=torch.tensor([2, 0]))
    layer = layer_of(experts_of(count, dtype=torch.float32, ranks=(2,)), gate, context=context, **options)
    layer(torch.randn(2, 3, IN, requires_grad=True)).sum().backward()
    assert calls == []


def test_shapes_that_are_empty_single_or_strided() -> None:
    for count in (FEW, 40):
        layer = layer_in(torch.float64, RadarGate, count)
        assert layer(tokens(0)).shape == (0, 9)
        single = tokens(3)
        assert_near(layer(single[1]), layer(single)[1], 1e-13, "a single vector")
        strided = tokens(5, 4).transpose(0, 1)
        for ours, plain in zip(*(results(layer, x, "auto") for x in (strided, strided.contiguous())), strict=True):
            assert_near(ours, plain, 1e-12, "strided")


@pytest.mark.parametrize("count", [FEW, 40])
def test_experts_that_change_between_the_passes_are_noticed_and_sums_of_them_follow(count: int) -> None:
    layer, x = layer_in(torch.float64, RadarGate, count), tokens(5).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        layer.bank.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    for ours, plain in zip(*(results(layer, x, mixture) for mixture in ("auto", "plain")), strict=True):
        assert_near(ours, plain, 1e-11, f"{tuple(plain.shape)}")


def test_a_backward_pass_that_needs_no_gradient_of_x() -> None:
    for gate in (RadarGate, StretchGate):
        layer = layer_in(torch.float64, gate, MANY)
        direct = torch.autograd.grad(layer(tokens(5)).sin().sum(), trained(layer))
        layer.mixture = "plain"
        for ours, plain in zip(direct, torch.autograd.grad(layer(tokens(5)).sin().sum(), trained(layer)), strict=True):
            assert_near(ours, plain, 1e-11, f"{tuple(plain.shape)}")


def test_with_a_fresh_rotation_it_equals_stretching_alone() -> None:
    for count in (FEW, 40):
        experts = experts_of(count, dtype=torch.float32)
        rotating, stretching = layer_of(experts, RadarGate), layer_of(experts, StretchGate)
        x = tokens(9, dtype=torch.float32)
        assert_near(rotating(x), stretching(x), 4e-6, "output")
        x = x.double()
        dense = expert_outputs(x, [Expert(a.double(), b.double(), s) for a, b, s in experts.values()])
        assert len(dense) == count


def curve(mixture: str) -> list[float]:
    """Losses of ten steps of a tiny model that learns a padded batch by heart."""
    model, context = gated_llama(RadarGate)
    for layer in moe_layers(model).values():
        layer.mixture = mixture
    ids, real = batch()
    context.replace(tokens={"decoder": real})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        logits = model(ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits[real[:, 1:]], ids[:, 1:][real[:, 1:]])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_curves_lie_on_top_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = curve("plain")
    calls = count_calls(monkeypatch)
    fast = curve("auto")
    assert fast == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < plain[0] - 0.1
    assert len(calls) == 4 * 10


def test_an_unknown_mixture_is_refused_by_name() -> None:
    bank = bank_of(experts_of(2, dtype=torch.float32))
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(IN, 9)})
    with pytest.raises(ValueError, match="mixture to be 'auto', 'torch' or 'plain', but got 'quick'"):
        attach(model, {"layer": bank}, StretchGate, context=Context(), mixture="quick")
