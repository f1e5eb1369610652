"""How a network computes: what "auto" decides, what it says, and that nothing saved holds any of it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tiny_models import KINDS, batch_of, network_of
from tiny_runs import FixedBatches, adapters, fit, gated_lm, two_row_batches
from torch._inductor.exc import InvalidCxxCompiler

from radargate_pl import execution as module
from radargate_pl.callbacks import ExecutionReport
from radargate_pl.compiled_layers import decoder_layers, missing_compiler
from radargate_pl.execution import Execution
from radargate_pl.gates import UniformGate
from radargate_pl.networks import GatedNetwork

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [{"compile": "yes"}, {"attention": "flash"}, {"mixture": "fast"}])
def test_unknown_words_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"execution\.{name}.*but got '{options[name]}'"):
        Execution(**options)


@pytest.fixture
def suited(monkeypatch):
    """A machine and a size of backbone where "auto" compiles."""
    monkeypatch.setattr(module, "processor_supports_bfloat16", lambda: True)
    monkeypatch.setattr(module, "ENOUGH_WEIGHTS", 1)
    monkeypatch.setattr(module, "missing_compiler", lambda device: None)


def decided(batches: float | None = 1000, device: torch.device = CPU, is_recorded: bool = False, **options) -> str:
    network = network_of(options.pop("kind", "llama"), dtype=options.pop("dtype", "bfloat16"), **options)
    assert network.applied_execution.compiled is None
    network.applied_execution.begin_fit(batches, device, is_recorded=is_recorded)
    compiled = network.applied_execution.compiled
    assert (compiled is not None) == ("compile: yes" in network.applied_execution.line())
    return network.applied_execution.compilation


def test_auto_compiles_long_fits_only(suited):
    assert decided(1000) == decided(math.inf) == "yes, each decoder layer"
    assert "999 batches are too few" in decided(999)
    assert "nobody knows" in decided(None)


class WithoutLength(FixedBatches):
    """Batches that nobody can count before they are read."""

    def train_dataloader(self) -> Any:
        return (batch for batch in self.train)


class BegunError(Exception):
    """A fit has begun: it need not go on."""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 100_000, "max_epochs": 1}, 4),
        ({"steps": 3, "max_epochs": 10}, 3),
        ({"steps": 7}, 7),
        ({"steps": 100_000, "max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"steps": -1, "max_epochs": 3, "accumulate_grad_batches": 2}, 12),
        ({"steps": 5, "accumulate_grad_batches": 2}, 10),
        ({"steps": -1, "max_epochs": -1}, math.inf),
        ({"steps": 5, "max_epochs": 1, "module": WithoutLength}, 5),
        ({"steps": -1, "max_epochs": 1, "module": WithoutLength}, None),
    ],
)
def test_a_fit_is_as_long_as_the_first_of_its_ends(tmp_path, monkeypatch, options, expected):
    begun: list[float | None] = []

    def begin(self: object, batches: float | None, *_: object, **__: object) -> None:
        begun.append(batches)
        raise BegunError

    monkeypatch.setattr(module.AppliedExecution, "begin_fit", begin)
    batches = two_row_batches()
    options = {**options, "module": options.get("module", FixedBatches)(batches.train, batches.evaluation)}
    with pytest.raises(BegunError):
        fit(gated_lm(adapters(tmp_path / "experts")), tmp_path / "run", ExecutionReport(), **options)
    assert begun == [expected]


def test_auto_leaves_alone_what_gains_nothing_or_was_never_measured(suited, monkeypatch):
    assert "float32" in decided(dtype="float32")
    assert "cuda" in decided(device=torch.device("cuda"))
    assert "gate" in decided(gate=UniformGate)
    assert "auxiliary" in decided(is_recorded=True)
    assert "decoder layers" in decided(kind="t5")
    assert "no mixture" in decided(experts=[], gate="radar")
    assert "false" in decided(execution=Execution(compile=False))
    with monkeypatch.context() as patch:
        patch.setattr(module, "reads_input", lambda *_: True)
        assert "start from their input" in decided()
        assert decided(execution=Execution(mixture="plain")).startswith("yes")
    monkeypatch.setattr(module, "ENOUGH_WEIGHTS", 10**9)
    assert "weights are too few" in decided()


def test_auto_without_a_compiler_warns_once_and_computes(suited, monkeypatch):
    monkeypatch.setattr(module, "missing_compiler", lambda device: "no compiler")
    with pytest.warns(UserWarning, match=r"no compiler.*execution\.compile: false"):
        assert decided() == "no (no compiler)"


def test_a_missing_compiler_is_found_before_anything_is_compiled(monkeypatch):
    def search() -> str:
        raise InvalidCxxCompiler

    assert missing_compiler(CPU) is None
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", search)
    assert "compiler" in str(missing_compiler(CPU))


def test_the_attention_goes_by_the_units_of_the_processor(monkeypatch):
    monkeypatch.setattr(module, "processor_supports_bfloat16", lambda: True)
    chosen = network_of("llama", dtype="bfloat16").applied_execution.attention
    assert chosen == "grouped while training on a CPU up to 512 tokens, else sdpa"
    assert network_of("llama").applied_execution.attention == "sdpa"
    assert network_of(
        "llama", dtype="bfloat16", execution=Execution(attention="model")
    ).applied_execution.attention == ("sdpa")
    assert (
        network_of("t5", dtype="bfloat16").applied_execution.attention == network_of("t5").applied_execution.attention
    )
    monkeypatch.setattr(module, "processor_supports_bfloat16", lambda: False)
    assert network_of("llama", dtype="bfloat16").applied_execution.attention == "sdpa"
    asked = network_of("t5", execution=Execution(attention="grouped")).applied_execution.attention
    assert "encoder-decoder" in asked


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_decoder_layers_are_found_in_decoder_only_backbones(kind):
    backbone = network_of(kind).backbone
    count = 0 if backbone.config.is_encoder_decoder else backbone.config.num_hidden_layers
    assert len(decoder_layers(backbone)) == count


def test_compiling_an_encoder_decoder_backbone_is_refused_with_a_warning():
    with pytest.warns(UserWarning, match="no decoder layers"):
        network = network_of("t5", execution=Execution(compile=True))
    assert network(**batch_of("t5")).logits.isfinite().all()


def test_a_gate_is_the_same_however_it_is_computed(tmp_path):
    plain = network_of("llama", execution=Execution(mixture="plain", attention="grouped"))
    assert all(layer.mixture == "plain" for layer in plain.layers.values())
    assert plain.describe() == network_of("llama").describe()
    plain.save_pretrained(tmp_path / "gate")
    assert not {"execution", "attention", "mixture"} & set(json.loads((tmp_path / "gate/gate_config.json").read_text()))
    again = GatedNetwork.from_pretrained(tmp_path / "gate", dtype="float32", execution=Execution(compile=False))
    assert again.applied_execution.line() == "attention: sdpa, compile: no (false), mixture: auto (native code)"
    for name, value in plain.gate_state().items():
        assert torch.equal(again.gate_state()[name], value)
