"""The gate folder: exact, movable, whole or unchanged, and nothing but data; strangers are refused by name."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import GATES, SEQ2SEQ, batch_of, experts_folder, left_padded, model_folder, network_of, write_expert

from radargate_pl import class_specs, gate_folder
from radargate_pl.execution import Execution
from radargate_pl.gates import UniformGate
from radargate_pl.networks import GatedNetwork

FLOAT32 = {"dtype": "float32"}


class StrangersGate(UniformGate):
    """A gate of somebody else's package."""


def load(folder, **options):
    return GatedNetwork.from_pretrained(folder, **{**FLOAT32, **options})


def logits(network, kind):
    with torch.no_grad():
        return network.eval()(**batch_of(kind)).logits


def library(tmp_path, kind="llama"):
    """A copy of the experts that a test may spoil."""
    return str(shutil.copytree(experts_folder(kind), tmp_path / "library"))


def change(folder, file="gate_config.json", **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("include_experts", [False, True])
def test_saved_and_loaded_again_is_exact(tmp_path, kind, gate, include_experts):
    network = network_of(kind, gate)
    network.save_pretrained(tmp_path / "gate", include_experts=include_experts)
    again = load(tmp_path / "gate")
    assert torch.equal(logits(again, kind), logits(network, kind))
    assert again.describe() == network.describe()
    assert (again.experts, again.fingerprints) == (network.experts, network.fingerprints)
    assert not again.training
    assert (tmp_path / "gate" / "experts" / "e2").is_dir() is include_experts


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_loaded_gate_generates_the_same(tmp_path, kind):
    network = network_of(kind)
    network.save_pretrained(tmp_path / "gate")
    again = load(tmp_path / "gate")
    batch = batch_of(kind) if kind in SEQ2SEQ else left_padded(batch_of(kind))
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "expert")}
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(again.generate(**prompts, **options), network.generate(**prompts, **options))


@pytest.mark.parametrize("kind", ["gemma2", "granite", "mbart"])
def test_other_architectures_are_exact_too(tmp_path, kind):
    network = network_of(kind)
    network.save_pretrained(tmp_path / "gate", include_experts=True)
    assert torch.equal(logits(load(tmp_path / "gate"), kind), logits(network, kind))


def test_what_lies_in_it(tmp_path):
    network = network_of("llama")
    network.save_pretrained(tmp_path / "gate")
    assert sorted(p.name for p in (tmp_path / "gate").iterdir()) == [
        "README.md",
        "gate.safetensors",
        "gate_config.json",
    ]
    tensors = load_file(tmp_path / "gate" / "gate.safetensors")
    assert set(tensors) == set(network.trainable_state())
    assert "model.layers.0.self_attn.q_proj.gate.rotation.P" in tensors
    config = json.loads((tmp_path / "gate" / "gate_config.json").read_text())
    assert config["format_version"] == 1
    assert config["gate"]["class_path"] == "radargate_pl.gates.radar.RadarGate"
    assert config["gate"]["init_args"] == {
        **{"top_k": 2, "scorer": "x", "temperature": 1.0, "renormalize": "auto"},
        **{"rotation_rank": 4, "rotation_sharing": "shared", "angle_norm": "rms"},
        **{"angle_bound": None, "output_scale": 1.0},
    }
    assert config["fingerprints"] == network.fingerprints
    assert network.fingerprints["backbone"] in (tmp_path / "gate" / "README.md").read_text()


def test_everything_moved_together_is_found(tmp_path, monkeypatch):
    for name, source in (("model", model_folder("llama")), ("library", experts_folder("llama"))):
        shutil.copytree(source, tmp_path / "old" / name)
    monkeypatch.chdir(tmp_path / "old")
    network = network_of("llama", backbone="model", experts="library")
    network.save_pretrained("runs/gate")
    expected = logits(network, "llama")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load(tmp_path / "old/runs/gate"), "llama"), expected)
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert torch.equal(logits(load(tmp_path / "new/runs/gate"), "llama"), expected)


