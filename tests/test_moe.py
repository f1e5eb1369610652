"""MoELinear in a model: put in, taken out, dropped out, copied, saved."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from builders import (
    IN,
    NEEDED,
    OUT,
    OneLinear,
    bank_of,
    batch,
    experts_of,
    gated_llama,
    layer_of,
    randomise,
    tiny_llama,
)
from reference import expert_outputs
from torch import nn

from radargate_pl.experts import ExpertBank
from radargate_pl.gates import ALL_GATES, Context, FixedGate, RadarGate, StretchGate, TaskGate, UniformGate
from radargate_pl.moe import attach, moe_layers, remove


@pytest.mark.parametrize("gate", ALL_GATES)
def test_removing_the_mixture_restores_the_model(gate: type) -> None:
    plain = tiny_llama()
    ids, _ = batch()
    expected, keys = plain(ids).logits, list(plain.state_dict())
    modules = {path: id(module) for path, module in plain.named_modules()}
    context = Context()
    context.replace(expert=torch.tensor([0, 1, -1]))
    paths = [path for path in modules if path.endswith(("q_proj", "v_proj"))]
    sizes = {path: plain.get_submodule(path) for path in paths}
    banks = {
        p: bank_of(experts_of(2, dtype=torch.float32, in_features=m.in_features, out_features=m.out_features))
        for p, m in sizes.items()
    }
    layers = attach(plain, banks, partial(gate, **NEEDED.get(gate, {})), context=context)
    assert list(moe_layers(plain)) == paths
    assert set(layers) == set(paths)
    for layer in layers.values():
        randomise(layer.gate)  # LoraHub starts at the bare backbone
    assert not torch.equal(plain(ids).logits, expected)
    remove(plain)
    assert list(plain.state_dict()) == keys
    assert {path: id(module) for path, module in plain.named_modules()} == modules
    assert torch.equal(plain(ids).logits, expected)
    remove(plain)  # nothing left: nothing to do


def test_the_layer_shows_its_base_layer() -> None:
    layer = layer_of(experts_of(2, dtype=torch.float32), StretchGate)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert layer_of(experts_of(2, dtype=torch.float32), StretchGate, bias=False).bias is None


def test_attach_refuses_what_does_not_fit_and_changes_nothing() -> None:
    bank = bank_of(experts_of(2, dtype=torch.float32))
    for banks, options, message in (
        ({"layer": bank, "nothing": bank}, {}, "'nothing' to be an nn.Linear of the model, but found NoneType"),
        ({"": bank}, {}, "found OneLinear"),
        ({"layer": bank}, {"combine": "mean"}, r"combine to be one of \['gram_schmidt', .*'sum'\], but got 'mean'"),
    ):
        model = OneLinear(IN, OUT, torch.float32)
        with pytest.raises(ValueError, match=message):
            attach(model, banks, StretchGate, context=Context(), **options)
        assert type(model.layer) is nn.Linear
    narrow = OneLinear(IN, OUT + 1, torch.float32)
    with pytest.raises(
        ValueError, match=f"experts at 'layer' to map {IN} to {OUT + 1} features, but they map {IN} to {OUT}"
    ):
        attach(narrow, {"layer": bank}, StretchGate, context=Context())
    gated = OneLinear(IN, OUT, torch.float32)
    attach(gated, {"layer": bank}, StretchGate, context=Context())
    with pytest.raises(ValueError, match="found MoELinear"):
        attach(gated, {"layer": bank}, StretchGate, context=Context())


def test_the_gate_knows_its_site() -> None:
    sites = []

    def gate(site: object) -> StretchGate:
        sites.append(site)
        return StretchGate(site)

    model, experts = OneLinear(IN, OUT, torch.float32), experts_of(3, dtype=torch.float32)
    experts.pop("e1")
    bank = bank_of(experts, library=("e2", "e1", "e0"))
    attach(model, {"layer": bank}, gate, context=Context(), streams={"layer": "encoder"})
    (site,) = sites
    assert (site.path, site.in_features, site.out_features, site.rank) == ("layer", IN, OUT, 3)
    assert (site.experts, site.stream) == (("e2", "e0"), "encoder")


def test_zero_experts_leave_the_backbone_bit_for_bit() -> None:
    plain, (ids, _) = tiny_llama(), batch()
    expected = plain(ids).logits
    model, _context = gated_llama(RadarGate)
    for layer in moe_layers(model).values():
        nn.init.zeros_(layer.bank.lora_B)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("gate", ALL_GATES)
def test_a_batch_without_tokens_is_no_problem(gate: type) -> None:
    context = Context()
    layer = layer_of(experts_of(2, dtype=torch.float32), partial(gate, **NEEDED.get(gate, {})), context=context)
    context.replace(expert=torch.tensor([0]))
    assert layer(torch.zeros(1, 0, IN)).shape == (1, 0, OUT)


def test_dropout_acts_on_the_experts_input_with_one_mask_and_only_while_they_train() -> None:
    experts, p = experts_of(3, dtype=torch.float32), 0.4
    for trainable, training in itertools.product((True, False), repeat=2):
        context = Context()
        model = OneLinear(IN, OUT, torch.float32).requires_grad_(False)
        bank = bank_of(experts, trainable=trainable)
        attach(model, {"layer": bank}, UniformGate, context=context, dropout=p)
        model.train(training)
        x = torch.randn(50, IN)
        torch.manual_seed(3)
        y = model.layer(x) - model.layer.base_layer(x)
        torch.manual_seed(3)
        dropped = nn.functional.dropout(x, p) if trainable and training else x
        expected = sum(expert_outputs(dropped, list(experts.values()))) / 3
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_train_mode_reaches_gate_and_bank_but_not_the_frozen_linear() -> None:
    layer = layer_of(experts_of(2), StretchGate)
    assert layer.train() is layer
    assert layer.gate.training
    assert not layer.base_layer.training
    assert layer.eval() is layer
    assert not layer.gate.training


def test_a_whole_model_may_be_copied_and_saved_with_its_mixture(tmp_path: object) -> None:
    model, _context = gated_llama(RadarGate)
    ids, _ = batch()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh, _ = gated_llama(RadarGate)
    for layer in moe_layers(fresh).values():
        randomise(layer.gate, seed=99)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert isinstance(next(iter(moe_layers(model).values())).bank, ExpertBank)


@pytest.mark.parametrize(("gate", "expert"), [(TaskGate, 1), (partial(FixedGate, weights={"e1": 1.0}), -1)])
def test_a_chosen_expert_that_is_absent_at_the_layer_updates_nothing(gate: object, expert: int) -> None:
    context = Context()
    everyone = experts_of(3, dtype=torch.float32)
    here = {name: e for name, e in everyone.items() if name != "e1"}
    layer = layer_of(here, gate, library=tuple(everyone), context=context)
    context.replace(expert=torch.full((2,), expert))
    x = torch.randn(2, 3, IN)
    assert torch.equal(layer(x), layer.base_layer(x))
