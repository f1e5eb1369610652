"""Tiny random models of several architectures as local folders, with three experts each of other layers and ranks."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from builders import randomise
from safetensors.torch import save_file
from torch import Tensor, nn

from radargate_pl.backbones import load_tokenizer
from radargate_pl.gates import FixedGate, RadarGate, RotationGate, StretchGate, TaskGate, UniformGate
from radargate_pl.losses import IGNORE_INDEX, example_mean_cross_entropy
from radargate_pl.networks import GatedNetwork

ROOT = Path(tempfile.mkdtemp(prefix="radargate-models-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)

EOS, PAD, VOCABULARY = 2, 3, 260  # those of debug-tiny, whose tokenizer all of them get
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
LLAMA = {
    **SIZES,
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3},
}
GEMMA2 = {
    **LLAMA,
    **{"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
    **{"attn_logit_softcapping": 5.0},
}
GRANITE = {**LLAMA, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}
T5 = {
    **SIZES,
    **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD},
    **{"dropout_rate": 0.5},
}
MT5 = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MBART = {
    **SIZES,
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.3},
    **{"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5},
    **{"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "decoder_start_token_id": EOS, "forced_eos_token_id": None},
}
BLOOM = {**SIZES, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
OPT = {
    **SIZES,
    **{"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "init_std": 0.3},
}
LFM2 = {**LLAMA, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
FALCON_H1 = {
    **LLAMA,
    **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    **{"mamba_d_conv": 4, "mamba_chunk_size": 8},
}
MAMBA = {**SIZES, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
KINDS = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "granite": ("GraniteForCausalLM", GRANITE),
    "t5": ("T5ForConditionalGeneration", T5),
    "mt5": ("MT5ForConditionalGeneration", MT5),
    "mbart": ("MBartForConditionalGeneration", MBART),
    "bloom": ("BloomForCausalLM", BLOOM),
    "opt": ("OPTForCausalLM", OPT),
    "lfm2": ("Lfm2ForCausalLM", LFM2),
    "falcon-h1": ("FalconH1ForCausalLM", FALCON_H1),
    "mamba": ("MambaForCausalLM", MAMBA),
}
FIVE = ("llama", "gemma2", "granite", "t5", "mbart")
SEQ2SEQ = ("t5", "mt5", "mbart")
# The layers of each expert: no layer has all three, and some have a single one.
TARGETS = {
    "t5": (("q", "wo"), ("q", "v", "k"), ("v", "wo")),
    "mt5": (("q", "wi_0"), ("q", "v", "k"), ("v", "wo")),
    "mbart": (("q_proj", "fc2"), ("q_proj", "v_proj", "k_proj"), ("v_proj", "fc2")),
    "mamba": (("in_proj",), ("in_proj", "out_proj"), ("x_proj",)),
    "bloom": (("query_key_value",), ("query_key_value", "dense"), ("dense",)),
}
DECODER_ONLY = (("q_proj",), ("q_proj", "v_proj"), ("v_proj", "k_proj"))
RANKS = (3, 2, 4)
NAMES = ("e0", "e1", "e2")

GATES = {
    "radar": functools.partial(RadarGate, top_k=2, rotation_rank=4),
    "radar-experts-raw": functools.partial(RadarGate, top_k=1, scorer="experts", rotation_rank=4, angle_norm="none"),
    "rotation": functools.partial(RotationGate, top_k=2, rotation_rank=4),
    "stretch": StretchGate,
    "uniform": UniformGate,
    "fixed": functools.partial(FixedGate, weights={"e0": 0.75, "e2": -0.5}),
    "task": TaskGate,
}


@functools.cache
def model_folder(kind: str, seed: int = 0) -> str:
    """A random model saved by transformers, with a tokenizer beside it."""
    name, sizes = KINDS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**sizes))
    if kind in ("t5", "mt5"):
        scale_up(model)
    if kind == "mbart":
        model.final_logits_bias = torch.randn(1, VOCABULARY)
    folder = ROOT / f"{kind}-{seed}"
    model.generation_config.forced_eos_token_id = None
    model.save_pretrained(folder)
    load_tokenizer("debug-tiny").save_pretrained(folder)
    return str(folder)


def scale_up(model: nn.Module) -> None:
    """T5 has no width of its initialisation that makes so narrow a model compute something: larger matrices."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "relative" not in name:
                parameter.normal_(std=1.0 if "shared" in name else 0.4)


def write_expert(folder: Path, model: nn.Module, targets: tuple[str, ...], rank: int, seed: int) -> None:
    """A random PEFT folder as PEFT lays it out, written without this package."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets:
            name, (out, width) = f"base_model.model.{path}", module.weight.shape
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": task_type}))


@functools.cache
def experts_folder(kind: str) -> str:
    """The three experts e0, e1, e2 of a kind."""
    folder = ROOT / f"{kind}-experts"
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(model_folder(kind))
    for seed, (name, targets, rank) in enumerate(zip(NAMES, TARGETS.get(kind, DECODER_ONLY), RANKS, strict=True)):
        write_expert(folder / name, model, targets, rank, seed)
    return str(folder)


def network_of(kind: str, gate: str | object = "radar", **options: object) -> GatedNetwork:
    """The network over these experts, in float32, with every gate parameter away from its start."""
    made = GatedNetwork(
        **{
            "backbone": model_folder(kind),
            "dtype": "float32",
            "experts": experts_folder(kind),
            "gate": GATES[gate] if isinstance(gate, str) else gate,
            **options,
        }
    )
    for seed, layer in enumerate(made.layers.values()):
        randomise(layer.gate, seed, scale=0.5)
    return made


def batch_of(kind: str, lengths: tuple[int, ...] = (9, 6, 4), seed: int = 0) -> dict[str, Tensor]:
    """Right-padded inputs, labels (the last tokens; the targets of an encoder-decoder model) and expert ids."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(4, VOCABULARY, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.where(mask.bool(), ids, PAD)
    if kind in SEQ2SEQ:
        targets = torch.randint(4, VOCABULARY, (len(lengths), 5), generator=generator)
        kept = torch.arange(5) < torch.tensor([5, 3, 4, 2, 5, 3])[: len(lengths), None]
        labels = torch.where(kept, targets, IGNORE_INDEX)
    else:
        answer = mask.bool() & (torch.arange(width) >= torch.tensor(lengths)[:, None] - 3)
        labels = torch.where(answer, ids, IGNORE_INDEX)
    expert = torch.arange(len(lengths)) % len(NAMES)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "expert": expert}


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same examples with their padding at the other end."""
    shifts = (batch["attention_mask"].shape[1] - batch["attention_mask"].sum(1)).tolist()
    moved = {
        name: torch.stack([row.roll(shift) for row, shift in zip(batch[name], shifts, strict=True)])
        for name in ("input_ids", "attention_mask", "labels")
    }
    return {**batch, **moved}


def loss_of(network: GatedNetwork, batch: dict[str, Tensor]) -> Tensor:
    return example_mean_cross_entropy(*network(**batch), batch["input_ids"].shape[0])


def gradients(network: GatedNetwork, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor | None]:
    """Gradients of everything that trains, by name; `seed` fixes dropout."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = None
    torch.manual_seed(seed)
    loss_of(network, batch).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}


def assert_same_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], relative: float) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            limit = relative * max(float(gradient.abs().max()), 1e-6)
            assert float((found[name] - gradient).abs().max()) <= limit, name
