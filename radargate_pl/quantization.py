"""Backbones whose linear layers are held in 4 or 8 bits by bitsandbytes, so that larger ones fit (layer 3).

Only frozen weights are narrow; the output head, and whatever else transformers keeps wide (T5's `wo`), stays as it is.
They are multiplied in the compute dtype, the same way in training, evaluation and generation, so that a token's result
depends on no other token and gradients are those of the weights as they are held. Two of bitsandbytes' own ways break
that and are not taken:

* Its 8-bit layer (LLM.int8) rounds the inputs too, and which columns it spares depends on the whole batch. Measured on
  `smollm2-135m-q4`: the logits of a sentence move by up to 2.5 with the sentences beside it, and their error is three
  times that of `Linear8bit`.
* On processors with AVX512-BF16 its 4-bit layer repacks itself at the first evaluation: the scales are rounded to
  bfloat16 for good, and no gradient passes the layer any more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.notices import say_once
from radargate_pl.precision import Float32Module

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Quantization = Literal["none", "4bit", "8bit"]
QUANTIZATIONS = ("none", "4bit", "8bit")
PACKAGE = "bitsandbytes"


class Linear8bit(Float32Module, nn.Linear):
    """A frozen linear layer whose weight is held in 8 bits and multiplied in the dtype of its input.

    The weight is widened again in the backward pass instead of being kept for it.

    Args:
        layer: a `bitsandbytes.nn.Linear8bitLt` with its weights loaded; its tensors are taken over, not copied.

    Attributes:
        weight: (out, in) int8.
        scale: largest magnitude of each row, which stands for 127, (out,) float32.
    """

    scale: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", layer.weight.SCB)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y: Tensor = _LinearOfBytes.apply(x, self.weight, self.scale, self.bias)
        return y


class _LinearOfBytes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _widened(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (weight, scale) = gradients, ctx.saved_tensors
        return gradient @ _widened(weight, scale, gradient.dtype), None, None, None


def _widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    wide: Tensor = int8_vectorwise_dequant(weight, scale)
    return wide.to(dtype)


def number_of_weights(parameter: Tensor) -> int:
    """Count the numbers of a parameter; bitsandbytes packs two of 4 bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else torch.Size(packed.shape).numel()


def _is_about_other_kernels(record: logging.LogRecord) -> bool:
    """Not about the kernel of 4 bits that bitsandbytes misses when PEFT imports it, though nothing is in 4 bits."""
    return "gemm_4bit" not in record.getMessage()


def loading_options(
    backbone: str, config: PreTrainedConfig, quantization: str, *, is_gguf: bool = False
) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantise a model while it loads it; nothing for "none".

    Args:
        backbone: what the user wrote, for messages.
        config: of the backbone.
        quantization: "none", "4bit" (NF4 with quantised scales, as in QLoRA) or "8bit" (one scale per row).
        is_gguf: whether the weights come from a `.gguf` file.

    Raises:
        ValueError: for another quantisation, a backbone that is quantised already, or without bitsandbytes.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"Expected quantization to be none, 4bit or 8bit, but got {quantization!r}.")
    stored = None if is_gguf else getattr(config, "quantization_config", None)
    has_4_bits, logger = quantization == "4bit" or bool(stored), logging.getLogger(f"{PACKAGE}.backends.cpu.ops")
    (logger.removeFilter if has_4_bits else logger.addFilter)(_is_about_other_kernels)
    if quantization == "none":
        if stored and _method_of(stored) == PACKAGE:
            _check_bitsandbytes(f"backbone {backbone!r}, whose weights it quantised", "choose another backbone")
        return {}
    if is_gguf or stored:
        kind = "a .gguf file" if is_gguf else f"quantised by {_method_of(stored)}"
        raise ValueError(
            f"Expected a backbone of full precision with quantization: {quantization}, but {backbone!r} is {kind}. "
            "Set quantization: none, or give the folder or hub id of the full weights."
        )
    _check_bitsandbytes(f"quantization: {quantization}", "set quantization: none")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4)}


@contextmanager
def loading_errors(backbone: str, quantization: str) -> Iterator[None]:
    """Turn what bitsandbytes and transformers raise about the device or a version into a sentence.

    Args:
        backbone: what the user wrote.
        quantization: as in `loading_options`.

    Raises:
        ValueError: when a quantised backbone cannot be loaded here. Too little memory stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError) as error:
        if quantization == "none":
            raise
        device = "the GPU" if torch.cuda.is_available() else "the processor"
        raise ValueError(
            f"Expected {PACKAGE} to load backbone {backbone!r} with quantization: {quantization} for {device}, but it "
            f"could not: {error}. Install a version for this device, or set quantization: none."
        ) from error


def multiply_exactly(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the quantised layers of a model compute as the head of this module says; nothing else changes.

    Args:
        model: as loaded, changed in place.
        dtype: compute dtype.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return  # importing bitsandbytes takes seconds
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    misread: dict[int, str] = {}  # width to one of its layers
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Linear8bitLt):
            model.set_submodule(path, Linear8bit(layer))
        elif isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            if layer.in_features not in misread and is_misread(layer.weight):
                misread[layer.in_features] = path
    if misread:
        examples = ", ".join(f"{path} ({width} inputs)" for width, path in misread.items())
        say_once(
            f"On this processor {PACKAGE} misreads 4-bit weights of layers whose inputs are no multiple of 64: "
            f"{examples}. The model differs from its quantised weights; set quantization: 8bit, or use a GPU."
        )


def is_misread(weight: Any) -> bool:
    """Tell whether bitsandbytes reads a 4-bit weight otherwise row by row than as one row, which holds whole blocks.

    Its release 0.50.2 does on processors with AVX512, by up to the size of the weights.

    Args:
        weight: a `bitsandbytes.nn.Params4bit` on a CPU; others are taken to be right.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return False
    flat = copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    return not torch.equal(dequantize_4bit(weight.data, state).flatten(), dequantize_4bit(weight.data, flat).flatten())


def _method_of(stored: Any) -> str:
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method))


def _check_bitsandbytes(purpose: str, otherwise: str) -> None:
    if find_spec(PACKAGE) is None:
        raise ValueError(
            f"Expected the package {PACKAGE} for {purpose}, but it is missing. "
            f"Run: pip install 'radargate-pl[quantized]', or {otherwise}."
        )
