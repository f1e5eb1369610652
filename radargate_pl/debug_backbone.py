"""The built-in backbone `debug-tiny`: a tiny random Llama with one token per byte, for trials in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "debug-tiny"
FOLDER = "debug-tiny-v1"  # another recipe must get another number: caches of users keep the old one
CONTEXT_LENGTH = 2048
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")


def make_debug_backbone(folder: Path) -> None:
    """Fill a folder with the model, always the same, and its tokenizer, as `save_pretrained` lays them out.

    Two layers, width 64, four heads of which two hold keys and values, 260 tokens: 107 thousand parameters, float32.

    Args:
        folder: an empty folder.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.1,  # at the usual 0.02 so narrow a model computes next to nothing
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and four special tokens; no merges and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token=SPECIAL_TOKENS[0])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    unk, bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
