"""Frozen backbones and their tokenizers: hub id, local folder, `.gguf` file or a built-in name."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from radargate_pl import debug_backbone, smollm2
from radargate_pl.built_in_backbones import damaged, whole_folder
from radargate_pl.cache_folder import cache_folder
from radargate_pl.fingerprints import fingerprint_tensors
from radargate_pl.hub import hub_error, is_hub_id
from radargate_pl.near_paths import lies_here

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from radargate_pl.quantization import Quantization

BUILT_IN = (smollm2.NAME, debug_backbone.NAME)
# ALBERT's tokenizer, which IndicBART has, by default drops capitals and accents: in Devanagari these are vowel signs.
AS_WRITTEN = {"do_lower_case": False, "keep_accents": True}


@dataclass
class Backbone:
    """A pretrained model that stays frozen, with its tokenizer.

    Attributes:
        model: frozen, in evaluation mode, causal or sequence-to-sequence.
        tokenizer: with a pad token (the end token where the model has none of its own).
        fingerprint: SHA-256 of the weight files before any cast or quantisation.
        source: what the user wrote.
        folder: where config and weights lie; None for a `.gguf` file.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    source: str
    folder: Path | None


def load_backbone(
    backbone: str, dtype: Literal["auto", "float32", "bfloat16"] = "auto", quantization: Quantization = "none"
) -> Backbone:
    """Load a causal or sequence-to-sequence language model, frozen and in evaluation mode.

    Args:
        backbone: hub id, local folder, `.gguf` file, or built-in `smollm2-135m-q4` or `debug-tiny`.
        dtype: of the weights in memory; `auto` is bfloat16 where the device computes in it, else float32.
        quantization: hold the weights of linear layers in 4 or 8 bits and multiply in `dtype`; such a model is loaded
            onto the GPU straight away where there is one.

    Raises:
        ValueError: no such backbone, it cannot be fetched, its files are incomplete, the dtype is another one, or it
            cannot be quantised.
    """
    import transformers

    from radargate_pl.quantization import loading_errors, loading_options, multiply_exactly
    from radargate_pl.transposed_linear import with_ordinary_linears

    weights_dtype = _weights_dtype(dtype)
    resolve_backbone(backbone, with_weights=True)
    where, gguf = _located(backbone)
    config = _from_pretrained(transformers.AutoConfig, backbone, where, **gguf)
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    auto = transformers.AutoModelForSeq2SeqLM if is_encoder_decoder else transformers.AutoModelForCausalLM
    options = loading_options(backbone, config, quantization, is_gguf=bool(gguf)) | gguf
    with loading_errors(backbone, quantization):
        model, report = _from_pretrained(
            auto, backbone, where, dtype=weights_dtype, output_loading_info=True, **options
        )
    if report["missing_keys"]:  # transformers would fill them with random numbers and a warning
        raise ValueError(
            f"Expected backbone {backbone!r} to hold every weight of {type(model).__name__}, but these are missing: "
            f"{_shortened(sorted(report['missing_keys']))}. Fetch or save it again."
        )
    if gguf:
        smollm2.forget_quantization(model)
    with_ordinary_linears(model)
    multiply_exactly(model, weights_dtype)
    model.requires_grad_(False).eval()
    folder = None if gguf else _model_folder(where)
    files = _weight_files(folder) if folder else [Path(where) / gguf["gguf_file"]]
    return Backbone(model, load_tokenizer(backbone), fingerprint_tensors(files), backbone, folder)


