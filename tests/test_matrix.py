"""Every gate in every architecture inside a model: k = 1, 2, n; float32, bfloat16; train, eval, cached decoding.

Each layer's input and output are taken from the model's own forwards and compared with the dense reference.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import pytest
import torch
from builders import batch, experts_of, randomise, tiny_llama
from reference import (
    Expert,
    constant_weights,
    expert_outputs,
    mixture,
    norm_weights,
    softmax_top_k,
    stretch_weights,
)
from reference_combines import gram_schmidt
from reference_gates import expert_choice_weights, nexus_weights, tutel_weights
from reference_rotations import rank_rotated_outputs
from reference_rules import dense_prototype
from torch import Tensor, nn
from transformers import DynamicCache

from radargate_pl import gates
from radargate_pl.experts import ExpertBank
from radargate_pl.gates import ALL_GATES, Context
from radargate_pl.moe import MoELinear, attach, moe_layers
from radargate_pl.ops import dense_weights
from radargate_pl.records import record_gates

COUNT = 3
NAMES = tuple(f"e{i}" for i in range(COUNT))
ARCHITECTURES = {"mole": "sum", "hydralora": "sum", "omoe": "gram_schmidt", "omoe_unit": "gram_schmidt_unit"}
FIXED = (0.25, -1.5, 0.5)
SEARCHED = (0.5, -0.75, 1.25)


def arrow_weights(x: Tensor, outputs: list, experts: list, state: dict, *, top_k: int) -> tuple:
    """|x . p_i|, the largest kept, softmax over them."""
    scores = torch.stack([(x @ dense_prototype(expert)[0].to(x.dtype)).abs() for expert in experts], dim=-1)
    weights, chosen = softmax_top_k(scores, top_k, 1.0, "always")
    return weights, scores, chosen


class Case(NamedTuple):
    """A gate, its arguments, and the function that gives its dense weights (with what that needs to know)."""

    gate: str
    options: dict
    weights: object
    known: dict

    def __str__(self) -> str:
        return "-".join([self.gate, *(str(v) for v in self.options.values() if not isinstance(v, dict))])


def constant(gate: str, fixed: tuple, **options: object) -> Case:
    return Case(gate, options, constant_weights, {"fixed": fixed})


def first(k: int, weights: tuple = FIXED) -> dict:
    return dict(zip(NAMES[:k], weights[:k], strict=True))


def padded(weights: tuple) -> tuple:
    return (*weights, *(0.0,) * (COUNT - len(weights)))


CASES = [
    *(
        Case(gate, {"top_k": k}, weights, {"top_k": k})
        for k in (1, 2, COUNT)
        for gate, weights in (
            ("StretchGate", stretch_weights),
            ("RadarGate", stretch_weights),
            ("RotMoLEGate", stretch_weights),
            ("RotationGate", norm_weights),
            ("TutelGate", tutel_weights),
            ("NexusGate", nexus_weights),
            ("ExpertChoiceGate", expert_choice_weights),
            ("ArrowGate", arrow_weights),
        )
    ),
    *(constant("FixedGate", padded(FIXED[:k]), weights=first(k)) for k in (1, 2, COUNT)),
    *(constant("PEMs", padded(tuple(w / sum(FIXED[:k]) for w in FIXED[:k])), weights=first(k)) for k in (1, 2, COUNT)),
    constant("UniformGate", (1 / COUNT,) * COUNT),
    constant("LoraHub", SEARCHED),
    constant("DirectLoRA", (0.0, 1.0, 0.0), expert="e1"),
    constant("TaskGate", (0.0, 0.0, 1.0)),
]


def test_every_gate_is_in_the_matrix() -> None:
    assert {case.gate for case in CASES} == {gate.__name__ for gate in ALL_GATES}


def gated_model(case: Case, architecture: str, dtype: torch.dtype) -> tuple[nn.Module, Context]:
    """A tiny Llama with three experts at v_proj of both layers, every number of the gates away from its start."""
    model, context = tiny_llama(dtype=dtype), Context()
    banks = {}
    for seed, (path, module) in enumerate(model.named_modules()):
        if path.endswith("v_proj"):
            sizes = {"in_features": module.in_features, "out_features": module.out_features}
            experts = experts_of(COUNT, dtype=dtype, seed=seed, ranks=(2, 3, 2), **sizes)
            lora_A = {name: expert.lora_A for name, expert in experts.items()}
            if architecture == "hydralora":
                experts = experts_of(COUNT, dtype=dtype, seed=seed, ranks=(3,), **sizes)
                lora_A = dict.fromkeys(experts, experts["e0"].lora_A)
            lora_B = {name: expert.lora_B for name, expert in experts.items()}
            banks[path] = ExpertBank(lora_A, lora_B, {name: expert.scaling for name, expert in experts.items()})
    gate = partial(getattr(gates, case.gate), **case.options)
    attach(model, banks, gate, context=context, combine=ARCHITECTURES[architecture])
    for seed, layer in enumerate(moe_layers(model).values()):
        if case.gate == "NexusGate":
            randomise(layer.gate.projection, seed)
        else:
            randomise(layer.gate, seed)
        if case.gate == "LoraHub":
            with torch.no_grad():
                layer.gate.weights.copy_(torch.tensor(SEARCHED))
    return model, context


class Watched(NamedTuple):
    """What one layer read and wrote in a forward, and the weights its gate gave; tokens flattened."""

    layer: MoELinear
    x: Tensor
    y: Tensor
    weights: Tensor


def watched(model: nn.Module, forwards: list) -> list[Watched]:
    """Run forwards; put together what each layer saw in all of them."""
    layers = moe_layers(model)
    seen: dict[str, list] = {path: [] for path in layers}
    for forward in forwards:
        read: dict[str, tuple] = {}
        handles = [
            layer.register_forward_hook(lambda m, args, y, path=path, read=read: read.update({path: (args[0], y)}))
            for path, layer in layers.items()
        ]
        with record_gates(model) as outputs:
            forward()
        for handle in handles:
            handle.remove()
        for path, (x, y) in read.items():
            weights = dense_weights(outputs[path].weights, outputs[path].indices, COUNT)
            seen[path].append([tensor.detach().flatten(0, -2) for tensor in (x, y, weights)])
    return [Watched(layer, *map(torch.cat, zip(*seen[path], strict=True))) for path, layer in layers.items()]


def dense_output(case: Case, architecture: str, seen: Watched, known: dict) -> tuple[Tensor, Tensor]:
    """The layer's output and weights by the dense reference, in float64, from the numbers the layer really has."""
    layer, x = seen.layer, seen.x.double()
    state = {name: p.double() for name, p in layer.named_parameters()}
    pairs = [layer.bank.expert_weights(name) for name in NAMES]
    experts = [
        Expert(A.double(), B.double(), scaling) for (A, B), scaling in zip(pairs, layer.bank.scaling, strict=True)
    ]
    outputs = expert_outputs(x, experts)
    weights = case.weights(x, outputs, experts, state, **known)[0]
    if case.gate == "RotMoLEGate":
        outputs = rank_rotated_outputs(x, experts, state)
    if architecture.startswith("omoe"):
        kept = [(row != 0).nonzero().flatten().tolist() for row in weights]
        outputs = gram_schmidt(outputs, kept, unit=architecture == "omoe_unit")
    mixed, _ = mixture(outputs, weights, state.get("gate.rotation.P"), state.get("gate.rotation.Q"), "rms")
    return x @ state["base_layer.weight"].T + mixed, weights


