"""GatedNetwork: what trains, what never moves, which arguments and backbones it takes."""

import gc
import hashlib

import pytest
import torch
import transformers
from builders import assert_near
from tiny_models import (
    FIVE,
    GATES,
    NAMES,
    SEQ2SEQ,
    batch_of,
    experts_folder,
    left_padded,
    loss_of,
    model_folder,
    network_of,
    write_expert,
)

from radargate_pl.backbones import load_tokenizer
from radargate_pl.expert_banks import experts_of_tasks
from radargate_pl.gates import FixedGate, RadarGate, StretchGate, TaskGate
from radargate_pl.network_checks import check_backbone
from radargate_pl.networks import GatedNetwork, NewExperts
from radargate_pl.records import record_gates


def bytes_of(tensors):
    return {name: hashlib.sha256(t.detach().contiguous().numpy().tobytes()).digest() for name, t in tensors}


@pytest.mark.parametrize(
    ("kind", "gate"), [("llama", "radar"), ("llama", "radar-experts-raw"), ("llama", "rotation"), ("t5", "radar")]
)
def test_only_gate_parameters_move(kind, gate):
    network, batch = network_of(kind, gate).train(), batch_of(kind)
    # Frozen in full precision of their bytes: also what an optimiser given everything would decay or move.
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    before = bytes_of(network.state_dict().items())
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(network, batch).backward()
        optimizer.step()
    after = bytes_of(network.state_dict().items())
    moved = {name for name in before if before[name] != after[name]}
    single = {path for path, layer in network.layers.items() if layer.bank.num_experts == 1}
    # One expert alone has nothing to be rotated against, and no other to be preferred to.
    gates = {f"backbone.{path}" for path in network.trainable_state() if path.rpartition(".gate")[0] not in single}
    assert gates <= moved <= {f"backbone.{path}" for path in network.trainable_state()}
    assert all(".gate." in name for name in moved)
    assert len(moved) > 2


@pytest.mark.parametrize("kind", FIVE)
def test_without_experts_it_is_the_bare_backbone_bit_for_bit(kind):
    bare = network_of(kind, experts=[])
    model = getattr(transformers, type(bare.backbone).__name__).from_pretrained(model_folder(kind)).eval()
    ids = batch_of(kind)["input_ids"][:1]
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if kind in SEQ2SEQ else {"input_ids": ids}
    with torch.no_grad():
        assert torch.equal(bare.backbone(**inputs).logits, model(**inputs).logits)
        options = {"max_new_tokens": 4, "do_sample": False}
        mine = bare.generate(ids, torch.ones_like(ids), **options)
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(mine, whole[:, 1:] if kind in SEQ2SEQ else whole[:, ids.shape[1] :])
    assert bare.describe() == "no gate (bare backbone)"
    assert (bare.experts, bare.layers, bare.trainable_state()) == ((), {}, {})


