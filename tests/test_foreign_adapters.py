"""Adapters and gate folders as other tools write them, and as accidents leave them: read right, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from radargate_pl.adapters import load_adapters
from radargate_pl.backbone_identity import check_identity
from radargate_pl.backbones import load_backbone
from radargate_pl.debug_backbone import make_debug_backbone
from radargate_pl.gates import StretchGate, UniformGate
from radargate_pl.layer_patterns import check_pattern
from radargate_pl.networks import GatedNetwork
from radargate_pl.targets import target_linears
from radargate_pl.transposed_linear import with_ordinary_linears

# PEFT 0.21 asks transformers 5.23 for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "tiny"
    folder.mkdir()
    make_debug_backbone(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_on_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on q and v as PEFT saves it, with a B that is not zero."""
    folder = tmp_path_factory.mktemp("adapter") / "law"
    model = get_peft_model(
        load_backbone(str(base), "float32").model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def law(adapter_on_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_on_base, tmp_path / "law"))


def rewrite(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps(config))


def change(folder: Path, edit: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(edit(tensors), file, metadata={"format": "pt"})


def loaded(folder: Path, base: Path) -> Any:
    (adapter,) = load_adapters([str(folder)], load_backbone(str(base), "float32").model)
    return adapter


OFF = [None, [], "", {}, False]
FIELDS = [
    "target_parameters",
    "modules_to_save",
    "fan_in_fan_out",
    "loftq_config",
    "layer_replication",
    "alora_invocation_tokens",
    "layers_to_transform",
    "exclude_modules",
    "rank_pattern",
    "megatron_config",
    "use_dora",
    "a_field_of_tomorrow",
]


@pytest.mark.parametrize("off", OFF, ids=repr)
def test_off_is_off_however_it_is_written(law: Path, base: Path, off: Any) -> None:
    expected = loaded(law, base)
    rewrite(law, **dict.fromkeys(FIELDS, off))
    found = loaded(law, base)
    assert found.scaling == expected.scaling
    assert all(torch.equal(found.lora_B[path], B) for path, B in expected.lora_B.items())


@pytest.mark.parametrize(
    ("field", "value"), [("use_dora", True), ("target_parameters", ["experts.down"]), ("lora_bias", True)]
)
def test_what_is_on_and_not_computed_here_is_still_refused(law: Path, base: Path, field: str, value: Any) -> None:
    rewrite(law, **{field: value})
    with pytest.raises(ValueError, match=f"{field} = .* is not supported"):
        loaded(law, base)


def test_a_field_of_a_newer_peft_names_who_wrote_it(law: Path, base: Path) -> None:
    rewrite(law, qalora_group_size_2=16, peft_version="9.9.9")
    with pytest.raises(ValueError, match=r"qalora_group_size_2 = 16 .* written by PEFT 9\.9\.9: upgrade peft"):
        loaded(law, base)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_tying_of_what_is_not_tied_changes_nothing(law: Path, base: Path, targets: Any) -> None:
    rewrite(law, ensure_weight_tying=True)
    loaded(law, base)
    rewrite(law, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        loaded(law, base)


BAD_FIELDS = {
    "lora_alpha": [float("nan"), float("inf"), 1e308, "8", 10**400],
    "alpha_pattern": [{"q_proj": float("nan")}, {"(": 3}],
    "rank_pattern": [{"(": 4}, {"q_proj": 2.5}],
    "target_modules": ["(", 5],
    "exclude_modules": ["(", 5],
    "layers_to_transform": ["a", [1, "b"], 1.5],
    "layers_pattern": [7],
    "use_rslora": ["false", 1],
    "base_model_name_or_path": [5, ["a"]],
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, vs in BAD_FIELDS.items() for v in vs], ids=lambda x: str(x)[:12]
)
def test_a_field_that_is_nonsense_is_named(law: Path, base: Path, field: str, value: Any) -> None:
    file = law / "adapter_config.json"
    if value == 10**400:
        rewrite(law, lora_alpha="HERE")
        file.write_text(file.read_text().replace('"HERE"', "1" + "0" * 400))
    else:
        rewrite(law, **{field: value})
    with pytest.raises(ValueError, match=rf"(?s)law.*{field}"):
        loaded(law, base)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '"r"', "\x00"])
def test_a_config_that_is_no_object_is_one_sentence(law: Path, base: Path, text: str) -> None:
    (law / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"Expected adapter_config\.json to"):
        loaded(law, base)


def test_a_pattern_that_a_whole_library_shares_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr("radargate_pl.layer_patterns.subprocess.run", lambda *words, **options: tried.append(words))
    for _ in range(3):
        check_pattern("target_modules", r"(.*[a-z]+){2}_proj", ["layers.0.q_proj"])
    check_pattern("target_modules", r"(.*[a-z]+){2}_proj", ["layers.1.q_proj"])
    assert len(tried) == 2, "once for each model"


