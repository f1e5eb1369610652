"""A few tokens without gradients go another way (layers that share an input at once); it must be the general one's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from builders import bank_of, experts_of, randomise
from quick_forms import FORMS, count_updates
from torch import Tensor, nn

from radargate_pl import decode_buffers, decode_mixture
from radargate_pl.gates import Context, RadarGate, RotationGate, StretchGate
from radargate_pl.moe import MoELinear, attach, moe_layers
from radargate_pl.native_decode import NativeDecodeMixture
from radargate_pl.prompt_gates import record_prompts
from radargate_pl.records import record_gates

pytestmark = pytest.mark.usefixtures("quick_decoding")

IN, WIDTHS = 70, {"q": 18, "k": 9, "v": 7}  # odd widths: the last coordinate has no partner
FEW = [1, 2, 8, 16]


class Projections(nn.Module):
    """Linear layers called with one input, as an attention does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, width in WIDTHS.items():
            setattr(self, name, nn.Linear(IN, width, dtype=dtype))


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = Projections(dtype)

    def forward(self, x: Tensor, order: str = "qkv") -> dict[str, Tensor]:
        return {name: getattr(self.attention, name)(x) for name in order}


def model_of(
    gate: Callable[..., Any] = RadarGate,
    *,
    count: int = 5,
    names: str = "qkv",
    dtype: torch.dtype = torch.float32,
    ranks: tuple[int, ...] = (3, 1, 2),
    seed: int = 0,
) -> Model:
    torch.manual_seed(seed)
    model = Model(dtype).requires_grad_(False)
    banks = {}
    for place, name in enumerate(names):
        sizes = {"in_features": IN, "out_features": WIDTHS[name], "ranks": ranks, "dtype": dtype}
        banks[f"attention.{name}"] = bank_of(experts_of(count, seed=10 * seed + place, **sizes))
    layers = attach(model, banks, gate, context=Context())
    for place, layer in enumerate(layers.values()):
        randomise(layer.gate, seed=place)
        if layer.gate.rotation.__dict__.get("angle_norm") == "none":  # angles of some radians, not of hundreds
            layer.gate.rotation.Q.data.mul_(0.01)
    return model


def layers_of(model: nn.Module) -> list[MoELinear]:
    return [module for module in model.modules() if isinstance(module, MoELinear)]


def tokens(count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, IN, generator=generator, dtype=torch.float64).to(dtype)


def generally(model: Model, x: Tensor) -> dict[str, Tensor]:
    """What the general path says, which runs wherever gradients are on."""
    with torch.enable_grad():
        return {name: y.detach() for name, y in model(x).items()}


@torch.no_grad()
def warmed(model: Model, count: int = 1, dtype: torch.dtype = torch.float32) -> Model:
    """A model that has watched one step, so that the next takes the quick way."""
    model(tokens(count, dtype, seed=99))
    return model


@pytest.fixture(params=FORMS)
def calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """How many layers each quick computation was for."""
    return count_updates(monkeypatch, request.param)


def assert_near_by_rounding(y: Tensor, expected: Tensor, largest_angle: float = 1.0, relative: float = 5e-6) -> None:
    """Two orders of float32 sums: they differ by the largest output, and by the angle, whose error grows with it."""
    error, bound = float((y - expected).abs().max()), relative * (1 + largest_angle) * float(expected.abs().max())
    assert error <= bound, f"{error} > {bound}"


@torch.no_grad()
def largest_angle(model: Model, x: Tensor) -> float:
    """The largest angle in radians that the general path turns by; 0 without a rotation."""
    paths = [path for path, layer in moe_layers(model).items() if layer.gate.rotation.acts_on_outputs]
    with record_gates(model, paths) as recorded:
        model(x)
    return max((float(recorded[path].angles.abs().max()) for path in paths), default=0.0)


def assert_equal_paths(model: Model, x: Tensor, tolerance: float = 2e-6) -> None:
    expected = generally(model, x)
    with torch.no_grad():
        found = model(x)
    for name, y in found.items():
        base = getattr(model.attention, name)
        base = getattr(base, "base_layer", base)(x)
        scale = (expected[name] - base).abs().max() + base.abs().max()
        assert y.shape == expected[name].shape
        assert y.dtype == expected[name].dtype
        assert (y - expected[name]).abs().max() <= tolerance * scale, name


