"""Graphs of the decoder layers, traced and never lowered: how many there are, and what drops or keeps them."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed
from tiny_models import LLAMA, assert_same_gradients, batch_of, gradients, left_padded, network_of

from radargate_pl.compiled_layers import CompiledLayers
from radargate_pl.execution import Execution
from radargate_pl.losses import example_mean_cross_entropy
from radargate_pl.networks import GatedNetwork

NOISE = 1e-5  # of a float64 gradient: the backbone's norms compute in float32
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own use of torch
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Graphs run as they were traced: lowering them takes most of the time and is tested elsewhere."""

    def count(self: CompiledLayers, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph

    monkeypatch.setattr(CompiledLayers, "_compile", count)


def compiled(kind: str = "llama", **options: object) -> GatedNetwork:
    return network_of(kind, execution=Execution(compile=True), **options).double().train()


def eager(kind: str = "llama", **options: object) -> GatedNetwork:
    return network_of(kind, execution=Execution(compile=False), **options).double().train()


def generated(network: GatedNetwork) -> torch.Tensor:
    batch = left_padded(batch_of("llama"))
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "expert")}
    return network.generate(**prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def plans_of(network: GatedNetwork) -> list[object]:
    groups = [group for layer in network.layers.values() for group in layer.shared_input._groups.values()]
    return [group.plan for group in groups if group.plan is not None]


@pytest.mark.usefixtures("quick_decoding")
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["kept", "recomputed"])
def test_layers_share_their_graphs_before_and_after_a_generation(monkeypatch, options):
    monkeypatch.setitem(tiny_models.KINDS, "deep", ("LlamaForCausalLM", {**LLAMA, "num_hidden_layers": 5}))
    network, batch = compiled("deep", **options), batch_of("llama")
    gradients(network, batch)
    graphs = network.applied_execution.compiled.graphs
    assert 1 <= graphs <= 2
    for _ in range(2):
        generated(network)
        assert plans_of(network)
        found = gradients(network, batch)
        assert network.applied_execution.compiled.graphs == graphs
        # An optimiser may step now, and a fused one would leave no trace.
        assert not plans_of(network)
    assert_same_gradients(found, gradients(eager("deep", **options), batch), NOISE)
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.5, fused=True).step()
    assert torch.equal(generated(network), generated(copy.deepcopy(network)))


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["kept", "recomputed"])
def test_a_torch_that_refuses_to_compile_costs_one_warning(monkeypatch, options):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    network, batch = compiled(**options), batch_of("llama")
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match=r"not supported on Python 3\.99.*execution\.compile: false") as told:
        found = [gradients(network, batch) for _ in range(2)]
    assert len(told) == 1
    assert "compile: no (RuntimeError: torch.compile is not supported" in network.applied_execution.line()
    for each in found:
        assert_same_gradients(each, gradients(eager(**options), batch), 1e-12)


@pytest.fixture
def buckets_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one process, in which DDP exchanges every parameter on its own."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_buckets_of_ddp_do_not_cut_graphs_into_pieces(buckets_of_one):
    network, batch = compiled(), batch_of("llama")
    expected = gradients(eager(), batch)
    exchanged = torch.nn.parallel.DistributedDataParallel(network, bucket_cap_mb=1e-6)
    for _ in range(2):
        network.zero_grad()
        example_mean_cross_entropy(*exchanged(**batch), len(batch["input_ids"])).backward()
    assert network.applied_execution.compiled.graphs == 1
    found = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert_same_gradients(found, expected, NOISE)


def test_layers_of_many_experts_start_from_their_input_in_graphs_too(monkeypatch):
    monkeypatch.setitem(tiny_models.KINDS, "deep", ("LlamaForCausalLM", {**LLAMA, "num_hidden_layers": 5}))
    folder = tiny_models.experts_folder("deep")
    experts = {f"n{i}": f"{folder}/e{i % 3}" for i in range(60)}
    batch = batch_of("llama")
    del batch["expert"]
    network = compiled("deep", experts=experts)
    found = gradients(network, batch)
    assert network.applied_execution.compiled.graphs == 1
    prepared = [layer.bank.W_sum for layer in network.layers.values() if layer.bank.W_sum.value is not None]
    assert prepared
    assert copy.deepcopy(prepared[0]).value is None
    assert_same_gradients(found, gradients(eager("deep", experts=experts), batch), NOISE)
    network.applied_execution.compiled.remove()
    assert all(each.value is None for each in prepared)


@pytest.mark.parametrize("options", [{"gate": "task", "train": "experts"}, {"train": "both"}], ids=str)
def test_experts_train_in_graphs_too(options):
    network, batch = compiled(**options), batch_of("llama")
    found = gradients(network, batch)
    assert network.applied_execution.compiled.graphs == 1
    assert_same_gradients(found, gradients(eager(**options), batch), NOISE)


def pickled(network: GatedNetwork) -> GatedNetwork:
    written = io.BytesIO()
    torch.save(network, written)
    written.seek(0)
    return torch.load(written, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_compiles_graphs_of_its_own(copied):
    network, batch = compiled(), batch_of("llama")
    expected = gradients(eager(), batch)
    gradients(network, batch)
    other = copied(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert other.applied_execution.compiled.graphs == 0
    assert_same_gradients(gradients(other, batch), expected, NOISE)
    assert other.applied_execution.compiled.graphs == 1
    assert other.applied_execution.compiled.failure is None
    assert network.applied_execution.compiled.graphs == 1
