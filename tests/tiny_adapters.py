"""Tiny backbones, and adapters for them, written by PEFT and by this package."""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from radargate_pl.adapters import save_adapter, target_linears

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
Q0 = "model.layers.0.self_attn.q_proj"


def llama(**changes):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_key_value_heads": 2, **changes})).eval()


def t5():
    torch.manual_seed(2)
    return T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)).eval()


def gpt2():
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(**GPT2)).eval()


def save_with_peft(folder, model, seed=0, **config):
    """A PEFT adapter with random A and B, saved by PEFT; returns the PEFT model."""
    peft_model = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    # "auto" looks whether the vocabulary grew, for which it asks the hub.
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return peft_model.eval()


def deltas_of(peft_model):
    """Path to what PEFT adds to the weight of each layer."""
    layers = {name: layer for name, layer in peft_model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def logits(model):
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
        return model(input_ids=ids).logits


def edit(folder, file="adapter_config.json", **changes):
    written = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**written, **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def written(folder, model=None, seed=0, **changes):
    """An adapter of equal rank written by this package; returns its fingerprint."""
    layers = target_linears(model or llama(), ["q_proj", "v_proj"])
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)
    arguments = {
        "lora_A": {path: torch.randn(4, layer.in_features, generator=shared) for path, layer in layers.items()},
        "lora_B": {path: torch.randn(layer.out_features, 4, generator=generator) for path, layer in layers.items()},
        "alpha": 32,
        "rank": 4,
        "target_modules": ["q_proj", "v_proj"],
        "backbone": "tiny",
        "backbone_fingerprint": "sha256:1",
        "task_type": "CAUSAL_LM",
        **changes,
    }
    return save_adapter(folder, **arguments)


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
