"""Tiny configurations of the architectures that `compatibility.py` tries, and the layers that adapters of them name."""

from typing import Any, NamedTuple

VOCABULARY, WIDTH, LAYERS, HEADS, KEY_HEADS, INNER = 260, 32, 2, 4, 2, 64
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


class Kind(NamedTuple):
    """One architecture: transformers' `model_type`, arguments of its configuration, and sets of target modules."""

    model_type: str
    options: dict[str, Any]
    targets: dict[str, list[str]]


def _llama_like(model_type: str, targets: dict[str, list[str]] | None = None, **options: Any) -> Kind:
    """Most decoders of today, under the names that Llama gave to sizes and layers."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": 256,
        **SPECIAL,
    }
    return Kind(model_type, sizes | options, targets or {"attention": QKVO, "feed-forward": GATED})


def _gpt_like(model_type: str, targets: dict[str, list[str]], **options: Any) -> Kind:
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256}
    return Kind(model_type, sizes | SPECIAL | options, targets)


def _bloom_like(model_type: str, targets: dict[str, list[str]], **options: Any) -> Kind:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return Kind(model_type, sizes | SPECIAL | options, targets)


def _t5_like(model_type: str, targets: dict[str, list[str]], **options: Any) -> Kind:
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS}
    more = {"num_heads": HEADS, "decoder_start_token_id": 3, "eos_token_id": 2, "pad_token_id": 3}
    return Kind(model_type, sizes | more | options, targets)


def _bart_like(model_type: str, start: int = 2, **options: Any) -> Kind:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": WIDTH, "max_position_embeddings": 256}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": LAYERS, f"{side}_attention_heads": HEADS, f"{side}_ffn_dim": INNER}
    targets = {"attention": ["q_proj", "k_proj", "v_proj", "out_proj"], "feed-forward": ["fc1", "fc2"]}
    return Kind(model_type, sizes | SPECIAL | {"decoder_start_token_id": start} | options, targets)


ATTENTION = {"attention": QKVO}
FUSED = {"attention": ["query_key_value", "dense"], "feed-forward": ["dense_h_to_4h", "dense_4h_to_h"]}
UP_DOWN = {"attention": QKVO, "feed-forward": ["up_proj", "down_proj"]}
OPT_LIKE = {"attention": ["q_proj", "k_proj", "v_proj", "out_proj"], "feed-forward": ["fc1", "fc2"]}
CONV1D = {"attention": ["c_attn"], "feed-forward": ["c_fc", "c_proj"]}
ONE_OF_EACH = ["sliding_attention", "full_attention"]
LINEAR_FIRST = ["linear_attention", "full_attention"]
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": LINEAR_FIRST,
}
GEMMA_3N: dict[str, Any] = {
    **{"head_dim": 16, "sliding_window": 8, "intermediate_size": [64, 64], "hidden_size_per_layer_input": 8},
    **{"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2},
    **{"activation_sparsity_pattern": [0.0, 0.0], "layer_types": ONE_OF_EACH},
}
MAMBA_2 = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}

KINDS: dict[str, Kind] = {
    # Llama and what follows its names
    "llama": _llama_like("llama"),
    "llama, tied embeddings": _llama_like("llama", tie_word_embeddings=True),
    "llama, biases": _llama_like("llama", attention_bias=True, mlp_bias=True),
    "llama, one key head": _llama_like("llama", num_key_value_heads=1),
    "llama, stretched rope": _llama_like(
        "llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "mistral, window": _llama_like("mistral", sliding_window=8),
    "ministral, window": _llama_like("ministral", head_dim=8, sliding_window=8),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3", head_dim=16),
    "gemma": _llama_like("gemma", head_dim=16),
    "gemma2": _llama_like(
        "gemma2", head_dim=16, sliding_window=8, query_pre_attn_scalar=16, final_logit_softcapping=5.0
    ),
    "gemma3_text": _llama_like("gemma3_text", head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3n_text": _llama_like("gemma3n_text", **GEMMA_3N),
    "gemma4_text": _llama_like("gemma4_text", head_dim=16, sliding_window=8),
    "olmo": _llama_like("olmo"),
    "olmo2": _llama_like("olmo2"),
    "olmo3": _llama_like("olmo3", sliding_window=8),
    "granite": _llama_like(
        "granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "smollm3": _llama_like("smollm3", no_rope_layers=[1, 0]),
    "stablelm": _llama_like("stablelm"),
    "cohere": _llama_like("cohere"),
    "cohere2": _llama_like("cohere2", sliding_window=8),
    "exaone4": _llama_like("exaone4", sliding_window=8, sliding_window_pattern=2, layer_types=ONE_OF_EACH),
    "ernie4_5": _llama_like("ernie4_5", head_dim=8),
    "seed_oss": _llama_like("seed_oss", head_dim=8),
    "helium": _llama_like("helium", head_dim=8),
    "hunyuan_v1_dense": _llama_like("hunyuan_v1_dense", head_dim=8),
    "bitnet": _llama_like("bitnet"),
    "apertus": _llama_like("apertus", UP_DOWN),
    "nemotron": _llama_like("nemotron", UP_DOWN),
    "starcoder2": _llama_like("starcoder2", {"attention": QKVO, "feed-forward": ["c_fc", "c_proj"]}),
    "phi": _llama_like("phi", {"attention": ["q_proj", "k_proj", "v_proj", "dense"], "feed-forward": ["fc1", "fc2"]}),
    "phi3": _llama_like("phi3", {"attention": ["qkv_proj", "o_proj"], "feed-forward": ["gate_up_proj", "down_proj"]}),
    "glm": _llama_like("glm", {"attention": QKVO, "feed-forward": ["gate_up_proj", "down_proj"]}, head_dim=8),
    "glm4": _llama_like("glm4", {"attention": QKVO, "feed-forward": ["gate_up_proj", "down_proj"]}, head_dim=8),
    # their experts of a mixture are no linear layers; attention and what is shared are
    "mixtral": _llama_like("mixtral", ATTENTION, num_local_experts=4),
    "phimoe": _llama_like("phimoe", ATTENTION, num_local_experts=4),
    "qwen2_moe": _llama_like(
        "qwen2_moe",
        {"attention": QKVO, "shared expert": ["shared_expert.gate_proj", "shared_expert.down_proj"]},
        **ROUTED,
        shared_expert_intermediate_size=32,
    ),
    "qwen3_moe": _llama_like("qwen3_moe", ATTENTION, head_dim=16, **ROUTED),
    "olmoe": _llama_like("olmoe", ATTENTION, num_experts=4, num_experts_per_tok=2),
    "granitemoe": _llama_like("granitemoe", ATTENTION, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": _llama_like(
        "gpt_oss",
        ATTENTION,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=ONE_OF_EACH,
    ),
    "llama4_text": _llama_like(
        "llama4_text",
        ATTENTION,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=2,
        moe_layers=[1],
        attention_chunk_size=16,
    ),
    "deepseek_v2": _llama_like("deepseek_v2", {"attention": MLA}, **LATENT, topk_method="greedy"),
    "deepseek_v3": _llama_like("deepseek_v3", {"attention": MLA}, **LATENT),
    "jetmoe": Kind(
        "jetmoe",
        {
            **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "kv_channels": 8},
            **{"num_key_value_heads": 2, "intermediate_size": INNER, "num_local_experts": 4, "num_experts_per_tok": 2},
            **{"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2},
        },
        {"attention": ["kv_proj"]},
    ),
    # linear attention, convolutions, state spaces, recurrences
    "qwen3_next": _llama_like(
        "qwen3_next",
        {"attention": QKVO, "linear attention": ["in_proj_qkvz", "out_proj"]},
        head_dim=16,
        **ROUTED,
        shared_expert_intermediate_size=16,
        **DELTA,
    ),
    "qwen3_5_text": _llama_like("qwen3_5_text", head_dim=16, **DELTA),
    "lfm2": _llama_like(
        "lfm2",
        {"attention": ["q_proj", "k_proj", "v_proj", "out_proj"], "convolution": ["in_proj"]},
        layer_types=["conv", "full_attention"],
    ),
    "falcon_h1": _llama_like(
        "falcon_h1",
        {"attention": QKVO, "state space": ["in_proj"]},  # PEFT takes no out_proj beside a state space
        **{"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
        **{"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16},
    ),
    "recurrent_gemma": _llama_like(
        "recurrent_gemma",
        {"attention": ["q_proj", "v_proj"], "recurrence": ["linear_x", "linear_y"]},
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "mamba": _bloom_like("mamba", {"state space": ["in_proj", "x_proj"]}, state_size=4),
    "mamba2": _bloom_like("mamba2", {"state space": ["in_proj"]}, **MAMBA_2),
    # GPT-2 (Conv1D) and other families with names of their own
    "gpt2": _gpt_like("gpt2", CONV1D),
    "gpt_bigcode": _gpt_like("gpt_bigcode", CONV1D),
    "gptj": _gpt_like("gptj", {"attention": ["q_proj", "v_proj"], "feed-forward": ["fc_in", "fc_out"]}, rotary_dim=4),
    "codegen": _gpt_like(
        "codegen", {"attention": ["qkv_proj", "out_proj"], "feed-forward": ["fc_in", "fc_out"]}, rotary_dim=4
    ),
    "gpt_neo": Kind(
        "gpt_neo",
        {
            **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS},
            **{"attention_types": [[["global", "local"], 1]], "window_size": 8, "max_position_embeddings": 256},
            **SPECIAL,
        },
        {"attention": ["q_proj", "v_proj"], "feed-forward": ["c_fc", "c_proj"]},
    ),
    "gpt_neox": _bloom_like("gpt_neox", FUSED, intermediate_size=INNER, max_position_embeddings=256),
    "persimmon": _llama_like("persimmon", FUSED),
    "falcon, new": _bloom_like("falcon", FUSED, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, alibi": _bloom_like("falcon", FUSED, alibi=True, multi_query=False),
    "bloom": Kind(
        "bloom", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS, **SPECIAL}, FUSED
    ),
    "mpt": Kind(
        "mpt",
        {
            **{"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS},
            **{"max_seq_len": 256, "expansion_ratio": 2, **SPECIAL},
        },
        {"attention": ["Wqkv", "out_proj"], "feed-forward": ["up_proj", "down_proj"]},
    ),
    "opt": _bloom_like("opt", OPT_LIKE, ffn_dim=INNER, max_position_embeddings=256, word_embed_proj_dim=WIDTH),
    "biogpt": _bloom_like("biogpt", OPT_LIKE, intermediate_size=INNER, max_position_embeddings=256),
    "xglm": Kind(
        "xglm",
        {
            **{"vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": LAYERS, "attention_heads": HEADS},
            **{"ffn_dim": INNER, "max_position_embeddings": 256, **SPECIAL},
        },
        OPT_LIKE,
    ),
    # encoder-decoders
    "t5": _t5_like("t5", {"attention": ["q", "v"], "feed-forward": ["wi", "wo"]}),
    "t5, gated and untied (Flan-T5)": _t5_like(
        "t5",
        {"attention": ["q", "k", "v", "o"], "feed-forward": ["wi_0", "wi_1", "wo"]},
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "mt5": _t5_like("mt5", {"attention": ["q", "v"], "feed-forward": ["wi_0", "wo"]}),
    "umt5": _t5_like("umt5", {"attention": ["q", "v"], "feed-forward": ["wi_0", "wo"]}),
    "longt5": _t5_like("longt5", {"attention": ["q", "v"]}, local_radius=7),
    "switch_transformers": _t5_like(
        "switch_transformers",
        {"attention": ["q", "v"]},
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    "bart": _bart_like("bart", forced_eos_token_id=2),
    "mbart": _bart_like("mbart"),
    "m2m_100": _bart_like("m2m_100"),
    "pegasus": _bart_like("pegasus", start=3),
}