def test_a_pattern_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radargate_pl.layer_patterns.SECONDS", 1.0)
    paths = ["a" * 40 + "!"]
    for pattern in ("(a+)+$", "(a|a)*$", "([a-z]+)*x"):
        with pytest.raises(
            ValueError, match=r"Expected target_modules to match the layers in moments, but .* took longer"
        ):
            check_pattern("target_modules", pattern, paths)
    for pattern in (r"model\.layers\.(0|1)\..*(q|v)_proj", r"(?:.*\.)?q_proj", r"(layers\.\d+\.)+q_proj"):
        check_pattern("target_modules", pattern, ["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_number_in_an_adapter_is_named_at_load(law: Path, base: Path, side: str, value: float) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(key for key in tensors if f"layers.1.self_attn.q_proj.lora_{side}" in key)
        tensors[name][0, 0] = value
        return tensors

    change(law, edit)
    with pytest.raises(ValueError, match=r"law.*NaN or infinity in layer model\.layers\.1\.self_attn\.q_proj"):
        loaded(law, base)


@pytest.mark.parametrize(
    ("cast", "told"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), r"no LoRA of a linear layer: .* float8_e4m3fn"),
        (lambda t: t.to(torch.int8), r"no LoRA of a linear layer: .* int8"),
        (lambda t: t.double() * 1e300, "NaN or infinity"),  # infinite in float32
    ],
)
def test_numbers_that_no_expert_is_computed_in_are_named(law: Path, base: Path, cast: Any, told: str) -> None:
    change(law, lambda tensors: {key: cast(tensor) for key, tensor in tensors.items()})
    with pytest.raises(ValueError, match=told):
        loaded(law, base)