def assert_dense(case: Case, architecture: str, seen: list[Watched], dtype: torch.dtype, **known: object) -> None:
    """bfloat16 rounds latents: tokens near a tie may keep another expert, and are left out where they do."""
    for each in seen:
        with torch.no_grad():
            expected, weights = dense_output(case, architecture, each, {**case.known, **known})
        same = ((each.weights != 0) == (weights != 0)).all(-1)
        assert same.double().mean() >= (1.0 if dtype == torch.float32 else 0.8)
        scale = float(expected.abs().max())
        error = float((each.y.double() - expected)[same].abs().max()) / scale
        assert error <= (2e-5 if dtype == torch.float32 else 2**-5), f"{each.layer.gate.site.path}: {error}"


def refused(case: Case, architecture: str) -> bool:
    return case.gate == "ExpertChoiceGate" and architecture.startswith("omoe")


@pytest.mark.filterwarnings("ignore:ExpertChoiceGate selects", "ignore:NexusGate knows experts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gates_and_architectures(case: Case, architecture: str, dtype: torch.dtype) -> None:
    if refused(case, architecture):
        with pytest.raises(ValueError, match="keeps equally many experts for every token with combine: gram_schmidt"):
            gated_model(case, architecture, dtype)
        return
    model, context = gated_model(case, architecture, dtype)
    ids, real = batch(rows=2, length=4)
    expert = torch.full((2,), 2)
    for layer in moe_layers(model).values():
        layer.train()
    context.replace(expert=expert, tokens={"decoder": real})
    logits: list[Tensor] = []
    seen = watched(model, [lambda: logits.append(model(ids, attention_mask=real.long()).logits)])
    known = {"training": True, "real": real.flatten().tolist()} if case.gate == "ExpertChoiceGate" else {}
    assert_dense(case, architecture, seen, dtype, **known)
    trained = [p for layer in moe_layers(model).values() for p in layer.gate.parameters() if p.requires_grad]
    if trained and case.gate != "LoraHub":
        logits[0].float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)

    model.eval()
    context.replace(expert=expert)
    with torch.no_grad():
        full: list[Tensor] = []
        assert_dense(case, architecture, watched(model, [lambda: full.append(model(ids).logits)]), dtype)
        cache, stepped = DynamicCache(config=model.config), []
        steps = [
            lambda t=t: stepped.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
            for t in range(ids.shape[1])
        ]
        assert_dense(case, architecture, watched(model, steps), dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(torch.cat(stepped, 1), full[0], rtol=0, atol=1e-4 * float(full[0].abs().max()))


def test_number_of_cases() -> None:
    assert len(list(itertools.product(CASES, ARCHITECTURES, (torch.float32, torch.bfloat16)))) == 272