def test_a_gate_moved_alone_says_what_to_pass(tmp_path):
    experts = library(tmp_path)
    shutil.copytree(model_folder("llama"), tmp_path / "model")
    network = network_of("llama", backbone=str(tmp_path / "model"), experts=experts)
    network.save_pretrained(tmp_path / "gate")
    expected = logits(network, "llama")
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move(tmp_path / "gate", tmp_path / "far" / "away" / "gate")
    folder = tmp_path / "far" / "away" / "gate"
    with pytest.raises(ValueError, match="Pass backbone="):
        load(folder)
    with pytest.raises(ValueError, match="Pass experts= with their folder"):
        load(folder, backbone=model_folder("llama"))
    assert torch.equal(logits(load(folder, backbone=model_folder("llama"), experts=experts), "llama"), expected)


def test_included_experts_are_the_files_themselves(tmp_path):
    """Also from a network in bfloat16, where they are rounded in memory: nothing may be lost by saving."""
    network = network_of("llama", dtype="bfloat16")
    network.save_pretrained(tmp_path / "gate", include_experts=True)
    for name in network.experts:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            original = f"{experts_folder('llama')}/{name}/{file}"
            with open(original, "rb") as expected:
                assert (tmp_path / "gate" / "experts" / name / file).read_bytes() == expected.read()
    again = load(tmp_path / "gate", experts=experts_folder("llama"))  # the originals still pass
    assert torch.equal(logits(again, "llama"), logits(network_of("llama"), "llama"))


def test_experts_inside_the_replaced_folder_survive(tmp_path):
    network_of("llama").save_pretrained(tmp_path / "gate", include_experts=True)
    again = load(tmp_path / "gate")
    with torch.no_grad():
        for value in again.trainable_state().values():
            value.mul_(0.5)
    again.save_pretrained(tmp_path / "gate")
    assert torch.equal(logits(load(tmp_path / "gate"), "llama"), logits(again, "llama"))


def test_experts_that_trained_go_with_their_gate(tmp_path):
    network = network_of("llama", train="both")
    with torch.no_grad():
        for value in network.trainable_state().values():
            value.mul_(1.25)
    network.save_pretrained(tmp_path / "gate")
    # Loaded experts are frozen, and frozen ones take the fast mixture: equal to the bit only in the plain one.
    again = load(tmp_path / "gate", execution=Execution(mixture="plain"))
    assert torch.equal(logits(again, "llama"), logits(network, "llama"))
    torch.testing.assert_close(logits(load(tmp_path / "gate"), "llama"), logits(network, "llama"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Expected expert 'e0' to be the one used before"):
        load(tmp_path / "gate", experts=experts_folder("llama"))


def fingerprints_in(error):
    return {word.strip(".,;") for word in str(error.value).split() if word.startswith("sha256:")}


@pytest.mark.parametrize("other", [("llama", 1), ("granite", 1), ("opt", 0)])
def test_another_backbone_is_refused_with_both_fingerprints(tmp_path, other):
    """Also one whose layers have other names, so that the experts would not fit it."""
    network = network_of("llama")
    network.save_pretrained(tmp_path / "gate")
    with pytest.raises(ValueError, match="Expected the backbone to be the one used before") as error:
        load(tmp_path / "gate", backbone=model_folder(*other))
    found = network_of(other[0], experts=[], backbone=model_folder(*other)).fingerprints["backbone"]
    assert fingerprints_in(error) == {network.fingerprints["backbone"], found}


def test_another_file_of_an_expert_is_refused_with_both_fingerprints(tmp_path):
    experts = library(tmp_path)
    network = network_of("llama", experts=experts)
    network.save_pretrained(tmp_path / "gate")
    shutil.rmtree(tmp_path / "library" / "e1")
    write_expert(tmp_path / "library" / "e1", network_of("llama", experts=[]).backbone, ("q_proj", "v_proj"), 2, 77)
    with pytest.raises(ValueError, match="Expected expert 'e1' to be the one used before") as error:
        load(tmp_path / "gate")
    found = network_of("llama", experts=experts).fingerprints["experts"]["e1"]
    assert fingerprints_in(error) == {network.fingerprints["experts"]["e1"], found}


def test_another_scaling_of_an_expert_is_refused(tmp_path):
    network_of("llama", experts=library(tmp_path)).save_pretrained(tmp_path / "gate")
    change(tmp_path / "library" / "e2", "adapter_config.json", lora_alpha=9)
    with pytest.raises(ValueError, match="Expected expert 'e2' to be the one used before"):
        load(tmp_path / "gate")


@pytest.mark.parametrize("names", [("e1", "e0", "e2"), ("e0", "e1"), ("e0",)])
def test_other_experts_or_another_order_are_refused(tmp_path, names):
    network_of("llama", "stretch").save_pretrained(tmp_path / "gate")
    chosen = {name: f"{experts_folder('llama')}/{name}" for name in names}
    with pytest.raises(ValueError, match=r"\['e0', 'e1', 'e2'\] in this order, but found"):
        load(tmp_path / "gate", experts=chosen)


def test_a_strangers_class_runs_only_with_trust(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "somebodys_gates", sys.modules[__name__])
    monkeypatch.setattr(StrangersGate, "__module__", "somebodys_gates")
    network = network_of("llama", StrangersGate)
    network.save_pretrained(tmp_path / "gate")
    monkeypatch.setattr(class_specs.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(ValueError, match=r"names somebodys_gates\.StrangersGate\. Pass trust_code=True"):
        load(tmp_path / "gate")
    monkeypatch.setattr(class_specs.importlib, "import_module", sys.modules.__getitem__)
    assert isinstance(next(iter(load(tmp_path / "gate", trust_code=True).layers.values())).gate, StrangersGate)


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("radargate_pl.networks.GatedNetwork", "to be a Gate, but it is not"),
        ("radargate_pl.gates.NoSuchGate", "Expected the gate radargate_pl.gates.NoSuchGate to exist"),
        ("radargate_pl.nowhere.RadarGate", "Expected the gate radargate_pl.nowhere.RadarGate to exist"),
        ("os.system", "Pass trust_code=True"),
        ("RadarGate", "Pass trust_code=True"),
    ],
)
def test_what_is_no_gate_of_this_package(tmp_path, class_path, message):
    network_of("llama", "uniform").save_pretrained(tmp_path / "gate")
    change(tmp_path / "gate", gate={"class_path": class_path, "init_args": {}})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "gate")