GATES = {
    "radar": RadarGate,
    "radar-1": partial(RadarGate, top_k=1),
    "radar-3": partial(RadarGate, top_k=3, renormalize="never"),
    "radar-n": partial(RadarGate, top_k=5),
    "radar-raw": partial(RadarGate, angle_norm="none"),
    "radar-bounded": partial(RadarGate, angle_bound=0.5, rotation_rank=3),
    "radar-learned": partial(RadarGate, temperature="learned", output_scale="learned"),
    "radar-never": partial(RadarGate, renormalize="never", temperature=0.5, output_scale=2.0),
    "stretch": StretchGate,
    "stretch-1": partial(StretchGate, top_k=1),
    "stretch-n": partial(StretchGate, top_k=5),
    "stretch-always": partial(StretchGate, top_k=1, renormalize="always"),
}
WAYS = ("masked", "gathered", "collapsed")


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Few experts (masked latents), or so many that B is gathered: with S through the latents, or straight from x."""
    name: str = request.param
    if name != "masked":
        monkeypatch.setattr(decode_buffers, "MASKED_RANKS", 4)
        monkeypatch.setattr(decode_mixture, "MASKED_RANKS", 4)
        monkeypatch.setattr(decode_mixture, "COLLAPSED_SHARE", {"gathered": 0.0, "collapsed": 100.0}[name])
    return name


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("gate", GATES)
def test_outputs_are_those_of_the_general_path(gate: str, way: str, calls: list[int]) -> None:
    count = {"masked": 5, "gathered": 19, "collapsed": 21}[way]
    model = warmed(model_of(GATES[gate], count=count))
    for few in FEW:
        assert_equal_paths(model, tokens(few))
    assert calls[0] == 3, "the first token must go the quick way, all three at once"
    with torch.no_grad():
        model(tokens(1))
    plan = model.attention.q.shared_input._groups[model.attention.q].plan
    is_kept_whole = gate.endswith("-n") and way == "masked"
    assert plan.collapses == (way == "collapsed" and gate.startswith("radar"))
    if isinstance(plan, NativeDecodeMixture):
        return
    assert plan._steps[tokens(1).shape].buffers.is_masked == (way == "masked" or is_kept_whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [5, 90])
def test_other_dtypes(dtype: torch.dtype, count: int, calls: list[int]) -> None:
    model = model_of(RadarGate, count=count, ranks=(2,), dtype=dtype)
    if dtype == torch.float64:
        model = model.double()
    warmed(model, dtype=dtype)
    for few in FEW:
        assert_equal_paths(model, tokens(few, dtype), {torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype])
    assert calls[0] == 3


def test_more_tokens_take_the_general_path(calls: list[int]) -> None:
    assert_equal_paths(warmed(model_of()), tokens(17), 0.0)
    assert not calls


def test_equal_scores_choose_the_lowest_experts() -> None:
    model = model_of(count=90, ranks=(2,))
    for layer in layers_of(model):
        layer.gate.scorer.weight.data.zero_()
    assert_equal_paths(warmed(model), tokens(4))


def test_identical_and_zero_experts_give_numbers() -> None:
    model = model_of(count=2)
    for layer in layers_of(model):
        layer.bank.lora_B.data.zero_()
    warmed(model)
    with torch.no_grad():
        assert all(y.isfinite().all() for y in model(tokens(2)).values())


@pytest.mark.parametrize("order", ["qkv", "vqk", "kvq"])
def test_whoever_is_called_first_computes_for_all(order: str, calls: list[int]) -> None:
    model, x = model_of(), tokens(2)
    expected = generally(model, x)
    with torch.no_grad():
        model(tokens(2, seed=5))
        for turn in (order, "qkv", "vkq"):
            for name, y in model(x, turn).items():
                assert_near_by_rounding(y, expected[name])
    assert calls == [3, 3, 3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_changed_in_place_in_between_is_read_again(mode: Any, calls: list[int]) -> None:
    model, x = warmed(model_of()), tokens(2)
    first, second = generally(model, x), generally(model, 3 * x)
    with mode():
        x = x.clone()
        q = model.attention.q(x)
        x.mul_(3)
        k, v = model.attention.k(x), model.attention.v(x)
    assert_near_by_rounding(q, first["q"])
    assert_near_by_rounding(k, second["k"])
    assert_near_by_rounding(v, second["v"])


def test_an_equal_input_that_is_another_tensor_is_another_input(calls: list[int]) -> None:
    model, x = model_of(), tokens(1)
    expected = generally(model, x)
    warmed(model)
    with torch.no_grad():
        for _ in range(8):
            for name in "qkv":
                y = getattr(model.attention, name)(x.clone())
                assert_near_by_rounding(y, expected[name])
    assert calls[-1] == 1, "after a few wrong guesses each goes alone"


def test_layers_called_with_different_inputs_are_kept_apart(calls: list[int]) -> None:
    """Cross attention: q reads the decoder, k and v the encoder, and only in the first step."""
    model, x, memory = model_of(), tokens(1), tokens(3, seed=4)
    expected, kept = generally(model, x)["q"], generally(model, memory)
    with torch.no_grad():
        for step in range(4):
            assert_near_by_rounding(model.attention.q(x), expected)
            if step < 2:
                for name in "kv":
                    assert_near_by_rounding(getattr(model.attention, name)(memory), kept[name])
            x = x.clone()
    assert calls == [1, 2, 1, 1]


@pytest.mark.parametrize("names", ["q", "qv", "k"])
def test_where_only_some_have_experts(names: str, calls: list[int]) -> None:
    model = warmed(model_of(names=names))
    assert_equal_paths(model, tokens(2))
    assert calls == [len(names)]


def test_different_numbers_of_experts_are_computed_apart(calls: list[int]) -> None:
    torch.manual_seed(0)
    model = Model(torch.float32).requires_grad_(False)
    banks = {
        f"attention.{name}": bank_of(
            experts_of(count, in_features=IN, out_features=WIDTHS[name], dtype=torch.float32, ranks=(3,))
        )
        for name, count in (("q", 5), ("k", 3), ("v", 5))
    }
    for layer in attach(model, banks, RadarGate, context=Context()).values():
        randomise(layer.gate)
    assert_equal_paths(warmed(model), tokens(2))
    assert sorted(calls) == [1, 2]
    with torch.no_grad():
        for _ in range(5):
            model(tokens(2))
    assert sorted(calls) == [1] * 6 + [2] * 6, "none of them is a wrong guess"


def by_copy(model: Model) -> None:
    with torch.no_grad():
        for parameter in layers_of(model)[-1].gate.parameters():
            parameter.copy_(torch.randn(parameter.shape))


def by_optimizer(model: Model, kind: Any) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(parameters)
    sum(y.square().sum() for y in model(tokens(3, seed=8)).values()).backward()
    optimizer.step()


def by_experts(model: Model) -> None:
    bank = layers_of(model)[0].bank
    with torch.no_grad():
        bank.lora_A.mul_(1.5)
        bank.lora_B[1].neg_()


def by_state(model: Model, assign: bool) -> None:
    other = model_of(seed=3)
    by_copy(other)
    model.load_state_dict(other.state_dict(), assign=assign)


def by_inference(model: Model) -> None:
    with torch.inference_mode():
        for parameter in layers_of(model)[-1].gate.parameters():
            parameter.add_(1.0)


def by_data(model: Model) -> None:
    for parameter in layers_of(model)[1].gate.parameters():
        parameter.data = torch.randn(parameter.shape)


def by_new_gate(model: Model) -> None:
    layer = layers_of(model)[0]
    layer.gate = StretchGate(layer.gate.site)


def by_setting(model: Model) -> None:
    layers_of(model)[0].gate.temperature = 0.25


CHANGES: dict[str, Callable[[Model], object]] = {
    "copy_": by_copy,
    "AdamW": partial(by_optimizer, kind=partial(torch.optim.AdamW, lr=0.3)),
    "foreach": partial(by_optimizer, kind=partial(torch.optim.AdamW, lr=0.3, foreach=True)),
    "fused": partial(by_optimizer, kind=partial(torch.optim.AdamW, lr=0.3, fused=True)),
    "SGD": partial(by_optimizer, kind=partial(torch.optim.SGD, lr=0.01)),
    "experts": by_experts,
    "load": partial(by_state, assign=False),
    "assign": partial(by_state, assign=True),
    "inference mode": by_inference,
    "data": by_data,
    "gate": by_new_gate,
    "setting": by_setting,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("change", "count"), [*((name, 5) for name in CHANGES), *((n, 90) for n in CHANGES if n not in ("load", "assign"))]
)
def test_nothing_made_from_parameters_outlives_a_change(change: str, mode: Any, count: int, calls: list[int]) -> None:
    model, x = model_of(count=count, ranks=(3, 1, 2) if count == 5 else (8,)), tokens(2)
    with mode():
        model(x.clone())
        before = model(x.clone())
    assert calls == [3]
    CHANGES[change](model)
    twin = copy.deepcopy(model)  # gradients in the model itself would drop what it made
    expected, angle = generally(twin, x), largest_angle(twin, x)
    with mode():
        after = model(x.clone())
    assert len(calls) > 1
    assert any(not torch.allclose(before[name], expected[name], rtol=1e-3, atol=1e-3) for name in before)
    for name, y in after.items():
        assert_near_by_rounding(y, expected[name], angle)  # tens of radians after some of the changes


def test_a_generation_whose_prompts_are_recorded_goes_the_quick_way_behind_them(calls: list[int]) -> None:
    model, prompt = warmed(model_of()), tokens(6).transpose(0, 1)
    with torch.no_grad(), record_prompts(model, {"decoder": torch.ones(1, 6)}, torch.tensor([0])) as gates:
        model(prompt)
        assert calls == []
        counted = gates.summaries(1)
        model(tokens(1))
        assert_equal_paths(model, tokens(1, seed=2))
    assert set(calls) == {3}
    assert gates.summaries(1) == counted
    assert counted[0]["rms_angle_rad"] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moves_between_dtypes_are_followed(dtype: torch.dtype, calls: list[int]) -> None:
    model = warmed(model_of())
    assert_equal_paths(model, tokens(2))
    warmed(model.to(dtype), dtype=dtype)
    assert_equal_paths(model, tokens(2, dtype), {torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype])
    assert calls == [3, 3]
    assert all(layer.shared_input._x is None for layer in layers_of(model))


def test_weights_that_change_at_every_step_are_not_fused_at_every_step(calls: list[int]) -> None:
    model, x = warmed(model_of()), tokens(1)
    with torch.no_grad():
        for _ in range(12):
            layers_of(model)[1].gate.scorer.weight.mul_(1.1)
            y = model(x)
        shared_input = model.attention.q.shared_input
        shared_input.forget()
        for name, expected in model(x).items():
            assert_near_by_rounding(y[name], expected)
    assert 0 < len(calls) < 8


def test_a_recorder_gets_what_it_always_gets(calls: list[int]) -> None:
    model, x = warmed(model_of()), tokens(2)
    with record_gates(model) as expected:
        generally(model, x)
    with torch.no_grad(), record_gates(model) as found:
        model(x)
    assert not calls
    for path, output in expected.items():
        assert torch.equal(found[path].indices, output.indices)
        assert torch.equal(found[path].weights, output.weights.detach())
    assert_equal_paths(model, x)
    assert calls == [3]


def test_hooks_on_a_gate_are_called() -> None:
    model, seen = warmed(model_of()), []
    layers_of(model)[0].gate.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(tokens(1))
    assert seen == [1]


def test_gradients_go_the_general_way(calls: list[int]) -> None:
    model, x = warmed(model_of()), tokens(1).requires_grad_()
    sum(y.sum() for y in model(x).values()).backward()
    assert not calls
    assert x.grad is not None


def test_gates_that_are_not_known_go_the_general_way(calls: list[int]) -> None:
    for gate in (RotationGate, partial(RadarGate, rotation_sharing="per_expert"), partial(RadarGate, scorer="experts")):
        assert_equal_paths(warmed(model_of(gate)), tokens(1), 0.0)
    assert not calls


def test_copies_compute_for_themselves() -> None:
    model = warmed(model_of())
    with torch.no_grad():
        model(tokens(1))
    other = copy.deepcopy(model)
    by_copy(other)
    assert other.attention.q.shared_input is other.attention.v.shared_input
    assert other.attention.q.shared_input is not model.attention.q.shared_input
    for one in (warmed(other), model):
        assert_equal_paths(one, tokens(1), 1e-5)  # the changed gate turns by many radians, which rounding shifts


def test_networks_take_turns() -> None:
    first, second = (warmed(model_of(seed=seed)) for seed in (0, 1))
    x = tokens(1)
    expected = generally(first, x), generally(second, x)
    with torch.no_grad():
        mixed = {name: (getattr(first.attention, name)(x), getattr(second.attention, name)(x)) for name in "qkv"}
    for name, found in mixed.items():
        for y, one in zip(found, expected, strict=True):
            assert_near_by_rounding(y, one[name])


def test_another_thread_takes_the_general_path(calls: list[int]) -> None:
    model, x, found = warmed(model_of()), tokens(1), []

    def run() -> None:
        with torch.no_grad():
            found.append(model(x))

    with torch.no_grad():
        model(tokens(1))
    before = len(calls)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(calls) == before
    for name, y in generally(model, x).items():
        assert torch.equal(found[0][name], y)
