"""Networks whose gate weighs all tokens alike, written as one PEFT adapter: PEFT must compute the same from it."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import batch_of, experts_folder, model_folder, network_of
from tiny_runs import adapters
from torch import Tensor, nn

from radargate_pl.backbones import load_backbone
from radargate_pl.expert_files import read_tensors
from radargate_pl.fixed_compositions import save_composition
from radargate_pl.gates import DirectLoRA, FixedGate, LoraHub, PEMs, UniformGate
from radargate_pl.networks import GatedNetwork


def peft_logits(backbone: str, folder: Path, batch: dict[str, Tensor]) -> Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_backbone(backbone, "float32").model, folder).eval()
    return labelled(model, batch)


@torch.no_grad()
def labelled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits at every real position of a model that takes transformers' arguments."""
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if model.config.is_encoder_decoder:
        return model(**given, labels=batch["labels"]).logits[batch["labels"] != -100]
    return model(**given).logits[batch["attention_mask"].bool()]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


DELTAS = {
    "uniform": UniformGate,
    "fixed": partial(FixedGate, weights={"e0": 0.75, "e2": -0.5}),
    "direct": partial(DirectLoRA, expert="e1"),
    "pems": partial(PEMs, weights={"e0": 1.0, "e1": -0.25}),
    "hub": LoraHub,
}


@pytest.mark.parametrize(("kind", "name"), [*(("llama", name) for name in DELTAS), ("t5", "pems")])
def test_a_sum_is_written_as_one_adapter_that_peft_computes_alike(kind: str, name: str, tmp_path: Path) -> None:
    """Experts of other layers and ranks; layers where every weight is 0 are left out."""
    network, batch = network_of(kind, DELTAS[name]), batch_of(kind)
    if name == "hub":
        values = torch.randn(3, generator=torch.Generator().manual_seed(1))
        for layer in network.layers.values():
            layer.gate.weights.data.copy_(values)
    fingerprint = save_composition(network, tmp_path / "one")
    expected = network.eval()(**batch)
    ours = labelled(network.backbone, batch)
    theirs = peft_logits(model_folder(kind), tmp_path / "one", batch)
    assert expected.logits.isfinite().all()
    plain = labelled(load_backbone(model_folder(kind), "float32").model, batch)
    assert relative(plain, ours) > 1e-2
    assert relative(theirs, ours) <= 1e-5
    again = GatedNetwork(
        backbone=model_folder(kind),
        dtype="float32",
        experts={"one": str(tmp_path / "one")},
        gate=partial(DirectLoRA, expert="one"),
    )
    assert again.fingerprints["experts"] == {"one": fingerprint}
    assert relative(labelled(again.backbone, batch), ours) <= 1e-5


@pytest.mark.parametrize(
    ("gate", "negates"),
    [
        (partial(FixedGate, weights={"add": 0.5, "echo": -0.5, "turn": 1.0}), False),
        (partial(PEMs, weights={"add": 1.0, "echo": -0.5}), True),
        (LoraHub, False),
    ],
    ids=["fixed", "pems", "hub"],
)
def test_a_separate_sum_is_written_as_one_adapter_of_the_experts_rank(
    gate: object, negates: bool, tmp_path: Path
) -> None:
    network = GatedNetwork(
        backbone="debug-tiny", dtype="float32", experts=adapters(tmp_path / "experts"), gate=gate, combine="separate"
    )
    for layer in network.layers.values():
        if isinstance(layer.gate, LoraHub):
            layer.gate.weights.data.copy_(torch.tensor([0.5, -1.0, 0.75]))
        assert layer.gate.negates_one_factor is negates
    save_composition(network, tmp_path / "one")
    lora_A, _ = read_tensors(tmp_path / "one")
    assert {weight.shape[0] for weight in lora_A.values()} == {2}
    batch = batch_of("llama")
    ours = labelled(network.backbone, batch)
    assert relative(labelled(load_backbone("debug-tiny", "float32").model, batch), ours) > 1e-3
    assert relative(peft_logits("debug-tiny", tmp_path / "one", batch), ours) <= 1e-5


