"""Compiled decoder layers against eager ones: outputs, gradients, training curves, recomputation, and faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import (
    assert_same_gradients,
    batch_of,
    gradients,
    left_padded,
    loss_of,
    network_of,
)
from tiny_runs import RecordingLogger, adapters, fit, gated_lm, read_json

from radargate_pl import compiled_layers
from radargate_pl.callbacks import ExactResume, ExecutionReport, RunCheckpoint, RunSummary
from radargate_pl.execution import Execution
from radargate_pl.moe import moe_layers
from radargate_pl.networks import GatedNetwork
from radargate_pl.records import record_gates

COMPILED = Execution(compile=True)
EAGER = Execution(compile=False)
NOISE = 1e-5  # of a float64 gradient: the backbone's norms compute in float32
ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own use of torch
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(scope="module")
def pair() -> tuple[GatedNetwork, GatedNetwork]:
    """The same network compiled and eager, in training mode."""
    return in_float64(execution=COMPILED), in_float64(execution=EAGER)


def in_float64(**options: object) -> GatedNetwork:
    """These models magnify rounding so much that float32 would hide a wrong gradient."""
    return network_of("llama", **options).double().train()


def test_outputs_and_gradients_are_those_of_eager_code_for_every_length(pair):
    """One graph with a mask and one without serve every batch size, length and padding."""
    compiled, eager = pair
    batch = batch_of("llama")
    batches = [batch, left_padded(batch), batch_of("llama", (7, 7)), batch_of("llama", (12, 3, 5, 11), seed=4)]
    for each in batches:
        torch.testing.assert_close(compiled(**each).logits, eager(**each).logits, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients(compiled, each), gradients(eager, each), NOISE)
    layers = compiled.applied_execution.compiled
    assert layers.failure is None
    assert 1 <= layers.graphs <= 2
    assert layers.seconds > 0


def test_what_does_not_train_and_what_is_recorded_runs_eagerly(pair):
    compiled, eager = pair
    batch, layers = batch_of("llama", (5, 8)), compiled.applied_execution.compiled
    before = layers.graphs
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, eager(**batch).logits)
    with record_gates(compiled.backbone) as found, record_gates(eager.backbone) as expected:
        assert torch.equal(loss_of(compiled, batch), loss_of(eager, batch))
    assert list(found) == list(expected) == list(moe_layers(compiled.backbone))
    prompts = {name: left_padded(batch)[name] for name in ("input_ids", "attention_mask", "expert")}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(compiled.generate(**prompts, **options), eager.generate(**prompts, **options))
    assert layers.graphs == before


def test_ties_go_to_the_lowest_expert_in_a_graph_too(pair):
    compiled, eager = pair
    states = [network.gate_state() for network in pair]
    kept = [{name: value.clone() for name, value in state.items()} for state in states]
    try:
        for state in states:
            for name, value in state.items():
                if "scorer" in name:
                    value.zero_()
        batch = batch_of("llama")
        assert_same_gradients(gradients(compiled, batch), gradients(eager, batch), NOISE)
    finally:
        for network, state in zip(pair, kept, strict=True):
            network.load_gate_state(state)


def test_there_are_never_more_graphs_than_the_limit(pair, monkeypatch):
    compiled, eager = pair
    layers = compiled.applied_execution.compiled
    gradients(compiled, batch_of("llama"))
    monkeypatch.setattr(compiled_layers, "MAX_GRAPHS", layers.graphs)
    before, alone = layers.graphs, batch_of("llama", (6,))  # a batch of one example is another graph
    assert_same_gradients(gradients(compiled, alone), gradients(eager, alone), NOISE)
    assert layers.graphs == before


def test_recomputation_of_compiled_layers(pair):
    _, eager = pair
    compiled = in_float64(execution=COMPILED, gradient_checkpointing=True)
    for batch in (batch_of("llama"), batch_of("llama", (4, 10))):
        assert_same_gradients(gradients(compiled, batch), gradients(eager, batch), NOISE)
    assert compiled.applied_execution.compiled.failure is None
    assert compiled.applied_execution.compiled.graphs <= 2


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    return adapters(tmp_path_factory.mktemp("experts"))


def losses(library: str, folder: Path, first: Execution, second: Execution) -> list[float]:
    """Three steps, of which the third is taken after a resumption."""
    logger = RecordingLogger()
    callbacks = [ExecutionReport(), RunCheckpoint(every_n_steps=1, keep=-1), ExactResume(), RunSummary()]
    fit(gated_lm(library, execution=first), folder, *callbacks, steps=2, logger=logger, limit_val_batches=0)
    callbacks = [ExecutionReport(), RunCheckpoint(every_n_steps=1, keep=-1), ExactResume(), RunSummary()]
    path = folder / "checkpoints/last.ckpt"
    options = {"steps": 3, "resume": path, "logger": logger, "limit_val_batches": 0}
    fit(gated_lm(library, execution=second), folder, *callbacks, **options)
    assert "execution" not in torch.load(path, weights_only=True)["radargate"]
    return [loss for _, loss in logger.values("train/loss")]


def test_training_curves_lie_on_top_of_each_other_also_when_resumed_with_another_setting(library, tmp_path):
    curve = losses(library, tmp_path / "a", EAGER, EAGER)
    assert len(curve) == 3
    assert losses(library, tmp_path / "b", COMPILED, EAGER) == pytest.approx(curve, rel=1e-5)
    assert losses(library, tmp_path / "c", EAGER, COMPILED) == pytest.approx(curve, rel=1e-5)
    summary = read_json(tmp_path / "c/summary.json")
    assert summary["execution"].startswith("attention: sdpa, compile: yes")
    assert summary["seconds"]["compile"] > 0
    assert "compile" not in read_json(tmp_path / "b/summary.json")["seconds"]


BROKEN = """
import sys, warnings
sys.path.insert(0, "tests")
from tiny_models import assert_same_gradients, batch_of, gradients, network_of
from radargate_pl.execution import Execution
options = {} if len(sys.argv) < 2 else {"gradient_checkpointing": True}
network, batch = network_of("llama", execution=Execution(compile=True), **options).train(), batch_of("llama")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [gradients(network, batch) for _ in range(2)]
told = [str(warning.message) for warning in caught if "execution.compile" in str(warning.message)]
expected = gradients(network_of("llama", execution=Execution(compile=False), **options).train(), batch)
for each in found:
    assert_same_gradients(each, expected, 1e-7)
print(len(told), told[0], network.applied_execution.line(), sep="|")
"""


@pytest.mark.parametrize("arguments", [(), ("recomputed",)], ids=["kept", "recomputed"])
def test_a_broken_compiler_costs_one_warning(tmp_path, arguments):
    """It answers to --version like a good one, and then fails."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *version*) echo "g++ 12.2.0";; *) echo "broken compiler"; exit 1;; esac\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    count, told, line = done.stdout.strip().splitlines()[-1].split("|")
    assert count == "1"
    assert "Error" in told
    assert "execution.compile: false" in told
    assert "compile: no (" in line
