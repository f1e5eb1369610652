"""Experts from scratch: their names, their start, and that PEFT loads each of them alone."""

import warnings

import pytest
import torch
from builders import assert_near
from tiny_models import SEQ2SEQ, batch_of, model_folder, network_of

from radargate_pl.gates import RadarGate, TaskGate
from radargate_pl.networks import GatedNetwork, NewExperts

TASKS = {"sum": "maths", "product": "maths", "poem": "language/verse"}


def network(kind="llama", tasks=TASKS, seed=11, gate=TaskGate, train="experts", **options):
    torch.manual_seed(seed)
    targets = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
    new = NewExperts(**{"target_modules": targets, "rank": 3, "alpha": 7, **options})
    backbone = model_folder(kind)
    return GatedNetwork(tasks, backbone=backbone, dtype="float32", new_experts=new, gate=gate, train=train)


def trained(*args, **options):
    """With B away from zero, as after training."""
    made, generator = network(*args, **options), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in made.trainable_state().items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) / 2)
    return made


@pytest.mark.parametrize(
    ("per", "names", "of_task"),
    [
        ("task", ("sum", "product", "poem"), [0, 1, 2]),
        ("category", ("maths", "language_verse"), [0, 0, 1]),
        ("union", ("union",), [0, 0, 0]),
    ],
)
def test_names(per, names, of_task):
    made = network(per=per)
    assert made.experts == names
    assert [made.expert_of_task[task] for task in TASKS] == of_task
    assert all(layer.bank.names == names for layer in made.layers.values())
    assert len(made.layers) == 4


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({}, {}, "given the tasks of a data module, but there are none"),
        ({"sum": None, "poem": "text"}, {"per": "category"}, r"category, but these have none: \['sum'\]"),
        ({"a": "x/y", "b": "x y"}, {"per": "category"}, "'x/y' and 'x y' both give an expert called 'x_y'"),
        (TASKS, {"per": "tasks"}, "new_experts.per to be 'task', 'category', 'union' or 'mixture', but got 'tasks'"),
        (TASKS, {"rank": 0}, "new_experts.rank to be at least 1, but got 0"),
        (TASKS, {"per": "mixture", "count": 0}, "new_experts.count to be at least 1, but got 0"),
        (TASKS, {"per": "mixture"}, "TaskGate to know an expert of some task.*expert_0.*belong to none"),
        (TASKS, {"target_modules": ["query"]}, r"but \['query'\] matches nothing"),
        (TASKS, {"train": "gate"}, "train to be 'experts' or 'both' with new_experts"),
    ],
)
def test_errors(tasks, options, message):
    with pytest.raises(ValueError, match=message):
        network(tasks=tasks, **options)


def state(made, expert):
    return {name: value for name, value in made.trainable_state().items() if name.endswith(f".{expert}")}


def test_the_start_is_drawn_from_seed_name_and_path():
    library = network()
    for task in TASKS:  # alone as in the library, in any order, after any other draws
        torch.randn(3)
        alone, mine = state(network(tasks={task: None}), task), state(library, task)
        assert alone.keys() == mine.keys()
        assert all(torch.equal(alone[name], mine[name]) for name in mine)
        assert all((value == 0).all() for name, value in mine.items() if "lora_B" in name)
    matrices = [value for name, value in library.trainable_state().items() if "lora_A" in name]
    others = [value for name, value in network(seed=12).trainable_state().items() if "lora_A" in name]
    everything = [*matrices, *others]
    assert len(everything) == 24
    assert len({tuple(matrix.flatten().tolist()) for matrix in everything}) == 24
    for matrix in matrices:  # PEFT's: Kaiming uniform with a = sqrt(5), that is +-1/sqrt(in)
        assert 0.9 / 32**0.5 < float(matrix.abs().max()) <= 1 / 32**0.5


def test_fresh_experts_leave_the_backbone_as_it_is():
    batch = batch_of("llama")
    assert torch.equal(network()(**batch).logits, network_of("llama", experts=[])(**{**batch, "expert": None}).logits)


@pytest.mark.parametrize("kind", ["llama", "t5", "mbart"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_saved_expert_loads_alone_in_peft(tmp_path, kind, use_rslora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    made, batch = trained(kind, use_rslora=use_rslora), batch_of(kind)
    made.save_experts(tmp_path / "experts")
    auto = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM
    for index, name in enumerate(made.experts):
        ids = batch["input_ids"][index : index + 1, : int(batch["attention_mask"][index].sum())]
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind in SEQ2SEQ else {})}
        model = auto.from_pretrained(model_folder(kind), dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates
            peft = PeftModel.from_pretrained(model, tmp_path / "experts" / name).eval()
        made.context.replace(torch.tensor([index]))
        with torch.no_grad():
            ours, bare = made.eval().backbone(**inputs).logits, network_of(kind, experts=[]).backbone(**inputs).logits
            assert_near(ours, peft(**inputs).logits, 1e-6, name)
            assert not torch.allclose(ours, bare, rtol=1e-2)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"share_A": True}], ids=str)
def test_saved_and_loaded_back_equal(tmp_path, options):
    made, batch = trained(**options), batch_of("llama")
    made.save_experts(tmp_path)
    order = {name: str(tmp_path / name) for name in made.experts}
    for train in ("gate", "experts"):
        again = network_of("llama", "task", experts=order, train=train)
        assert torch.equal(again(**batch).logits, made(**batch).logits)
        assert again.shares_A == made.shares_A == ("share_A" in options)
        assert all(
            layer.bank.scaling == made.layers[path].bank.scaling and layer.bank.ranks == made.layers[path].bank.ranks
            for path, layer in again.layers.items()
        )
    again.save_experts(tmp_path / "again")
    twice = network_of("llama", "task", experts={name: str(tmp_path / "again" / name) for name in made.experts})
    assert_near(twice(**batch).logits, made(**batch).logits, 1e-6, "trained on and saved")
    assert set(twice.experts) == set(made.experts)


def test_a_shared_A_is_one_parameter_before_and_after_loading(tmp_path):
    made = trained(share_A=True, gate=RadarGate, train="both")
    made.save_experts(tmp_path)
    again = network_of("llama", "task", experts=str(tmp_path), train="experts")
    for each in (made, again):
        for layer in each.layers.values():
            first, *others = (layer.bank.expert_weights(name)[0] for name in layer.bank.names)
            assert all(other is first for other in others)
        count = sum(p.requires_grad for name, p in each.named_parameters() if ".lora_" in name)
        assert count == 4 * (1 + 3)
    assert {key.rpartition(".")[2] for key in made.trainable_state() if "lora_A" in key} == set(TASKS)
    plain = trained()
    plain.save_experts(tmp_path / "plain")
    apart = network_of("llama", "task", experts=str(tmp_path / "plain"), train="experts")
    assert not apart.shares_A


def test_a_mixture_of_experts_that_belong_to_no_task():
    made = network(per="mixture", count=3, share_A=True, gate=RadarGate, train="both")
    assert made.experts == ("expert_0", "expert_1", "expert_2")
    assert set(made.expert_of_task.values()) == {-1}
    assert made.shares_A


def test_given_experts_can_be_required_to_share_their_A(tmp_path):
    trained(share_A=True).save_experts(tmp_path / "shared")
    trained().save_experts(tmp_path / "apart")
    assert network_of("llama", "task", experts=str(tmp_path / "shared"), share_A=True).shares_A
    with pytest.raises(ValueError, match=r"share_A: true, but poem, product, sum have A of their own at .*q_proj"):
        network_of("llama", "task", experts=str(tmp_path / "apart"), share_A=True)