def merged_by_peft(backbone: str, folders: dict[str, Path], weights: dict[str, float], how: str) -> dict[str, Tensor]:
    """Layer path to what PEFT's own `add_weighted_adapter` adds to its weight."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = list(folders)
        model = PeftModel.from_pretrained(
            load_backbone(backbone, "float32").model, folders[names[0]], adapter_name=names[0]
        )
        for name in names[1:]:
            model.load_adapter(folders[name], adapter_name=name)
        model.add_weighted_adapter(names, [weights[name] for name in names], "merged", combination_type=how)
    layers = {path: layer for path, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    return {path: layer.get_delta_weight("merged") for path, layer in layers.items() if "merged" in layer.lora_A}


def written(folder: Path) -> dict[str, Tensor]:
    lora_A, lora_B = read_tensors(folder)
    return {path: lora_B[path] @ lora_A[path] for path in lora_A}


@torch.no_grad()
@pytest.mark.parametrize("weights", [(0.5, 0.25, 1.5), (1.0, -0.75, 0.5), (-0.5, -1.0, -0.25)], ids=str)
def test_a_written_sum_is_pefts_cat_with_weights_of_any_sign(weights: tuple, tmp_path: Path) -> None:
    folders = {name: Path(experts_folder("llama")) / name for name in ("e0", "e1", "e2")}
    given = dict(zip(folders, weights, strict=True))
    save_composition(network_of("llama", partial(FixedGate, weights=given)), tmp_path / "one")
    found, expected = written(tmp_path / "one"), merged_by_peft(model_folder("llama"), folders, given, "cat")
    assert found.keys() == expected.keys()
    for path, matrix in expected.items():
        assert relative(found[path], matrix) <= 1e-5, path


@torch.no_grad()
@pytest.mark.parametrize("weights", [(0.5, 0.25, 1.5), (1.0, 0.0, 0.3)], ids=str)
def test_a_written_separate_sum_is_pefts_linear_with_squared_weights(weights: tuple, tmp_path: Path) -> None:
    """PEFT takes the root of a weight for each factor; below 0 it turns A alone, another rule than LoraHub's."""
    experts = adapters(tmp_path / "experts")
    folders = {name: Path(experts) / name for name in ("add", "echo", "turn")}
    given = dict(zip(folders, weights, strict=True))
    network = GatedNetwork(
        backbone="debug-tiny",
        dtype="float32",
        experts=experts,
        gate=partial(FixedGate, weights=given),
        combine="separate",
    )
    save_composition(network, tmp_path / "one")
    squared = {name: weight**2 for name, weight in given.items()}
    found, expected = written(tmp_path / "one"), merged_by_peft("debug-tiny", folders, squared, "linear")
    assert found.keys() == expected.keys()
    for path, matrix in expected.items():
        assert relative(found[path], matrix) <= 1e-5, path


def test_what_is_written_comes_from_the_files_not_from_rounded_weights(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        network = network_of("llama", partial(FixedGate, weights={"e0": 0.3}), dtype=dtype)
        save_composition(network, tmp_path / dtype)
    one, other = (written(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "stretch"}, r"same weights for every token.*got StretchGate\(.*save_pretrained"),
        ({"gate": "task"}, r"same weights for every token.*got TaskGate"),
        ({"gate": "uniform", "combine": "gram_schmidt"}, "combine: gram_schmidt"),
        ({"gate": LoraHub, "zero": True}, "some weight other than 0"),
        ({"gate": partial(FixedGate, weights={"e0": 0.0})}, "some weight other than 0"),
    ],
    ids=["stretch", "task", "gram_schmidt", "hub at 0", "weight 0"],
)
def test_what_is_no_single_lora_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    network = network_of("llama", options.pop("gate"), **{k: v for k, v in options.items() if k == "combine"})
    if "zero" in options:
        for layer in network.layers.values():
            nn.init.zeros_(layer.gate.weights)
    with pytest.raises(ValueError, match=message):
        save_composition(network, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_ragged_ranks_cannot_be_merged_apart() -> None:
    with pytest.raises(ValueError, match="one rank with combine: separate"):
        network_of("llama", UniformGate, combine="separate")
