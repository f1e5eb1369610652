"""NexusGate: its projection, where domains come from, and what it remembers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import partial

import pytest
import torch
from builders import IN, OUT, assert_near, bank_of, experts_of, layer_of, randomise, recorded, site_of
from dense_comparison import assert_equals_dense, assert_finite, layer_in_float64
from gate_cases import COUNT, inputs
from reference import Expert
from reference_gates import nexus_weights
from torch import Tensor, nn

from radargate_pl import notices
from radargate_pl.gates import NexusGate
from radargate_pl.gates.nexus import domain_embeddings
from radargate_pl.prototypes import prototypes
from radargate_pl.rotations import RadarRotation

WIDTH = 11  # of domain embeddings made from data: not that of the layer


def domains_of(names: tuple[str, ...], width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {name: nn.functional.normalize(torch.randn(width, generator=generator), dim=0) for name in names}


@pytest.mark.parametrize("rotates", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("hidden", [None, 1, 5])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
def test_it_equals_the_dense_reference(top_k: int, hidden: int | None, rotates: bool) -> None:
    experts = experts_of(COUNT)
    rotation = {"rotation": RadarRotation} if rotates else {}
    for training in (False, True):
        layer = layer_in_float64(NexusGate, experts, top_k=top_k, hidden=hidden, **rotation).train(training)
        assert layer.gate.projection.up.shape == (2 * (hidden or max(1, IN // 4)), IN)
        assert_equals_dense(layer, experts, inputs(), nexus_weights, top_k=top_k)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
def test_any_number_of_experts_fits_into_blocks(count: int) -> None:
    experts = experts_of(count)
    layer = layer_in_float64(NexusGate, experts, top_k=min(2, count))
    assert_equals_dense(layer, experts, inputs(), nexus_weights, top_k=min(2, count))


def test_parameters_do_not_depend_on_the_number_of_experts() -> None:
    shapes = []
    for count in (2, 5):
        gate = layer_of(experts_of(count), NexusGate).gate
        named = dict(gate.named_parameters())
        assert gate.domain_embeddings.shape == (count, IN)
        assert {name for name, p in named.items() if p.requires_grad} == {"projection.up", "projection.down"}
        shapes.append({name: p.shape for name, p in named.items() if name != "domain_embeddings"})
    assert shapes[0] == shapes[1]
    assert NexusGate.takes_new_experts


def test_the_start_gives_small_logits_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    experts = experts_of(4, in_features=64, out_features=OUT, dtype=torch.float32)
    for top_k in (1, 2):
        layer = layer_of(experts, partial(NexusGate, top_k=top_k))
        y, record = recorded(layer, torch.randn(200, 64))
        assert 0.01 < record.logits.std() < 0.6  # a linear scorer's are 0.58
        (y * torch.randn(200, OUT)).sum().backward()
        assert all((p.grad != 0).any() for p in layer.gate.parameters() if p.requires_grad)
        assert layer.gate.domain_embeddings.grad is None
    first, second = (layer_of(experts, NexusGate).gate.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


# Where domains come from.


def with_domains(domains: Mapping[str, Tensor] | None, source: str, present: tuple[str, ...] = ("e0", "e1", "e2")):
    bank = bank_of({n: e for n, e in experts_of(3).items() if n in present}, library=("e0", "e1", "e2"))
    bank.domains = domains
    return domain_embeddings(bank, source, site_of()), bank


def test_the_source_of_the_domains() -> None:
    data = domains_of(("e0", "e1", "e2"))
    for source in ("data", "auto"):
        for present in (("e0", "e1", "e2"), ("e0", "e2")):
            (taken, found), _ = with_domains(data, source, present)
            assert taken == "data"
            assert torch.equal(found, torch.stack([data[name] for name in present]))
    for domains, source in ((data, "prototype"), (None, "prototype"), (None, "auto"), ({"e0": data["e0"]}, "auto")):
        (taken, found), bank = with_domains(domains, source)
        assert taken == "prototype"
        assert torch.equal(found, prototypes(bank))


def test_all_layers_take_the_same_source() -> None:
    """An expert without data is absent from this layer: it decides all the same."""
    (taken, _), _ = with_domains(domains_of(("e0", "e2")), "auto", present=("e0", "e2"))
    assert taken == "prototype"


def test_without_data_it_is_refused_or_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for domains in (None, {}, domains_of(("e0",))):
        with pytest.raises(ValueError, match=r"'e1', 'e2'\] have none.*python -m radargate_pl.domain_command"):
            with_domains(domains, "data")
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with_domains(domains_of(("e0",)), "auto")
            with_domains(domains_of(("e0",)), "prototype")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "['e1', 'e2'] have no domain embedding" in message
    assert "python -m radargate_pl.domain_command" in message


def test_domains_of_different_widths_and_prototypes_of_nothing_are_refused() -> None:
    domains = domains_of(("e0", "e1")) | domains_of(("e2",), WIDTH + 1)
    with pytest.raises(ValueError, match=r"domain embeddings of one width, but got .*'e2': \(12,\)"):
        with_domains(domains, "data")
    new = {n: Expert(e.lora_A, torch.zeros_like(e.lora_B), 1.0) for n, e in experts_of(2).items()}
    with pytest.raises(ValueError, match="NexusGate at layer: expected experts with prototypes, but these are new"):
        layer_of(new, NexusGate, trainable=True)


def test_the_gate_names_the_source_it_took() -> None:
    gate = NexusGate(site_of())
    assert gate.line() == "NexusGate(top_k=1, hidden=None, domains=auto, rotation=NoRotation())"
    bank = bank_of(experts_of(3))
    gate.bind(bank)
    assert gate.domains == gate.arguments()["domains"] == "prototype"
    bank.domains = domains_of(bank.names)
    gate = NexusGate(site_of())
    gate.bind(bank)
    assert gate.domains == "data"
    assert gate.domain_embeddings.shape == (3, WIDTH)
    assert gate.domain_embeddings.dtype == torch.float32


# What it remembers.


def embedded(gate: NexusGate) -> Tensor:
    """The expert embeddings as evaluation without gradients sees them."""
    with torch.no_grad():
        return gate.eval().expert_embeddings()


def assert_fresh(gate: NexusGate) -> None:
    with torch.enable_grad():
        expected = gate.expert_embeddings()
    assert expected.requires_grad
    assert torch.equal(embedded(gate), expected)


def test_embeddings_are_remembered_only_where_nothing_trains() -> None:
    gate = layer_of(experts_of(3, dtype=torch.float32), NexusGate).gate
    assert embedded(gate) is embedded(gate)
    with torch.no_grad():
        assert gate.train().expert_embeddings() is not gate.expert_embeddings()
    with torch.enable_grad():
        assert gate.eval().expert_embeddings().requires_grad


def test_remembered_embeddings_follow_every_change() -> None:
    gate = layer_of(experts_of(3, dtype=torch.float32), NexusGate).gate
    other = layer_of(experts_of(3, dtype=torch.float32, seed=5), NexusGate).gate
    randomise(other)
    for name in ("domain_embeddings", "projection.up", "projection.down"):
        before = embedded(gate)
        with torch.no_grad():
            gate.get_parameter(name).mul_(1.5)
        assert_fresh(gate)
        assert not torch.equal(embedded(gate), before)
    for assign in (False, True):
        embedded(gate)
        gate.load_state_dict(other.state_dict(), assign=assign)
        assert_fresh(gate)
        assert torch.equal(embedded(gate), embedded(other))
        randomise(other, seed=9 + assign)
    optimizer = torch.optim.SGD([p for p in gate.parameters() if p.requires_grad], lr=0.1)
    gate.train().expert_embeddings().square().sum().backward()
    optimizer.step()
    assert_fresh(gate)
    copied = copy.deepcopy(gate)
    with torch.no_grad():
        copied.projection.down.add_(1)
    assert_fresh(copied)
    assert_fresh(gate)


def test_a_move_forgets_them_and_inference_mode_leaves_nothing_behind() -> None:
    gate = layer_of(experts_of(3, dtype=torch.float32), NexusGate).gate
    with torch.inference_mode():
        first = gate.eval().expert_embeddings()
    assert not first.is_inference()
    x = torch.randn(5, IN, requires_grad=True)
    (x @ embedded(gate).T).sum().backward()  # it can be trained through
    wide = gate.double()
    assert embedded(wide).dtype == torch.float64
    assert_near(embedded(wide), first.double(), 1e-6, "after the move")
    with torch.inference_mode():
        made_there = layer_of(experts_of(3, dtype=torch.float32), NexusGate).gate.eval()
        assert_near(made_there.expert_embeddings(), first, 0.0, "made in inference mode")


@pytest.mark.parametrize("top_k", [1, 2])
def test_edge_cases_give_no_nan(top_k: int) -> None:
    experts = experts_of(3)
    zero = {n: Expert(e.lora_A, torch.zeros_like(e.lora_B), e.scaling) for n, e in experts.items()}
    same = dict.fromkeys(experts, experts["e0"])
    for case in (experts_of(1), zero, same):
        layer = layer_in_float64(NexusGate, case, top_k=min(top_k, len(case)))
        with torch.no_grad():
            layer.gate.domain_embeddings.copy_(prototypes(layer.bank))
        assert_finite(layer, inputs())
        assert_finite(layer, torch.zeros(3, IN, dtype=torch.float64))
    if top_k == 2:  # equal prototypes: ties go to the first
        assert recorded(layer, inputs())[1].indices.tolist() == [[0, 1]] * len(inputs())


def test_it_stays_in_float32() -> None:
    layer = layer_of(experts_of(3, dtype=torch.bfloat16), NexusGate)
    layer.to(torch.bfloat16)
    assert {p.dtype for p in layer.gate.parameters()} == {torch.float32}
    _, record = recorded(layer, inputs(dtype=torch.bfloat16))
    assert record.logits.dtype == record.weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k to be at least 1, but got 0"),
        ({"top_k": 4}, "top_k to be at most the number of experts, 3"),
        ({"hidden": 0}, "hidden to be at least 1, but got 0"),
        ({"domains": "text"}, "domains to be 'auto', 'data' or 'prototype', but got 'text'"),
        ({"domains": "data"}, r"every expert to have a domain embedding, but \['e0', 'e1', 'e2'\] have none"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(experts_of(3), partial(NexusGate, **options))
