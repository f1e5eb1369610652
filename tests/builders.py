"""Tiny experts, banks, layers, models and PEFT adapters that the tests of layers 0 to 2 share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from reference import Expert
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from radargate_pl.experts import ExpertBank
from radargate_pl.gates import ArrowGate, Context, DirectLoRA, FixedGate, Gate, PEMs, Site
from radargate_pl.moe import MoELinear, attach, moe_layers
from radargate_pl.records import GateOutput, record_gates
from radargate_pl.trainable_experts import TrainableExpertBank

RANKS = (3, 1, 2, 3, 2)
SCALINGS = (2.0, 1.0, 8 / 6**0.5, 0.5, 1.5)  # plain alpha / r and one like rsLoRA's alpha / sqrt(r)
IN, OUT = 6, 9  # an odd out: the last coordinate has no partner and stays


def experts_of(
    count: int,
    *,
    in_features: int = IN,
    out_features: int = OUT,
    ranks: Sequence[int] = RANKS,
    scalings: Sequence[float] = SCALINGS,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Expert]:
    """`count` random experts named e0, e1, ... whose outputs have an RMS near 1 before the scaling."""
    generator = torch.Generator().manual_seed(seed)
    experts = {}
    for i in range(count):
        rank = ranks[i % len(ranks)]
        lora_A = torch.randn(rank, in_features, generator=generator, dtype=torch.float64) / in_features**0.5
        lora_B = torch.randn(out_features, rank, generator=generator, dtype=torch.float64) / rank**0.5
        experts[f"e{i}"] = Expert(lora_A.to(dtype), lora_B.to(dtype), scalings[i % len(scalings)])
    return experts


def bank_of(
    experts: Mapping[str, Expert], *, library: Sequence[str] | None = None, trainable: bool = False
) -> ExpertBank:
    """The product's bank of these experts."""
    kind = TrainableExpertBank if trainable else ExpertBank
    return kind(
        {name: expert.lora_A.clone() for name, expert in experts.items()},
        {name: expert.lora_B.clone() for name, expert in experts.items()},
        {name: expert.scaling for name, expert in experts.items()},
        library=library,
    )


def site_of(out_features: int = OUT, in_features: int = IN, experts: Sequence[str] = ("e0", "e1", "e2")) -> Site:
    """A layer for gates and rotations that are built without one."""
    return Site("layer", in_features, out_features, max(RANKS), tuple(experts))


class OneLinear(nn.Module):
    """The smallest model there is: one linear layer called `layer`."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layer_of(
    experts: Mapping[str, Expert],
    gate: Callable[[Site], Gate],
    *,
    library: Sequence[str] | None = None,
    context: Context | None = None,
    bias: bool = True,
    trainable: bool = False,
    combine: str = "sum",
    seed: int = 7,
) -> MoELinear:
    """A MoELinear around a random frozen linear, in the experts' dtype."""
    torch.manual_seed(seed)
    first = next(iter(experts.values()))
    model = OneLinear(first.lora_A.shape[1], first.lora_B.shape[0], first.lora_A.dtype, bias).requires_grad_(False)
    bank = bank_of(experts, library=library, trainable=trainable)
    layers = attach(
        model, {"layer": bank}, gate, context=context if context is not None else Context(), combine=combine
    )
    return layers["layer"]


def randomise(gate: nn.Module, seed: int = 3, scale: float = 1.0) -> None:
    """Every trainable number of a gate away from its neutral start (Q = 0)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * noise / parameter.shape[0] ** 0.5)


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two random layers, 32 wide, with grouped attention so that q_proj and v_proj differ in size."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def peft_adapter(folder: Path, seed: int, *, b_scale: float = 0.3, **config: object) -> Path:
    """A random, non-zero LoRA of `tiny_llama(0)` saved by PEFT itself; `config` goes to LoraConfig."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1000 + seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates, and the tiny model has no name
        model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(b_scale * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    return folder


def peft_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """`tiny_llama(0)` with one adapter loaded by PEFT itself, in the model's dtype throughout."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(tiny_llama(dtype=dtype), folder, autocast_adapter_dtype=False).eval()


class OneLayer(nn.Module):
    """A model around one finished layer, under the path `layer`."""

    def __init__(self, layer: MoELinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def recorded(layer: MoELinear, x: Tensor, angles: bool = True) -> tuple[Tensor, GateOutput]:
    with record_gates(OneLayer(layer), angles=["layer"] if angles else []) as outputs:
        y = layer(x)
    return y, outputs["layer"]


def assert_near(ours: Tensor, expected: Tensor, relative: float, what: str) -> None:
    assert ours.shape == expected.shape, what
    ours, expected = ours.detach(), expected.detach()
    difference = float((ours - expected).abs().max())
    assert difference <= relative * max(float(expected.abs().max()), 1e-3), f"{what}: {difference}"


NEEDED = {  # arguments without a default, or one that is too large here
    FixedGate: {"weights": {"e0": 0.5, "e1": -0.25}},
    ArrowGate: {"top_k": 2},  # its own default, 3, is more than many tests have experts
    DirectLoRA: {"expert": "e0"},
    PEMs: {"weights": {"e0": 1.0, "e1": -0.25}},
}


def gated_llama(
    gate: type, *, dtype: torch.dtype = torch.float32, trainable: bool = False, dropout: float = 0.0, **options: object
) -> tuple[nn.Module, Context]:
    """A tiny Llama with experts at q_proj (all three) and v_proj (two of them) of both layers."""
    model, context = tiny_llama(dtype=dtype), Context()
    banks = {}
    for seed, (path, module) in enumerate(model.named_modules()):
        if path.endswith(("q_proj", "v_proj")):
            sizes = {"in_features": module.in_features, "out_features": module.out_features}
            experts = experts_of(3, dtype=dtype, seed=seed, **sizes)
            if path.endswith("v_proj"):
                experts.pop("e1")
            banks[path] = bank_of(experts, library=("e0", "e1", "e2"), trainable=trainable)
    attach(model, banks, partial(gate, **NEEDED.get(gate, {}), **options), context=context, dropout=dropout)
    for seed, layer in enumerate(moe_layers(model).values()):
        randomise(layer.gate, seed)
    return model, context


def batch(rows: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(97, (rows, length), generator=generator)
    real = torch.arange(length) < torch.tensor([length, length - 3, 2])[:rows, None]
    return ids, real
