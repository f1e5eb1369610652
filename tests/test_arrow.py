"""ArrowGate: against a dense oracle, against PEFT's own Arrow on its own models, against mttl's per-token merge."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path

import pytest
import torch
from builders import IN, OUT, assert_near, bank_of, experts_of, layer_of, recorded, site_of, tiny_llama
from dense_comparison import assert_equals_dense, assert_finite, layer_in_float64
from gate_cases import COUNT, inputs
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from reference import Expert
from reference_rules import arrow_weights, dense_prototype
from torch import Tensor, nn

from radargate_pl.adapters import load_adapters
from radargate_pl.expert_banks import loaded_banks
from radargate_pl.gates import ArrowGate, Context
from radargate_pl.moe import attach, moe_layers
from radargate_pl.rotations import RadarRotation

OPTIONS = [
    {"top_k": k, "temperature": t, "norm_input": n, "scale": s}
    for k, (t, n, s) in itertools.product(
        (1, 2, COUNT), ((1.0, False, False), ("sqrt_in", True, False), (0.3, False, True), (2.0, True, True))
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rotates", [False, True], ids=["plain", "rotated"])
def test_it_equals_the_dense_reference(options: dict, rotates: bool) -> None:
    experts = experts_of(COUNT)
    rotation = {"rotation": RadarRotation} if rotates else {}
    layer = layer_in_float64(ArrowGate, experts, **options, **rotation)
    assert_equals_dense(layer, experts, inputs(), arrow_weights, **options)


def test_nothing_trains_and_nothing_is_saved() -> None:
    layer = layer_of(experts_of(COUNT), ArrowGate)
    assert list(layer.gate.parameters()) == []
    assert [key for key in layer.state_dict() if key.startswith("gate")] == []
    assert layer.gate.prototypes.shape == (COUNT, IN)


def test_prototypes_stay_in_float32_under_a_cast_of_the_model() -> None:
    layer = layer_of(experts_of(COUNT, dtype=torch.bfloat16), ArrowGate).to(torch.bfloat16)
    assert layer.gate.prototypes.dtype == torch.float32
    assert layer(torch.randn(3, IN).bfloat16()).dtype == torch.bfloat16


def test_the_signs_of_prototypes_and_inputs_do_not_matter() -> None:
    experts, x = experts_of(COUNT), inputs()
    flipped = {n: Expert(-e.lora_A, -e.lora_B, e.scaling) for n, e in experts.items()}
    one, other = (layer_in_float64(ArrowGate, some, top_k=2) for some in (experts, flipped))
    torch.testing.assert_close(other(x), one(x), rtol=0, atol=1e-13)
    _, ours = recorded(one, x, angles=False)
    _, mirrored = recorded(one, -x, angles=False)
    assert torch.equal(ours.weights, mirrored.weights)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", ["identical", "zero", "one zero", "zero input"])
def test_edge_cases_are_finite_in_outputs_and_gradients(kind: str, top_k: int) -> None:
    experts = experts_of(3)
    empty = {n: Expert(e.lora_A, torch.zeros_like(e.lora_B), e.scaling) for n, e in experts.items()}
    experts = {
        "identical": dict.fromkeys(experts, experts["e0"]),
        "zero": empty,
        "one zero": {**experts, "e1": empty["e1"]},
        "zero input": experts,
    }[kind]
    x = inputs() * (kind != "zero input")
    layer = layer_in_float64(ArrowGate, experts, top_k=top_k, norm_input=True)
    assert_finite(layer, x)
    weights = recorded(layer, x, angles=False)[1]
    if kind in ("identical", "zero", "zero input") and top_k < 3:  # a tie: the lowest indices, equal weights
        torch.testing.assert_close(weights.weights, torch.full_like(weights.weights, 1 / top_k))
        assert (weights.indices == torch.arange(top_k)).all()


def test_one_expert_is_that_expert() -> None:
    experts, x = experts_of(1), inputs()
    layer = layer_in_float64(ArrowGate, experts, top_k=1)
    e = experts["e0"]
    expected = layer.base_layer(x) + e.scaling * (x @ e.lora_A.T) @ e.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


def test_experts_absent_from_a_layer_count_nowhere() -> None:
    experts = experts_of(2)
    layer = layer_of(experts, ArrowGate, library=("x", *experts, "y"))  # top_k 3, two experts here, four in all
    weights = recorded(layer, inputs(), angles=False)[1]
    assert weights.indices is None
    assert weights.weights.shape == (len(inputs()), 2)


def test_an_expert_that_joins_changes_no_token_that_does_not_choose_it() -> None:
    experts, x = experts_of(5), inputs(tokens=40)
    before, after = ({n: experts[n] for n in list(experts)[:count]} for count in (4, 5))
    one, two = (layer_in_float64(ArrowGate, some, top_k=2) for some in (before, after))
    same = (recorded(two, x, angles=False)[1].indices != 4).all(-1)
    assert 0 < int(same.sum()) < 40
    torch.testing.assert_close(two(x)[same], one(x)[same], rtol=0, atol=1e-13)
    assert ArrowGate.takes_new_experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k to be at least 1, but got 0"),
        ({"top_k": 5}, r"top_k to be at most the number of experts, 4 \(e0, e1, e2, e3\), but got 5"),
        ({"temperature": 0.0}, "temperature to be positive and finite or 'sqrt_in', but got 0.0"),
        ({"temperature": math.nan}, "temperature to be positive .* but got nan"),
        ({"temperature": "sqrt"}, "temperature to be positive .* but got 'sqrt'"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArrowGate(site_of(), **options).bind(bank_of(experts_of(COUNT)))


def test_experts_that_still_train_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trained experts for ArrowGate.*layer are still to be trained"):
        layer_of(experts_of(COUNT), ArrowGate, trainable=True)


# ---- PEFT's own Arrow


def arrow_adapter(folder: Path, seed: int, rank: int = 4) -> str:
    """A LoRA of `tiny_llama` whose second singular value is half the first: PEFT's 15 iterations then err by 1e-9."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=3 + seed, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(tiny_llama(), config)
        generator = torch.Generator().manual_seed(seed)
        values = torch.tensor([3.0, 1.5, 0.8, 0.4])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    drawn = torch.linalg.qr(torch.randn(max(parameter.shape), rank, generator=generator)).Q
                    parameter.copy_(drawn.T if "lora_A" in name else drawn * values)
        model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    parent = tmp_path_factory.mktemp("arrow")
    return [arrow_adapter(parent / f"a{seed}", seed) for seed in range(4)]


