"""One expert chosen by a one-hot gate is PEFT with that adapter: read from PEFT's own folders, on PEFT's own models."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from builders import peft_adapter, peft_model, randomise, tiny_llama
from torch import Tensor, nn

from radargate_pl.adapters import load_adapters
from radargate_pl.expert_banks import loaded_banks
from radargate_pl.gates import Context, FixedGate, RadarGate, TaskGate
from radargate_pl.moe import attach, moe_layers

QV = ["q_proj", "v_proj"]
LIBRARIES: dict[str, list[dict]] = {
    "equal rank": [
        {"r": 4, "lora_alpha": 8, "target_modules": QV},
        {"r": 4, "lora_alpha": 32, "target_modules": QV},
        {"r": 4, "lora_alpha": 5, "target_modules": QV},
    ],
    "rsLoRA": [
        {"r": 6, "lora_alpha": 8, "use_rslora": True, "target_modules": QV},
        {"r": 6, "lora_alpha": 8, "target_modules": QV},
    ],
    "other targets": [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": QV, "layers_to_transform": [1]},
    ],
    "mixed rank": [
        {"r": 2, "lora_alpha": 8, "target_modules": QV},
        {"r": 5, "lora_alpha": 8, "target_modules": QV},
    ],
    "patterns": [
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "target_modules": QV},
        {
            "r": 3,
            "lora_alpha": 7,
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6},
            "target_modules": QV,
        },
    ],
}
PADDED = ("mixed rank", "patterns")


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    parent = tmp_path_factory.mktemp("adapters")
    configs = LIBRARIES[request.param]
    return request.param, {f"a{i}": peft_adapter(parent / f"a{i}", i, **c) for i, c in enumerate(configs)}


def gated(folders: dict[str, Path], gate: object, dtype: torch.dtype) -> tuple[nn.Module, Context]:
    model, context = tiny_llama(dtype=dtype), Context()
    adapters = load_adapters({name: str(folder) for name, folder in folders.items()}, model)
    attach(model, loaded_banks(adapters, dtype), gate, context=context)
    return model, context


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(97, (rows, 9), generator=torch.Generator().manual_seed(1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def test_one_hot_gates_equal_peft_in_float32(library: tuple[str, dict[str, Path]]) -> None:
    kind, folders = library
    ids, plain = tokens(), tiny_llama()(tokens()).logits
    for index, (name, folder) in enumerate(folders.items()):
        expected = peft_model(folder, torch.float32)(ids).logits
        assert relative(expected, plain) > 0.05  # the adapter does something
        fixed, _ = gated(folders, partial(FixedGate, weights={name: 1.0}), torch.float32)
        by_task, context = gated(folders, TaskGate, torch.float32)
        context.replace(expert=torch.full((3,), index))
        for model in (fixed, by_task):
            ours = model(ids).logits
            if kind in PADDED:
                assert relative(ours, expected) <= 1e-6
            else:
                assert torch.equal(ours, expected)


@torch.no_grad()
def test_a_batch_of_several_tasks_equals_peft_row_by_row(library: tuple[str, dict[str, Path]]) -> None:
    """All experts of the batch at once, and a row without one; the whole model piles up the layers' 1e-6."""
    _, folders = library
    model, context = gated(folders, TaskGate, torch.float32)
    ids = tokens(len(folders) + 2)
    context.replace(expert=torch.tensor([*range(len(folders)), -1, 0]))
    ours = model(ids).logits
    experts = [peft_model(folder, torch.float32) for folder in folders.values()]
    for row, peft in enumerate([*experts, tiny_llama(), experts[0]]):
        assert relative(ours[row], peft(ids[row : row + 1]).logits[0]) <= 4e-6


@torch.no_grad()
def test_fixed_weights_equal_the_weighted_sum_of_pefts_updates(library: tuple[str, dict[str, Path]]) -> None:
    """Layer by layer, on one input: base + sum_i w_i (peft_i - base)."""
    _, folders = library
    weights = {name: 0.5 - 0.75 * i for i, name in enumerate(folders)}
    model, _ = gated(folders, partial(FixedGate, weights=weights), torch.float32)
    peft_models = {name: peft_model(folder, torch.float32).base_model.model for name, folder in folders.items()}
    for path, layer in moe_layers(model).items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3))
        base = layer.base_layer(x)
        expected = base.double()
        for name, peft in peft_models.items():
            expected = expected + weights[name] * (peft.get_submodule(path)(x).double() - base.double())
        assert relative(layer(x).double(), expected) <= 2e-6