def test_experts_of_different_layers_and_ranks():
    network = network_of("llama")
    at = {path.partition("self_attn.")[2]: layer.bank for path, layer in network.layers.items()}
    assert {name: bank.names for name, bank in at.items()} == {
        "q_proj": ("e0", "e1"),
        "v_proj": ("e1", "e2"),
        "k_proj": ("e2",),
    }
    assert {name: bank.ranks for name, bank in at.items()} == {"q_proj": (3, 2), "v_proj": (2, 4), "k_proj": (4,)}
    assert all(layer.bank.library == NAMES for layer in network.layers.values())
    batch = batch_of("llama")
    del batch["expert"]
    # A gate that chooses one expert is that expert alone, also where it is absent.
    for name in NAMES:
        one = network_of("llama", lambda site, name=name: FixedGate(site, {name: 1.0}))
        alone = network_of("llama", "uniform", experts={name: f"{experts_folder('llama')}/{name}"})
        assert_near(one(**batch).logits, alone(**batch).logits, 1e-6, name)


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_positions_of_other_kinds(kind):
    """BLOOM has no position_ids (ALiBi), OPT learned positions: padding changes nothing in either."""
    network, batch = network_of(kind, "radar"), batch_of(kind)
    right, left = network(**batch), network(**left_padded(batch))
    assert_near(left.logits, right.logits, 1e-5, kind)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {n: v[row : row + 1] if n == "expert" else v[row : row + 1, :length] for n, v in batch.items()}
        assert_near(right.logits[right.example == row], network(**alone).logits, 1e-5, f"row {row}")


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_padding_of_prompts_and_targets_changes_nothing_in_an_encoder_decoder(kind):
    # In float64: a tiny mT5 with random weights makes 1e-11 of float32's rounding alone.
    network, batch = network_of(kind).double(), batch_of(kind)
    labelled = network(**batch)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        prompt, answer = int(alone["attention_mask"].sum()), int((alone["labels"] != -100).sum())
        for name in ("input_ids", "attention_mask"):
            alone[name] = alone[name][:, :prompt]
        alone["labels"] = alone["labels"][:, :answer]
        assert_near(labelled.logits[labelled.example == row], network(**alone).logits, 1e-11, f"row {row}")


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_every_layer_of_an_encoder_decoder_knows_whose_tokens_it_reads(kind):
    network, batch = network_of(kind), batch_of(kind)
    with record_gates(network.backbone) as outputs:  # refuses masks of another size than the layer's input
        network(**batch)
    assert set(outputs) == set(network.layers)
    crosses = 0
    for path, output in outputs.items():
        key_or_value = path.rpartition(".")[2] in ("k", "v", "k_proj", "v_proj")
        crossing = "EncDecAttention" in path or "encoder_attn" in path
        reads_encoder = ".encoder." in f".{path}" or (crossing and key_or_value)
        crosses += crossing and key_or_value
        assert output.weights.shape[:2] == ((3, 9) if reads_encoder else (3, 5)), path
        assert int(output.tokens.sum()) == (19 if reads_encoder else 12), path
    assert crosses == 4


def test_the_library_lies_in_memory_once():
    network = network_of("llama")
    gc.collect()
    assert all(not adapter.lora_A and not adapter.lora_B for adapter in network.adapters)
    assert network.fingerprints["experts"].keys() == set(NAMES)


def test_precision_of_backbone_experts_and_gates():
    network = network_of("llama", dtype="bfloat16")
    dtypes = {(name.split(".")[-2 if ".bank." not in name else -1], p.dtype) for name, p in network.named_parameters()}
    assert {d for part, d in dtypes if part in ("rotation", "scorer")} == {torch.float32}
    assert {d for part, d in dtypes if part.startswith("lora_")} == {torch.bfloat16}
    trained = network_of("llama", "task", dtype="bfloat16", train="experts")
    assert {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32}
    for each in (network, trained):
        assert each(**batch_of("llama")).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("train", "gates", "experts"), [("gate", 1, 0), ("experts", 0, 1), ("both", 1, 1)])
