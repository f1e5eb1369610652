"""Experts that join a saved gate without training: which gates take them, what they keep, what is refused."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import batch_of, experts_folder, network_of

from radargate_pl.domains import write_domain
from radargate_pl.fingerprints import fingerprint_tensors
from radargate_pl.gates import ArrowGate, NexusGate
from radargate_pl.networks import GatedNetwork
from radargate_pl.ops import dense_weights
from radargate_pl.records import record_gates


@pytest.fixture
def library(tmp_path: Path) -> dict[str, str]:
    """Copies of the three experts, each with a domain embedding."""
    backbone = network_of("llama").fingerprints["backbone"]
    for seed, name in enumerate(("e0", "e1", "e2")):
        folder = shutil.copytree(Path(experts_folder("llama")) / name, tmp_path / "experts" / name)
        embedding = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        write_domain(folder, embedding, backbone_fingerprint=backbone, samples=1)
    return {name: str(tmp_path / "experts" / name) for name in ("e0", "e1", "e2")}


def load(folder: Path, **options: object) -> GatedNetwork:
    return GatedNetwork.from_pretrained(folder, dtype="float32", **options)


@pytest.mark.parametrize("gate", [partial(NexusGate, top_k=2, domains="data"), partial(ArrowGate, top_k=2)])
def test_the_new_expert_is_as_if_it_had_been_there_and_the_others_stay(
    tmp_path: Path, library: dict[str, str], gate: partial
) -> None:
    few = {name: library[name] for name in ("e0", "e2")}
    network = network_of("llama", gate, experts=few).eval()
    network.save_pretrained(tmp_path / "gate")
    joined = load(tmp_path / "gate", add_experts={"e1": library["e1"]})
    assert joined.experts == ("e0", "e2", "e1")
    batch = {**batch_of("llama"), "expert": torch.zeros(3, dtype=torch.int64)}
    if gate.func is NexusGate:
        for path, layer in joined.layers.items():
            *found, newest = layer.gate.domain_embeddings
            known = network.layers[path].gate.domain_embeddings
            if "e1" not in layer.bank.names:
                found = [*found, newest]
            torch.testing.assert_close(torch.stack(found), known, rtol=0, atol=0)
            if "e1" in layer.bank.names:
                made = torch.randn(5, generator=torch.Generator().manual_seed(1))
                torch.testing.assert_close(newest, made, rtol=0, atol=0)
    with torch.no_grad(), record_gates(joined.backbone) as outputs:
        logits = joined(**batch).logits
    new = [o for o in outputs.values() if "e1" in o.experts]
    assert any((dense_weights(o.weights, o.indices, len(o.experts))[..., -1] > 0).any() for o in new)
    assert not torch.equal(logits, network(**batch).logits)
    joined.save_pretrained(tmp_path / "larger")
    assert torch.equal(load(tmp_path / "larger")(**batch).logits, logits)


def test_layers_without_a_fitted_gate_are_named(tmp_path: Path, library: dict[str, str]) -> None:
    gate = partial(NexusGate, top_k=2, domains="data")
    few = {name: library[name] for name in ("e0", "e1")}
    network_of("llama", gate, experts=few).save_pretrained(tmp_path / "gate")
    with pytest.raises(ValueError, match=r"they bring \['model.layers.0.self_attn.k_proj'.*Fit a gate over all"):
        load(tmp_path / "gate", add_experts={"e2": library["e2"]})


def test_what_is_wrong_with_a_newcomer_is_said(tmp_path: Path, library: dict[str, str]) -> None:
    gate = partial(NexusGate, top_k=2, domains="data")
    network_of("llama", gate, experts={name: library[name] for name in ("e0", "e2")}).save_pretrained(tmp_path / "gate")
    (Path(library["e1"]) / "domain.safetensors").unlink()
    with pytest.raises(ValueError, match=r"\['e1'\] have none"):
        load(tmp_path / "gate", add_experts={"e1": library["e1"]})


def test_gates_with_parameters_of_each_expert_refuse(tmp_path: Path, library: dict[str, str]) -> None:
    network_of("llama", "radar", experts={name: library[name] for name in ("e0", "e1")}).save_pretrained(tmp_path / "g")
    with pytest.raises(ValueError, match=r"RadarGate is not made for that\. Build or fit it"):
        load(tmp_path / "g", add_experts={"e2": library["e2"]})


def test_a_name_that_is_taken_is_refused(tmp_path: Path, library: dict[str, str]) -> None:
    network_of("llama", partial(ArrowGate, top_k=2), experts=library).save_pretrained(tmp_path / "g")
    with pytest.raises(ValueError, match=r"\['e1'\] are names of the gate's experts already"):
        load(tmp_path / "g", add_experts={"e1": library["e2"]})


def test_a_domain_embedding_of_another_backbone_is_refused(library: dict[str, str]) -> None:
    write_domain(Path(library["e1"]), torch.ones(5), backbone_fingerprint="sha256:other", samples=1)
    with pytest.raises(ValueError, match=r"adapter 'e1'.*the backbone that made .*domain.safetensors"):
        network_of("llama", experts=library)


def test_saved_experts_keep_their_domains(tmp_path: Path, library: dict[str, str]) -> None:
    gate = partial(NexusGate, top_k=1, domains="data")
    network_of("llama", gate, experts=library).save_pretrained(tmp_path / "g", include_experts=True)
    assert (tmp_path / "g" / "experts" / "e1" / "domain.safetensors").is_file()
    assert fingerprint_tensors([tmp_path / "g" / "experts" / "e1" / "domain.safetensors"]) == fingerprint_tensors(
        [Path(library["e1"]) / "domain.safetensors"]
    )