def test_files_that_accidents_leave(law: Path, base: Path) -> None:
    config = law / "adapter_config.json"
    plain, weights = config.read_bytes(), (law / "adapter_model.safetensors").read_bytes()
    config.write_bytes(b"\xef\xbb\xbf" + plain)  # a byte order mark
    loaded(law, base)
    config.write_bytes(plain)
    (law / "expert.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"Expected expert\.json to be whole"):
        loaded(law, base)
    (law / "expert.json").unlink()
    (law / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(ValueError, match="only a pointer of Git LFS"):
        loaded(law, base)
    rewrite(law, target_modules=["x" * 100_000])
    (law / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  its length is looked at
        loaded(law, base)
    assert len(str(caught.value)) < 2000


def test_names_of_adapters_in_keys_are_read_as_peft_reads_them(law: Path, base: Path) -> None:
    expected = loaded(law, base)
    change(law, lambda tensors: {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()})
    found = loaded(law, base)
    assert found.lora_A.keys() == expected.lora_A.keys()
    assert all(torch.equal(found.lora_B[path], B) for path, B in expected.lora_B.items())
    change(law, lambda tensors: {**tensors, **{k.replace("default", "two"): t.clone() for k, t in tensors.items()}})
    with pytest.raises(ValueError, match=r"holds several adapters \(default, two\)"):
        loaded(law, base)


def test_what_zero_3_leaves_behind_is_called_so(law: Path, base: Path) -> None:
    change(law, lambda tensors: {key: torch.empty(0) for key in tensors})
    with pytest.raises(ValueError, match=r"tensors in .* are empty, .*DeepSpeed ZeRO-3") as caught:
        loaded(law, base)
    assert "found 1 problem" in str(caught.value)


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (lambda key: "_orig_mod." + key, "begin with base_model.model., but this one with _orig_mod."),
        (lambda key: key.replace("base_model.model.", ""), "but this one with model."),
        (
            lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
            "carry the prefix '_orig_mod.' of a wrapper",
        ),
        (lambda key: key.replace("base_model.model.model.", "base_model.model."), "lack the prefix 'model.'"),
    ],
)
def test_keys_of_a_wrapper_say_which(law: Path, base: Path, rename: Any, told: str) -> None:
    change(law, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    with pytest.raises(ValueError, match=re.escape(told)):
        loaded(law, base)


@pytest.mark.parametrize("way", ["zero B", "alpha 0"])
def test_an_expert_that_does_nothing_is_named(law: Path, base: Path, way: str) -> None:
    if way == "zero B":
        change(law, lambda ts: {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in ts.items()})
    else:
        rewrite(law, lora_alpha=0)
    with pytest.warns(UserWarning, match=r"expert 'law' .*changes nothing"):
        loaded(law, base)


def test_another_base_models_name_is_one_line(law: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(law, base_model_name_or_path="meta-llama/Llama-9-1B")
    with caplog.at_level("INFO"):
        loaded(law, base)
    assert "expert 'law' names the base model meta-llama/Llama-9-1B; it is used over" in caplog.text


def test_folders_beside_adapters(law: Path, base: Path) -> None:
    model = load_backbone(str(base), "float32").model
    (law.parent / "runs").mkdir()
    (law.parent / "runs" / "events.out.tfevents.1").write_bytes(b"x")
    assert [adapter.name for adapter in load_adapters(str(law.parent), model)] == ["law"]
    for number in (500, 1500):
        shutil.copytree(law, law.parent / "poems" / f"checkpoint-{number}")
    with pytest.raises(
        ValueError, match=r"poems' has no adapter_config\.json, but .*checkpoint-1500' has: give that one"
    ):
        load_adapters(str(law.parent), model)


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    return (
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2))
        .eval()
        .requires_grad_(False)
    )


def test_conv1d_becomes_a_linear_layer_of_the_same_memory_and_bits(gpt2: GPT2LMHeadModel) -> None:
    import copy

    ids = torch.arange(12).view(2, 6)
    expected, ordinary = gpt2(ids).logits, copy.deepcopy(gpt2)
    held = {p.data_ptr() for p in ordinary.parameters()}
    with_ordinary_linears(ordinary)
    assert torch.equal(ordinary(ids).logits, expected)
    assert {p.data_ptr() for p in ordinary.parameters()} == held
    assert list(target_linears(ordinary, "all-linear")) == [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_gpt2_takes_adapters_as_peft_does(gpt2: GPT2LMHeadModel, base: Path, tmp_path: Path) -> None:
    import copy

    from radargate_pl.backbones import load_tokenizer

    gpt2 = copy.deepcopy(gpt2)
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer = load_tokenizer(str(base))
    tokenizer.save_pretrained(tmp_path / "gpt2")
    gpt2.resize_token_embeddings(len(tokenizer))
    gpt2.save_pretrained(tmp_path / "gpt2")
    model = get_peft_model(copy.deepcopy(gpt2), LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(str(tmp_path / "one"))
    network = GatedNetwork(
        backbone=str(tmp_path / "gpt2"), dtype="float32", experts=[str(tmp_path / "one")], gate=UniformGate
    ).eval()
    ids = torch.arange(4, 16).view(2, 6)
    assert torch.equal(network.backbone(ids).logits, model.eval()(ids).logits)


def test_new_experts_leave_out_routers_that_are_linear_by_name_only() -> None:
    from transformers import PhimoeConfig, PhimoeForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = PhimoeConfig(**sizes, num_key_value_heads=1, vocab_size=32, num_local_experts=2)
    found = target_linears(PhimoeForCausalLM(config), "all-linear")
    assert found
    assert not any("router" in path or path.endswith("gate") for path in found)


# --- gate folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate_on_base(base: Path, adapter_on_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = GatedNetwork(backbone=str(base), dtype="float32", experts=[str(adapter_on_base)], gate=StretchGateOfOne)
    folder = tmp_path_factory.mktemp("gate") / "gate"
    network.save_pretrained(folder)
    return folder


def StretchGateOfOne(site: Any) -> StretchGate:
    return StretchGate(site, top_k=1)


@pytest.fixture
def gate(gate_on_base: Path, tmp_path: Path) -> Path:
    """A gate folder that still finds backbone and experts where they were."""
    folder = Path(shutil.copytree(gate_on_base, tmp_path / "gate"))
    config = json.loads((folder / "gate_config.json").read_text())
    for name, path in config["experts"].items():
        config["experts"][name] = str((gate_on_base / path).resolve())
    config["backbone"] = str((gate_on_base / config["backbone"]).resolve())
    (folder / "gate_config.json").write_text(json.dumps(config))
    return folder


MUTATIONS: dict[str, Any] = {
    "class_path": lambda c: c["gate"].update(class_path=5),
    "gate": lambda c: c.update(gate=[]),
    "init_args": lambda c: c["gate"].update(init_args=None),
    "unknown argument": lambda c: c["gate"]["init_args"].update(colour="red"),
    "another gate": lambda c: c["gate"].update(class_path="radargate_pl.gates.tutel.TutelGate"),
    "backbone": lambda c: c.update(backbone=5),
    "experts": lambda c: c.update(experts=[]),
    "fingerprints": lambda c: c.update(fingerprints={}),
    "expert fingerprints": lambda c: c["fingerprints"].update(experts=5),
    "decoder_start": lambda c: c.update(decoder_start=None),
    "combine": lambda c: c.update(combine=None),
    "version": lambda c: c.update(format_version=True),
    "huge": lambda c: c["gate"].update(
        class_path="radargate_pl.gates.radar.RadarGate", init_args={"rotation_rank": 10**9}
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_gate_folder_of_another_shape_is_one_sentence(gate: Path, name: str) -> None:
    file = gate / "gate_config.json"
    config = json.loads(file.read_text())
    MUTATIONS[name](config)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"gate_config\.json|gate|parameter"):
        GatedNetwork.from_pretrained(gate)


def test_an_argument_of_another_type_is_not_blamed_on_the_folder(gate: Path) -> None:
    with pytest.raises(ValueError, match="Correct the arguments; if none was given"):
        GatedNetwork.from_pretrained(gate, experts=3)


@pytest.mark.parametrize("kind", ["nan", "inf", "whole numbers"])
def test_tensors_no_gate_computes_with_are_refused(gate: Path, kind: str) -> None:
    tensors = load_file(gate / "gate.safetensors")
    name = next(iter(tensors))
    tensors[name] = (
        tensors[name].to(torch.int32) if kind == "whole numbers" else torch.full_like(tensors[name], float(kind))
    )
    save_file(tensors, gate / "gate.safetensors")
    with pytest.raises(
        ValueError, match="floating-point tensors" if kind == "whole numbers" else "has NaN or infinity"
    ):
        GatedNetwork.from_pretrained(gate)


def test_what_is_not_ours_stays_in_a_gate_folder(gate: Path) -> None:
    network = GatedNetwork.from_pretrained(gate)
    (gate / "my_notes.txt").write_text("mine")
    (gate / "plots").mkdir()
    (gate / "plots" / "a.png").write_bytes(b"png")
    network.save_pretrained(gate, include_experts=True)
    assert (gate / "experts" / "law" / "adapter_config.json").is_file()
    network.save_pretrained(gate)
    assert (gate / "my_notes.txt").read_text() == "mine"
    assert (gate / "plots" / "a.png").read_bytes() == b"png"
    assert (gate / "experts" / "law" / "adapter_config.json").is_file()
    GatedNetwork.from_pretrained(gate)


def test_other_experts_inside_are_not_taken_for_the_gates(gate: Path) -> None:
    network = GatedNetwork.from_pretrained(gate)
    network.save_pretrained(gate, include_experts=True)
    change(gate / "experts" / "law", lambda tensors: {key: 2 * tensor for key, tensor in tensors.items()})
    before = (gate / "gate_config.json").read_bytes()
    with pytest.raises(ValueError, match="hold no other experts than this gate's, but 'law'"):
        network.save_pretrained(gate)
    assert (gate / "gate_config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "value"), [("rope_theta", 50.0), ("rms_norm_eps", 0.5), ("tokenizer", None), ("template", None)]
)
def test_the_same_weights_that_compute_otherwise_are_another_backbone(
    gate: Path, base: Path, tmp_path: Path, setting: str, value: Any
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    if setting == "tokenizer":
        words = json.loads((other / "tokenizer.json").read_text())
        vocab = words["model"]["vocab"]
        first, second = [word for word, number in vocab.items() if number in (100, 101)]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        (other / "tokenizer.json").write_text(json.dumps(words))
    elif setting == "template":
        (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    else:
        config = json.loads((other / "config.json").read_text())
        target = config.get("rope_parameters", config) if setting == "rope_theta" else config
        target[setting] = value
        (other / "config.json").write_text(json.dumps(config))
    GatedNetwork.from_pretrained(gate)
    with pytest.raises(ValueError, match=r"the same weights and computes otherwise: .*(rope|eps|tokenizer|template)"):
        GatedNetwork.from_pretrained(gate, backbone=str(other))


def test_an_older_folder_says_what_was_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        check_identity(None, {"config": {}, "tokenizer": "", "chat_template": None}, "the gate in g")
    assert "the gate in g is of an earlier version: the backbone's configuration, tokenizer" in caplog.text


def test_a_vocabulary_is_hashed_once_for_all_checkpoints(gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = GatedNetwork.from_pretrained(gate)
    before = network.identity()

    def again() -> None:
        raise AssertionError("the whole vocabulary again")

    monkeypatch.setattr(network.tokenizer, "get_vocab", again)
    assert network.identity() == before
    monkeypatch.undo()
    network.tokenizer.add_tokens(["a new word"])
    assert network.identity()["tokenizer"] != before["tokenizer"]


def test_a_setting_of_another_transformers_is_not_compared() -> None:
    now = {"config": {"a": 1, "new": 2}, "tokenizer": "t", "chat_template": None}
    check_identity({"config": {"a": 1, "gone": 3}, "tokenizer": "t", "chat_template": None}, now, "it")