def test_what_trains(train, gates, experts):
    network = network_of("llama", train=train)
    keys = network.trainable_state().keys()
    assert any(".gate." in key for key in keys) == bool(gates)
    assert any(".bank." in key for key in keys) == bool(experts)
    assert {f"backbone.{key}" for key in keys} == {n for n, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("gate", ["radar", "task"])
def test_state_goes_in_bit_for_bit_or_not_at_all(gate):
    network, other = network_of("llama", gate, train="both"), network_of("llama", gate, train="both")
    with torch.no_grad():
        for value in network.trainable_state().values():
            value.add_(0.125)
    state = {key: value.clone() for key, value in network.trainable_state().items()}
    other.load_checkpoint_state(state)
    assert bytes_of(other.trainable_state().items()) == bytes_of(state.items())
    first, *rest = state
    wrong = {**{key: state[key] + 1 for key in rest[1:]}, rest[0]: torch.zeros(1, 1), "model.x.gate.P": torch.zeros(1)}
    with pytest.raises(ValueError, match="does not fit") as error:
        other.load_checkpoint_state(wrong)
    for part in (f"missing: {first}", "unknown: model.x.gate.P", f"{rest[0]}: expected shape"):
        assert part in str(error.value)
    assert bytes_of(other.trainable_state().items()) == bytes_of(state.items())


NEW = NewExperts()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gate": lambda site: RadarGate(site, top_k=4)},
            r"at most the number of experts, 3 \(e0, e1, e2\), but got 4",
        ),
        ({"gate": lambda site: StretchGate(site, top_k=0)}, "top_k to be at least 1, but got 0"),
        ({"gate": lambda site: FixedGate(site, {"e7": 1.0})}, r"but got \['e7'\]"),
        ({"new_experts": NEW, "train": "experts"}, "Expected either experts or new_experts, but got both"),
        ({"experts": [], "new_experts": NEW}, "train to be 'experts' or 'both' with new_experts"),
        ({"experts": [], "new_experts": NEW, "train": "both"}, "given the tasks of a data module"),
        ({"experts": [], "train": "experts"}, "train: experts, but there are no experts to train"),
        ({"train": "all"}, "train to be 'gate', 'experts' or 'both', but got 'all'"),
        ({"dropout": 1.0}, r"dropout to be in \[0, 1\), but got 1.0"),
        ({"combine": "product"}, "combine to be one of"),
        ({"dtype": "float16"}, "dtype to be auto, float32 or bfloat16"),
        ({"experts": "/nowhere/at/all"}, "There is no folder '/nowhere/at/all'"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        network_of("llama", **options)


def test_experts_of_another_backbone_are_refused():
    with pytest.raises(ValueError, match="another backbone"):
        network_of("llama", experts=experts_folder("t5"))


def test_models_that_cannot_be_used_are_refused_by_name():
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
    with pytest.raises(ValueError, match=r"output embeddings .* but LlamaModel has none"):
        check_backbone(model, load_tokenizer("debug-tiny"))


def test_whose_expert_a_task_has():
    tasks = {"sum": "maths", "maths": "school", "poem": None}
    assert experts_of_tasks(tasks, ("maths", "school")) == {"sum": 0, "maths": 0, "poem": -1}
    # Experts made per category: the task called like a category belongs to its own.
    assert experts_of_tasks(tasks, ("maths", "school"), per="category") == {"sum": 0, "maths": 1, "poem": -1}
    assert experts_of_tasks(tasks, ("union",)) == {"sum": 0, "maths": 0, "poem": 0}
    assert experts_of_tasks({"a": "read/QA"}, ("read_QA",)) == {"a": 0}


def test_the_line_is_built_from_the_objects():
    assert network_of("llama", "stretch").describe().startswith("StretchGate(top_k=2, scorer=x")
    assert network_of("llama", "task").describe() == "TaskGate()"
    assert set(GATES) == {"radar", "radar-experts-raw", "rotation", "stretch", "uniform", "fixed", "task"}


def test_a_single_expert_folder_and_ids_on_the_way(tmp_path):
    write_expert(tmp_path / "only", network_of("llama", experts=[]).backbone, ("q_proj",), 2, 0)
    network = GatedNetwork(
        {"only": None, "other": None},
        backbone=model_folder("llama"),
        dtype="float32",
        experts=str(tmp_path / "only"),
        gate=TaskGate,
    )
    assert network.expert_of_task == {"only": 0, "other": -1}
    batch = {**batch_of("llama"), "expert": torch.tensor([0, -1, -1])}
    bare = network_of("llama", experts=[])(**{**batch, "expert": None}).logits
    found = network(**batch)
    assert torch.equal(found.logits[found.example > 0], bare[found.example > 0])
    assert not torch.allclose(found.logits[found.example == 0], bare[found.example == 0])