def peft_arrow(folders: list[str], **config: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_arrow_model(tiny_llama(), folders, ArrowConfig(rng_seed=0, **config)).eval()


def our_arrow(folders: list[str], **options: object) -> nn.Module:
    model = tiny_llama()
    banks = loaded_banks(load_adapters(folders, model), torch.float32)
    attach(model, banks, lambda site: ArrowGate(site, **options), context=Context())
    return model


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def tokens() -> Tensor:
    return torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(("top_k", "temperature"), [(3, 1.0), (1, 1.0), (2, 0.2), (4, 3.0)])
def test_it_is_pefts_arrow(folders: list[str], top_k: int, temperature: float) -> None:
    """Prototypes up to sign within 1e-6, logits within 5e-6 relative (float32)."""
    theirs = peft_arrow(folders, top_k=top_k, router_temperature=temperature)
    ours = our_arrow(folders, top_k=top_k, temperature=temperature)
    expected, plain = theirs(tokens()).logits, tiny_llama()(tokens()).logits
    assert relative(expected, plain) > 0.05  # the adapters do something
    assert relative(ours(tokens()).logits, expected) <= 5e-6
    for path, layer in moe_layers(ours).items():
        arrow = theirs.base_model.model.get_submodule(path).lora_arrow["arrow_router"]
        found, wanted = layer.gate.prototypes, arrow.prototypes
        signs = (found * wanted).sum(-1, keepdim=True).sign()
        torch.testing.assert_close(found * signs, wanted, rtol=0, atol=1e-6)
        x = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(3))
        got = layer(x) - layer.base_layer(x)
        want = theirs.base_model.model.get_submodule(path)(x.unsqueeze(0))[0] - layer.base_layer(x)
        assert relative(got, want) <= 2e-6, path


@torch.no_grad()
def test_it_takes_more_experts_kept_than_there_are_only_at_a_layer(folders: list[str]) -> None:
    """PEFT fails inside torch.topk here; this names the number."""
    with pytest.raises(RuntimeError, match="out of range"):
        peft_arrow(folders, top_k=5)(tokens())
    with pytest.raises(ValueError, match="top_k to be at most the number of experts, 4"):
        our_arrow(folders, top_k=5)


# ---- mttl's default: A and B merged for each token


@pytest.mark.parametrize("options", OPTIONS[:8], ids=str)
def test_separate_is_mttls_merge_before_the_product(options: dict) -> None:
    """A(x) = sum_i c_i A_i and B(x) = sum_i c_i B_i, multiplied for each token, with sqrt(scaling) in each."""
    experts, x = experts_of(COUNT, ranks=(2,)), inputs()
    layer = layer_of(experts, lambda site: ArrowGate(site, **options), combine="separate")
    layer.gate.double()
    weights, _, _ = arrow_weights(x, (), list(experts.values()), {}, **options)
    rows = []
    for token, coefficients in zip(x, weights, strict=True):
        A = sum(c * e.scaling**0.5 * e.lora_A for c, e in zip(coefficients, experts.values(), strict=True))
        B = sum(c * e.scaling**0.5 * e.lora_B for c, e in zip(coefficients, experts.values(), strict=True))
        rows.append(B @ (A @ token))
    assert_near(layer(x) - layer.base_layer(x), torch.stack(rows), 1e-12, "update")
    assert_near(layer.gate.prototypes[0].abs(), dense_scaled(experts["e0"], options["scale"]), 1e-12, "prototype")
    assert rows[0].shape == (OUT,)


def dense_scaled(expert: Expert, scale: bool) -> Tensor:
    direction, value = dense_prototype(expert)
    return (direction * value**2 if scale else direction).abs()