def damaged(folder, file, content):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("gate_config.json", None, "has no gate_config.json"),
        ("gate.safetensors", None, "has no gate.safetensors"),
        ("gate_config.json", b'{"format', "gate_config.json to be whole, but it is damaged"),
        ("gate_config.json", b"[1]", "gate_config.json to be whole, but it is damaged"),
        ("gate_config.json", b'{"format_version": 1}', r"but \['gate', .* are missing"),
        ("gate_config.json", b'{"format_version": 2}', "to have format_version 1, but found 2. Use the version"),
        ("gate.safetensors", b"\x10", "gate.safetensors to be whole, but it is damaged"),
    ],
)
def test_damaged_and_missing_files(tmp_path, file, content, message):
    network_of("llama", "stretch").save_pretrained(tmp_path / "gate")
    damaged(tmp_path / "gate", file, content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "gate")


def test_tensors_of_another_gate_are_refused_by_key(tmp_path):
    network_of("llama", "stretch").save_pretrained(tmp_path / "gate")
    network_of("llama", "radar").save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "gate.safetensors", tmp_path / "gate")
    with pytest.raises(ValueError, match=r"StretchGate.*(?s:.*)unknown: model.layers.0.self_attn.q_proj.gate.rotation"):
        load(tmp_path / "gate")


@pytest.mark.parametrize("broken", ["save_file", "_card", "copyfile"])
def test_a_full_disk_leaves_the_old_folder_whole(tmp_path, monkeypatch, broken):
    network = network_of("llama")
    network.save_pretrained(tmp_path / "gate", include_experts=True)
    before = {path: path.read_bytes() for path in (tmp_path / "gate").rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        for value in network.trainable_state().values():
            value.add_(1)
    target = gate_folder if broken != "copyfile" else shutil
    monkeypatch.setattr(target, broken, full)
    with pytest.raises(OSError, match="No space left on device"):
        network.save_pretrained(tmp_path / "gate", include_experts=True)
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in (tmp_path / "gate").rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["gate"]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else\. Nothing was written"):
        network_of("llama").save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_bare_backbone_has_no_gate_to_save(tmp_path):
    with pytest.raises(ValueError, match="with gates to save, but it is a bare backbone"):
        network_of("llama", experts=[]).save_pretrained(tmp_path / "gate")
    assert not (tmp_path / "gate").exists()