def ulps(ours: Tensor, theirs: Tensor) -> int:
    """Largest distance in units of the last place between two bfloat16 tensors (ordered as integers)."""

    def ordered(tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    return int((ordered(ours) - ordered(theirs)).abs().max())


@torch.no_grad()
def test_one_hot_gates_are_within_two_ulp_of_peft_in_bfloat16(library: tuple[str, dict[str, Path]]) -> None:
    """Layer by layer on what PEFT's own layers received, so that rounding does not pile up over the model."""
    _, folders = library
    for index, (name, folder) in enumerate(folders.items()):
        peft = peft_model(folder, torch.bfloat16)
        fixed, _ = gated(folders, partial(FixedGate, weights={name: 1.0}), torch.bfloat16)
        by_task, context = gated(folders, TaskGate, torch.bfloat16)
        context.replace(expert=torch.full((3,), index))
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            module.register_forward_hook(lambda m, args, y, path=path, seen=seen: seen.update({path: (args[0], y)}))
            for path, module in peft.base_model.model.named_modules()
            if path in moe_layers(fixed)
        ]
        peft(tokens())
        for handle in handles:
            handle.remove()
        assert set(seen) == set(moe_layers(fixed))
        for model in (fixed, by_task):
            for path, layer in moe_layers(model).items():
                x, expected = seen[path]
                assert layer(x).dtype == torch.bfloat16
                assert ulps(layer(x), expected) <= 2, path


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_on_a_batch_of_several_tasks_is_within_the_bounds(
    library: tuple[str, dict[str, Path]], dtype: torch.dtype
) -> None:
    """1e-6 relative in float32; in bfloat16 2 ulp, which needs the scaling after B as in PEFT."""
    _, folders = library
    model, context = gated(folders, TaskGate, dtype)
    context.replace(expert=torch.arange(len(folders)))
    peft_layers = [peft_model(folder, dtype).base_model.model for folder in folders.values()]
    for path, layer in moe_layers(model).items():
        x = torch.randn(len(folders), 40, layer.in_features, generator=torch.Generator().manual_seed(3)).to(dtype)
        ours = layer(x)
        for row, peft in enumerate(peft_layers):
            expected = peft.get_submodule(path)(x[row])
            if dtype == torch.float32:
                assert relative(ours[row], expected) <= 1e-6, path
            else:
                assert ulps(ours[row], expected) <= 2, path


@torch.no_grad()
@pytest.mark.parametrize("kind", ["equal rank", "mixed rank"])
def test_all_experts_with_weight_one_equal_peft_with_every_adapter_active(kind: str, tmp_path: Path) -> None:
    folders = {f"a{i}": peft_adapter(tmp_path / f"a{i}", i, **c) for i, c in enumerate(LIBRARIES[kind])}
    peft = peft_model(folders["a0"], torch.float32)
    for name, folder in folders.items():
        peft.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
    peft.base_model.set_adapter(list(folders))
    ours, _ = gated(folders, partial(FixedGate, weights=dict.fromkeys(folders, 1.0)), torch.float32)
    assert relative(ours(tokens()).logits, peft(tokens()).logits) <= 2e-6


def test_gradients_of_training_experts_equal_pefts(tmp_path: Path) -> None:
    """The experts of a batch under TaskGate receive PEFT's own gradients."""
    configs = LIBRARIES["rsLoRA"]
    folders = {f"a{i}": peft_adapter(tmp_path / f"a{i}", i, **c) for i, c in enumerate(configs)}
    model, context = tiny_llama(), Context()
    adapters = load_adapters({name: str(folder) for name, folder in folders.items()}, model)
    attach(model, loaded_banks(adapters, torch.float32, trainable=True), TaskGate, context=context)
    ids = tokens(4)
    context.replace(expert=torch.tensor([0, 1, 1, 0]))
    model(ids).logits.square().mean(dim=(1, 2)).sum().backward()
    for index, (name, folder) in enumerate(folders.items()):
        peft = peft_model(folder, torch.float32)
        peft.requires_grad_(True)
        peft(ids[[[0, 3], [1, 2]][index]]).logits.square().mean(dim=(1, 2)).sum().backward()
        for path, layer in moe_layers(model).items():
            theirs = peft.base_model.model.get_submodule(path)
            lora_A, lora_B = layer.bank.expert_weights(name)
            torch.testing.assert_close(lora_A.grad, theirs.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(lora_B.grad, theirs.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_saturated_learned_gate_is_peft_too(tmp_path: Path) -> None:
    """RadarGate with Q = 0 whose scorer always picks one expert with weight 1: the path that lifts and rotates."""
    folders = {f"a{i}": peft_adapter(tmp_path / f"a{i}", i, **c) for i, c in enumerate(LIBRARIES["equal rank"])}
    model, _ = gated(folders, partial(RadarGate, top_k=1, renormalize="always"), torch.float32)
    for layer in moe_layers(model).values():
        randomise(layer.gate.scorer)
        nn.init.zeros_(layer.gate.scorer.weight)  # a tie: the lowest index
    assert relative(model(tokens()).logits, peft_model(folders["a0"], torch.float32)(tokens()).logits) <= 1e-6