def load_tokenizer(backbone: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone without its weights.

    Args:
        backbone: as in `load_backbone`.

    Raises:
        ValueError: there is no such backbone or tokenizer, or it has neither a pad nor an end token.
    """
    import transformers

    where, gguf = _located(backbone)
    tokenizer = _from_pretrained(transformers.AutoTokenizer, backbone, where, **gguf)
    if isinstance(tokenizer, transformers.AlbertTokenizer):
        tokenizer = _from_pretrained(transformers.AutoTokenizer, backbone, where, **AS_WRITTEN)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"Expected the tokenizer of backbone {backbone!r} to have an end token, but it has none.")
        tokenizer.pad_token = tokenizer.eos_token  # labels and masks come from positions, so the two may be the same
    return tokenizer


def is_encoder_decoder(backbone: str) -> bool:
    """Whether a backbone is an encoder-decoder, from its configuration alone; `.gguf` files are decoder-only here.

    Args:
        backbone: as in `load_backbone`.
    """
    import transformers

    where, gguf = _located(backbone)
    return not gguf and bool(_from_pretrained(transformers.AutoConfig, backbone, where).is_encoder_decoder)


def context_length(backbone: str) -> int | None:
    """How many positions a backbone has, in tokens, from its configuration alone; ``None`` where nothing limits them.

    Args:
        backbone: as in `load_backbone`; a `.gguf` file says nothing here.
    """
    import transformers

    where, gguf = _located(backbone)
    if gguf:
        return None
    positions = getattr(_from_pretrained(transformers.AutoConfig, backbone, where), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def resolve_backbone(backbone: str, *, with_weights: bool = False) -> Path | str:
    """Return the folder or `.gguf` file of a backbone, or the hub id itself; built-in ones are made on first use.

    Args:
        backbone: as in `load_backbone`.
        with_weights: of a built-in one, compare the weights with their checksum too; a damaged one is made anew.

    Raises:
        ValueError: there is no such backbone (with the nearest names), or a built-in one cannot be fetched.
    """
    folder = cache_folder() / "backbones"
    if backbone == smollm2.NAME:
        make = partial(smollm2.make_smollm2, downloads=cache_folder() / "downloads")
        return whole_folder(folder / smollm2.FOLDER, make, with_weights=with_weights)
    if backbone == debug_backbone.NAME:
        place = folder / debug_backbone.FOLDER
        return whole_folder(place, debug_backbone.make_debug_backbone, with_weights=with_weights)
    path = Path(backbone).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise ValueError(
            f"Expected backbone to be a folder with a config.json or a .gguf file, but {backbone!r} is neither."
        )
    _check_could_be_hub_id(backbone, path)
    return backbone


def supports_bfloat16() -> bool:
    """Whether the device computes in bfloat16: the GPU if there is one, else the processor (AVX512-BF16 or AMX)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return processor_supports_bfloat16()


def processor_supports_bfloat16() -> bool:
    """Whether the processor itself computes in bfloat16, whatever GPU there is beside it."""
    import torch

    has_avx512, has_amx = torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported
    return bool(has_avx512() or has_amx())


def _weights_dtype(dtype: str) -> torch.dtype:
    import torch

    if dtype == "auto":
        return torch.bfloat16 if supports_bfloat16() else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"Expected dtype to be auto, float32 or bfloat16, but got {dtype!r}.")
    return dtypes[dtype]


def _located(backbone: str) -> tuple[Path | str, dict[str, str]]:
    """What `from_pretrained` takes: a folder or hub id, and the name of a `.gguf` file in that folder."""
    resolved = resolve_backbone(backbone)
    if isinstance(resolved, Path) and resolved.is_file():
        smollm2.check_gguf_package()
        return resolved.parent, {"gguf_file": resolved.name}
    return resolved, {}


def _from_pretrained(auto: Any, backbone: str, where: Path | str, **options: Any) -> Any:
    """Call `auto.from_pretrained`; code from the hub is never run, and errors become sentences."""
    from safetensors import SafetensorError

    try:
        return auto.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(where, str):
            raise hub_error("backbone", where, error, hint=f"; built in are {' and '.join(BUILT_IN)}") from error
        if backbone in BUILT_IN:
            raise ValueError(f"{damaged(Path(where))} ({auto.__name__}: {error})") from error
        raise ValueError(
            f"Expected backbone {backbone!r} to be complete and of a kind that transformers knows, but "
            f"{auto.__name__} could not load it: {error}. Fetch or save it again."
        ) from error


def _model_folder(where: Path | str) -> Path:
    if isinstance(where, Path):
        return where
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(where, "config.json")
    assert isinstance(config, str), "the hub's client has just loaded this model from its cache"
    return Path(config).parent


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads in this folder: the one file, else the shards of the index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise ValueError(
        f"Expected weights in the safetensors format in {folder}, but there are none. Convert them: load the model "
        "with transformers and call save_pretrained."
    )


def _check_could_be_hub_id(backbone: str, path: Path) -> None:
    """Refuse what is surely meant as a path or a built-in name, before the hub is asked."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near_files = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, siblings)]
    near = difflib.get_close_matches(backbone, BUILT_IN, n=2, cutoff=0.7) + near_files
    if is_hub_id(backbone) and not ("/" not in backbone and near) and not lies_here(backbone):
        return
    hint = f"nearest: {', '.join(near)}" if near else f"built in: {', '.join(BUILT_IN)}"
    raise ValueError(
        f"Expected backbone to be a folder, a .gguf file, a hub id or a built-in name, but there is no "
        f"{backbone!r} ({hint})."
    )


def _shortened(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
