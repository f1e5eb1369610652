"""What a step is said to need, against what its backward pass really keeps, and what is said when it is too much."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_models import network_of
from tiny_runs import adapters, fit, gated_lm, two_row_batches

from radargate_pl.callbacks import resource_guard
from radargate_pl.callbacks.resource_guard import ResourceGuard
from radargate_pl.execution import Execution
from radargate_pl.gates import RadarGate
from radargate_pl.memory_estimate import StepMemory, free_memory, step_memory
from radargate_pl.networks import GatedNetwork

ROWS, LENGTH = 4, 48


def kept_bytes(network: GatedNetwork) -> tuple[int, int]:
    """Bytes kept for the backward pass beside the weights, and the labelled positions."""
    ids = torch.randint(4, 260, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(LENGTH) < LENGTH // 2, -100, ids)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = network(ids, torch.ones_like(ids), labels).logits
        loss = logits.float().logsumexp(-1).sum()
    assert loss.requires_grad
    return sum(kept.values()), len(logits)


@pytest.mark.parametrize("mixture", ["auto", "plain"])
def test_the_estimate_is_of_the_size_of_what_is_kept(mixture):
    network = network_of("llama", partial(RadarGate, top_k=2), execution=Execution(mixture=mixture)).train()
    kept, labelled = kept_bytes(network)
    said = step_memory(network, ROWS, LENGTH, labelled)
    assert kept / 2 <= said.backbone + said.latents + said.logits <= 3 * kept


def test_what_it_grows_with():
    network = network_of("llama").train()
    small, large = step_memory(network, 2, 24, 10), step_memory(network, 4, 48, 10)
    for name in ("backbone", "latents", "rotation"):
        assert getattr(large, name) == 4 * getattr(small, name)
    assert (large.logits, large.training) == (small.logits, small.training)
    assert small.total == sum(vars(small).values())
    recomputed = network_of("llama", gradient_checkpointing=True).train()
    assert step_memory(recomputed, 2, 24, 10).backbone < small.backbone
    bare = network_of("llama", experts=[])
    assert step_memory(bare, 2, 24, 10).latents == step_memory(bare, 2, 24, 10).rotation == 0


def test_free_memory_is_what_machine_and_container_leave(tmp_path, monkeypatch):
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 10_000_000
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    monkeypatch.setattr("radargate_pl.memory_estimate._CGROUP_ROOT", tmp_path)
    assert free_memory(torch.device("cpu")) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) != 2000


@pytest.mark.parametrize(("line", "folder"), [("0::/", ""), ("4:cpu,memory:/", "memory/")])
def test_a_jobs_limit_lies_in_the_group_of_the_process(tmp_path, monkeypatch, line, folder):
    """As Slurm leaves it without a namespace: the root says nothing, the job's group does, or one around it."""
    (tmp_path / "own").write_text(f"9:cpuset:/else\n{line}slurm/job_7/step_0\n")
    limit, used = ("memory.max", "memory.current") if not folder else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    job = tmp_path / folder / "slurm/job_7"
    (job / "step_0").mkdir(parents=True)
    for place, most in ((job, "7000"), (job / "step_0", "max")):
        (place / limit).write_text(f"{most}\n")
        (place / used).write_text("3000\n")
    monkeypatch.setattr("radargate_pl.memory_estimate._CGROUP_ROOT", tmp_path)
    monkeypatch.setattr("radargate_pl.memory_estimate._CGROUP_OF_PROCESS", tmp_path / "own")
    assert free_memory(torch.device("cpu")) == 4000
    (job / "step_0" / limit).write_text("3500\n")
    assert free_memory(torch.device("cpu")) == 500
    (tmp_path / "own").write_text("")
    assert free_memory(torch.device("cpu")) not in (500, 4000)


def test_scores_that_are_kept_are_counted():
    """Two lengths tell the square apart; the model's own attention keeps no scores."""

    def kept(network: GatedNetwork, length: int) -> int:
        config = network.backbone.config
        found = step_memory(network, 2, length, 10).attention
        return found // (2 * config.num_attention_heads * config.num_hidden_layers)

    grouped = network_of("llama", execution=Execution(attention="grouped")).train()
    assert kept(grouped, 100) == 4 * 100**2
    assert kept(grouped, 2000) == 4 * 2000**2
    own = network_of("llama", execution=Execution(attention="model")).train()
    assert kept(own, 2000) == 0
    narrow = network_of("llama", dtype="bfloat16", execution=Execution(attention="grouped")).train()
    assert kept(narrow, 100) == 6 * 100**2


def test_torchs_form_of_generation_holds_the_experts_twice():
    native, in_torch = (network_of("llama", execution=Execution(mixture=m)).train() for m in ("auto", "torch"))
    experts = sum(bank.numel() * 4 for layer in in_torch.layers.values() for bank in layer.bank.parameters())
    assert step_memory(in_torch, 2, 24, 10).decoding == experts
    assert step_memory(native, 2, 24, 10).decoding == 0


@pytest.mark.parametrize("free", [10, 10**15])
def test_a_fit_that_needs_more_than_is_free_is_told_the_levers(tmp_path, monkeypatch, free):
    lines: list[str] = []
    monkeypatch.setattr(resource_guard, "rank_zero_info", lines.append)
    monkeypatch.setattr(resource_guard, "free_memory", lambda device: free)
    batches = two_row_batches()
    batches.batch_size, batches.max_length = 2, 96
    batches.examples = lambda split: SimpleNamespace(largest_batch=lambda rows: (40, 9 * rows))
    library = adapters(tmp_path / "experts")
    lm = gated_lm(library, execution=Execution(mixture="plain"))
    fit(lm, tmp_path / "run", ResourceGuard(warn_below_gb=0), module=batches, steps=1, limit_val_batches=0)
    assert lines[0].startswith("memory of a step of 2 x 40 tokens: about ")
    for name in vars(StepMemory(0, 0, 0, 0, 0)):
        assert f"{name} " in lines[0]
    assert "are free" in lines[0]
    assert (len(lines) == 2) == (free == 10)
    if free == 10:
        assert "1. data.init_args.batch_size: 1 (now 2)" in lines[1]
        assert "gradient_checkpointing: true" in lines[1]
        assert "execution.mixture: auto" in lines[1]


def test_the_largest_batch_of_real_tasks(tmp_path, monkeypatch):
    """Its length is that of the longest example, its labels those of the longest answers."""
    from radargate_pl.data import FlanMixture

    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path))
    lines = [f'{{"source": "{"x" * i}", "target": "{"y" * (i % 4 + 1)}"}}' for i in range(1, 8)]
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    data = FlanMixture(str(tmp_path / "task.jsonl"), "debug-tiny", validation_examples=1, prompt="plain")
    data.prepare_data()
    data.setup("fit")
    examples = [data.examples("train")[i] for i in range(len(data.examples("train")))]
    answers = sorted((len(example.answer) for example in examples), reverse=True)
    longest = max(len(example.prompt) + len(example.answer) for example in examples)
    assert data.examples("train").largest_batch(3) == (longest, sum(answers[:3]))
