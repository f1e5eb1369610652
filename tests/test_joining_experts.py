"""Experts that join a saved gate without training: which gates take them, what they keep, what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import batch_of, experts_folder, network_of

from radargate_pl.checkpoint import restore_network, store_network
from radargate_pl.domains import write_domain
from radargate_pl.fingerprints import fingerprint_tensors
from radargate_pl.gates import ArrowGate, NexusGate
from radargate_pl.joining_experts import with_new_rows
from radargate_pl.networks import GatedNetwork
from radargate_pl.notices import say_once
from radargate_pl.ops import dense_weights
from radargate_pl.rank_rotation import RankRotation
from radargate_pl.records import record_gates
from radargate_pl.rotations import RadarRotation


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


@pytest.mark.parametrize(
    ("rotation", "few", "new"),
    [
        (RankRotation, ("e0", "e1"), "e2"),  # rank 4 beside ranks 3 and 2: one more plane
        (partial(RadarRotation, rotation_rank=2, rotation_sharing="per_expert"), ("e0", "e2"), "e1"),
    ],
)
def test_experts_join_a_rotation_of_each_expert_without_being_rotated(
    tmp_path: Path,
    library: dict[str, str],
    rotation: object,
    few: tuple,
    new: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    say_once.cache_clear()
    everywhere = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    for name in library:  # the same layers for all
        write_everywhere(Path(library[name]), everywhere)
    gate = partial(NexusGate, top_k=2, domains="data", rotation=rotation)
    network = network_of("llama", gate, experts={name: library[name] for name in few}).eval()
    network.save_pretrained(tmp_path / "gate")
    joined = load(tmp_path / "gate", add_experts={new: library[new]})
    assert sum("are not rotated until" in record.getMessage() for record in caplog.records) == 1
    for path, layer in joined.layers.items():
        known = network.layers[path].gate.rotation.state_dict()
        for key, value in layer.gate.rotation.state_dict().items():
            corner = value[tuple(slice(0, size) for size in known[key].shape)]
            assert torch.equal(corner, known[key])
            if key != "P":
                value[tuple(slice(0, size) for size in known[key].shape)] = 0
                assert not value.any(), f"{key} rotates the newcomer"


def write_everywhere(folder: Path, paths: tuple[str, ...]) -> None:
    """Gives an expert the layers at these paths only, at its own rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {}
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        linear = network_of("llama", experts=[]).backbone.get_submodule(path)
        out, width = linear.weight.shape
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(config["r"], width, generator=generator)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, config["r"], generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config["target_modules"] = list(paths)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_domain_embeddings_of_another_width_are_refused(tmp_path: Path, library: dict[str, str]) -> None:
    saved = {"l.gate.domain_embeddings": torch.ones(2, 5)}
    with pytest.raises(ValueError, match=r"rows of shape \(5,\) for l.gate.domain_embeddings, but got \(6,\)"):
        with_new_rows(saved, {"l.gate.domain_embeddings": torch.ones(3, 6)})


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


def test_experts_trained_together_with_the_gate_keep_their_domains(tmp_path: Path, library: dict[str, str]) -> None:
    gate = partial(NexusGate, top_k=1, domains="data")
    network = network_of("llama", gate, experts=library, train="both").eval()
    network.save_pretrained(tmp_path / "g")
    again = load(tmp_path / "g")
    batch = batch_of("llama")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, network(**batch).logits)


def test_a_checkpoint_keeps_the_domains_it_was_made_with(library: dict[str, str]) -> None:
    gate = partial(NexusGate, top_k=2, domains="data")
    network = network_of("llama", gate, experts=library)
    checkpoint: dict = {}
    store_network(checkpoint, network)
    embedding = torch.randn(5, generator=torch.Generator().manual_seed(77))
    write_domain(Path(library["e1"]), embedding, backbone_fingerprint=network.fingerprints["backbone"], samples=1)
    later = network_of("llama", gate, experts=library)
    restore_network(checkpoint, later, is_resuming=True)
    for path, layer in network.layers.items():
        assert torch.equal(later.layers[path].gate.domain_embeddings, layer.gate.domain_embeddings)
