"""Every config in the repository is parsed, overrides on top of their base, and each gate override gives its gate."""

import functools
import importlib
import itertools
from pathlib import Path

import pytest
import yaml

from radargate_pl.cli import main
from radargate_pl.gates import ALL_GATES, DirectLoRA, FixedGate, PEMs, Site
from radargate_pl.gates.base import NoRotation
from radargate_pl.rank_rotation import RankRotation
from radargate_pl.rotations import RadarRotation

ROOT = Path(__file__).parent.parent
CONFIGS = {str(path.relative_to(ROOT / "configs")): path for path in sorted((ROOT / "configs").rglob("*.yaml"))}
OVERRIDES = {name for name in CONFIGS if name.split("/")[0] in ("architectures", "backbones", "gates", "trainer")}
OVERRIDES |= {"rules/union.yaml", "rules/union_wide.yaml"}
BENCHMARK = "benchmark.yaml"  # replaces the data of a run
BASES = sorted(CONFIGS.keys() - OVERRIDES - {BENCHMARK})

# Class and rotation of each override, with its line: every argument it does not name is the class's own default.
SOFTMAX = "top_k=2, scorer=x, temperature=1.0, renormalize=auto, output_scale=1.0"
ANGLES = "rotation_rank=8, rotation_sharing=shared, angle_norm={}, angle_bound=None"
TUTEL = "TutelGate(top_k=2, kind={}, projection=256, normalize=True, noise=0.0, rotation=NoRotation())"
GATES = {
    "arrow": (
        "ArrowGate",
        NoRotation,
        "ArrowGate(top_k=3, temperature=1.0, norm_input=False, scale=False, rotation=NoRotation())",
    ),
    "direct": ("DirectLoRA", NoRotation, "DirectLoRA(expert=gsm8k)"),
    "lorahub": ("LoraHub", NoRotation, "LoraHub()"),
    "pems": ("PEMs", NoRotation, "PEMs(weights={'gsm8k': 1.0, 'aqua': 1.0}, normalize=True)"),
    "expert_choice": (
        "ExpertChoiceGate",
        NoRotation,
        "ExpertChoiceGate(capacity=2.0, top_k=2, rotation=NoRotation())",
    ),
    "nexus": ("NexusGate", NoRotation, "NexusGate(top_k=1, hidden=None, domains=auto, rotation=NoRotation())"),
    "radargate": ("RadarGate", RadarRotation, f"RadarGate({SOFTMAX}, {ANGLES.format('rms')})"),
    "radargate_paper": ("RadarGate", RadarRotation, f"RadarGate({SOFTMAX}, {ANGLES.format('none')})"),
    "rotation": ("RotationGate", RadarRotation, f"RotationGate(top_k=2, {ANGLES.format('rms')})"),
    "rotmole": ("RotMoLEGate", RankRotation, f"RotMoLEGate({SOFTMAX}, trunk_rank=None)"),
    "stretch": ("StretchGate", NoRotation, f"StretchGate({SOFTMAX})"),
    "task": ("TaskGate", NoRotation, "TaskGate()"),
    "tutel": ("TutelGate", NoRotation, TUTEL.format("linear")),
    "tutel_cosine": ("TutelGate", NoRotation, TUTEL.format("cosine")),
    "uniform": ("UniformGate", NoRotation, "UniformGate()"),
}


NAMED = (DirectLoRA, FixedGate, PEMs)  # cannot be built without the names of experts


@pytest.fixture
def parsed(capsys, monkeypatch):
    """The resolved config of ``radargate fit`` with these words."""
    monkeypatch.chdir(ROOT)

    def run(*words):
        assert main(["fit", *words, "--print_config"]) == 0, capsys.readouterr().err
        return yaml.safe_load(capsys.readouterr().out)

    return run


def with_configs(*names):
    return [word for name in names for word in ("--config", f"configs/{name}")]


def build_gate(config):
    site = Site("layer", 8, 6, 2, ("a", "b", "c"), "decoder")
    return factory_at(config["model"]["network"]["init_args"]["gate"])(site)


def factory_at(spec):
    """The class that a config names with its arguments, rotations likewise."""
    module, _, name = spec["class_path"].rpartition(".")
    arguments = {
        key: factory_at(value) if isinstance(value, dict) and "class_path" in value else value
        for key, value in spec.get("init_args", {}).items()
    }
    return functools.partial(getattr(importlib.import_module(module), name), **arguments)


def assert_gate(gate, override):
    name, rotation, line = GATES[override]
    assert (type(gate).__name__, type(gate.rotation), gate.line()) == (name, rotation, line)


def test_every_kind_of_config_is_found():
    kinds = {name.split("/")[0] for name in CONFIGS}
    assert kinds >= {"architectures", "debug.yaml", "flan", "flan_v2", "gates", "quickstart", "rules", "trainer"}
    assert {f"gates/{name}.yaml" for name in GATES} == {name for name in CONFIGS if name.startswith("gates/")}


@pytest.mark.parametrize("name", BASES)
def test_base_configs_stand_alone(parsed, name):
    config = parsed(*with_configs(name))
    assert config["trainer"]["default_root_dir"] == f"runs/{name.removesuffix('.yaml')}"
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["data"]["class_path"] == "radargate_pl.data.FlanMixture"
    assert build_gate(config).line()


@pytest.mark.parametrize("name", sorted(OVERRIDES))
def test_overrides_go_on_top_of_a_base(parsed, name):
    base, config = parsed(*with_configs("flan/radargate.yaml")), parsed(*with_configs("flan/radargate.yaml", name))
    given = yaml.safe_load(CONFIGS[name].read_text())
    assert set(given) - {"data"} == ({"trainer"} if name.startswith("trainer/") else {"model"})
    changed = given.get("data", {}).get("init_args", {})  # the prompt of a backbone
    assert config["data"] == {**base["data"], "init_args": {**base["data"]["init_args"], **changed}}
    assert name.startswith("backbones/") or not changed
    assert config["model"]["optimizer"] == base["model"]["optimizer"]
    for key, value in given.get("trainer", {}).items():
        assert config["trainer"][key] == value


def test_benchmarks_take_the_place_of_a_runs_data(parsed):
    base = parsed(*with_configs("flan/radargate.yaml"))
    config = parsed(
        *with_configs("flan/radargate.yaml", BENCHMARK), "--data.tasks", "[glue, task1]", "--data.limit", "5"
    )
    data = config["data"]
    assert data["class_path"] == "radargate_pl.data.BenchmarkData"
    given = yaml.safe_load(CONFIGS[BENCHMARK].read_text())["data"]["init_args"]
    assert data["init_args"] == {
        **{**given, "tasks": ["glue", "task1"], "limit": 5},
        # Its own defaults, nothing of the mixture's arguments of the same name.
        **{"max_new_tokens": None, "on_bad_record": "raise", "num_workers": 0, "special_tokens": True, "date": None},
        # But how the mixture shows its tasks, for those of them that are asked.
        **{"fitting_prompt": "chat", "fitting_special_tokens": True},
    }
    assert {key: value for key, value in config.items() if key != "data"} == {
        key: value for key, value in base.items() if key != "data"
    }


@pytest.mark.parametrize("name", sorted(GATES))
def test_gate_overrides_are_short(name):
    lines = [line for line in CONFIGS[f"gates/{name}.yaml"].read_text().splitlines() if line]
    assert len(lines) <= 5


# What could be inherited are arguments other than the defaults; RadarGate has the most arguments to inherit.
TELLING = ("arrow", "expert_choice", "pems", "radargate_paper", "tutel_cosine")
PAIRS = {*itertools.product(TELLING, sorted(GATES)), *itertools.product(sorted(GATES), ("radargate", "rotmole"))}


@pytest.mark.parametrize("names", sorted(pair for pair in PAIRS if len(set(pair)) == 2), ids="-then-".join)
def test_a_gate_inherits_nothing_from_the_gate_before(parsed, names):
    """jsonargparse alone carries arguments of the same name over, for instance radargate_paper's angle_norm: none."""
    first, second = names
    config = parsed(*with_configs("quickstart/radargate.yaml", f"gates/{first}.yaml", f"gates/{second}.yaml"))
    assert_gate(build_gate(config), second)


@pytest.mark.parametrize("base", [name for name in BASES if name != "quickstart/radargate.yaml"])
@pytest.mark.parametrize("override", ["rotation", "stretch", "task"])
def test_gates_on_top_of_every_base(parsed, base, override):
    assert_gate(build_gate(parsed(*with_configs(base, f"gates/{override}.yaml"))), override)


@pytest.mark.parametrize("cls", [cls for cls in ALL_GATES if cls not in NAMED], ids=lambda cls: cls.__name__)
def test_gates_by_name_on_the_command_line(parsed, cls):
    words = with_configs("quickstart/radargate.yaml", "gates/radargate_paper.yaml")
    config = parsed(*words, "--model.network.gate", cls.__name__, "--model.network.init_args.dropout", "0.25")
    gate, fresh = build_gate(config), cls(Site("layer", 8, 6, 2, ("a", "b", "c"), "decoder"))
    assert type(gate) is cls
    assert config["model"]["network"]["init_args"]["dropout"] == 0.25
    if cls.__name__ != "RadarGate":  # of the same class: the file's arguments stay
        assert gate.line() == fresh.line()
    else:
        assert gate.line() == GATES["radargate_paper"][2]


OPTIONS = {
    "temperature": ("learned", 0.5, 1.0),
    "output_scale": ("learned", 2.5, 1.0),
    "rotation_rank": ("full", 4),
    "rotation_sharing": ("per_expert",),
    "angle_bound": (1.5,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_gate_options_that_are_a_number_or_a_name_are_read_from_file_and_command_line(parsed, tmp_path, name, value):
    gate = {"class_path": "RadarGate", "init_args": {name: value}}
    text = yaml.safe_dump({"model": {"network": {"init_args": {"gate": gate}}}})
    (tmp_path / "gate.yaml").write_text(text)
    base, typed = with_configs("quickstart/radargate.yaml"), (f"--model.network.gate.{name}", str(value))
    for words in (("--config", str(tmp_path / "gate.yaml")), typed):
        found = build_gate(parsed(*base, *words)).arguments()[name]
        assert (found, type(found)) == (value, type(value))


def test_learning_rate_multipliers_are_read_from_file_and_command_line(parsed, tmp_path):
    (tmp_path / "rates.yaml").write_text("model: {lr_multipliers: {rotation: 5, lora_A: 0.5}}\n")
    config = parsed(*with_configs("quickstart/radargate.yaml"), "--config", str(tmp_path / "rates.yaml"))
    assert config["model"]["lr_multipliers"] == {"rotation": 5.0, "lora_A": 0.5}
    typed = parsed(*with_configs("quickstart/radargate.yaml"), "--model.lr_multipliers", "{rotation: 5}")
    assert typed["model"]["lr_multipliers"] == {"rotation": 5.0}


def test_a_name_that_an_option_does_not_know_is_refused_with_what_it_takes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [*with_configs("quickstart/radargate.yaml"), "--model.network.gate.temperature", "taught"]
    assert main(["fit", *words, "--print_config"]) != 0
    assert "expected float or 'learned', found 'taught'" in capsys.readouterr().err


def test_paper_settings(parsed):
    """r 8, alpha 32, dropout 0.1, batch 4; a departure carries a comment."""
    config = parsed(*with_configs("flan/experts.yaml"))
    network = config["model"]["network"]["init_args"]
    assert (network["new_experts"]["rank"], network["new_experts"]["alpha"], network["dropout"]) == (8, 32, 0.1)
    assert config["data"]["init_args"]["batch_size"] == 4
    assert config["data"]["init_args"]["target"] == "rationale"
    for name in ("flan/experts.yaml", "flan/radargate.yaml", "quickstart/experts.yaml", "quickstart/radargate.yaml"):
        (line,) = [line for line in CONFIGS[name].read_text().splitlines() if "lr:" in line]
        assert "1.0e-4" in line.partition("#")[2], name


@pytest.mark.parametrize(("name", "rank", "alpha"), [("union", 8, 32), ("union_wide", 72, 288)])
def test_union_rows_are_one_expert_for_all_tasks(parsed, name, rank, alpha):
    config = parsed(*with_configs("flan/experts.yaml", f"rules/{name}.yaml"))
    network = config["model"]["network"]["init_args"]
    new = network["new_experts"]
    assert (new["per"], new["rank"], new["alpha"], new["target_modules"]) == (
        "union",
        rank,
        alpha,
        ["q_proj", "v_proj"],
    )
    assert (network["train"], network["dropout"]) == ("experts", 0.1)


def test_lorahub_searches_five_examples_a_task_in_one_batch(parsed):
    config = parsed(*with_configs("rules/lorahub.yaml"))
    optimizer, data = config["model"]["optimizer"], config["data"]["init_args"]
    assert optimizer["class_path"] == "radargate_pl.search.NevergradSearch"
    wanted = {"budget": 40, "bound": 1.5, "penalty": 0.05, "seed": 42, "algorithm": "NGOpt"}
    assert optimizer["init_args"] == wanted
    assert config["trainer"]["max_steps"] == wanted["budget"]
    assert (data["max_examples"], data["batch_size"]) == (5, 9 * 5)
    assert config["model"]["network"]["init_args"]["combine"] == "separate"


def assert_at(tree, path, value):
    """The value that a file gives is what the resolved config has there."""
    for key in path:
        tree = tree[key]
    assert tree == value, path


def leaves(tree, path=()):
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, (*path, key))


PAPERS_BACKBONES = {
    "indicbart": ("ai4bharat/IndicBART", "mbart"),
    "mt0_base": ("bigscience/mt0-base", "mt5"),
    "flan_t5_large": ("google/flan-t5-large", "mt5"),  # Flan-T5 has T5 1.1's gated feed-forward, as mT5
    "llama_3_2_1b": ("meta-llama/Llama-3.2-1B", "llama"),
    "llama_3_2_3b": ("meta-llama/Llama-3.2-3B", "llama"),
}


@pytest.mark.parametrize("base", ["flan/experts.yaml", "flan/radargate.yaml", "flan_v2/experts.yaml"])
@pytest.mark.parametrize("name", PAPERS_BACKBONES)
def test_the_papers_backbones_go_on_top_of_flan(parsed, base, name):
    config, text = parsed(*with_configs(base, f"backbones/{name}.yaml")), CONFIGS[f"backbones/{name}.yaml"].read_text()
    for path, value in leaves(yaml.safe_load(text)):
        assert_at(config, path, value)
    network = config["model"]["network"]["init_args"]
    assert network["backbone"] == PAPERS_BACKBONES[name][0]
    assert (network["new_experts"]["rank"], network["new_experts"]["alpha"]) == (8, 32)
    assert config["model"]["max_new_tokens"] == 512
    for word in ("The paper states", "Our reading"):
        assert word in text


@pytest.mark.parametrize("name", PAPERS_BACKBONES)
def test_their_target_modules_are_all_linear_layers_of_such_a_model(name):
    """Of a tiny random model of the architecture: every name is met, in every block, and only the head is left out."""
    from tiny_models import network_of

    from radargate_pl.adapters import target_linears

    given = yaml.safe_load(CONFIGS[f"backbones/{name}.yaml"].read_text())
    targets = given["model"]["network"]["init_args"]["new_experts"]["target_modules"]
    model = network_of(PAPERS_BACKBONES[name][1], experts=[]).backbone
    found = target_linears(model, targets)
    assert {path.rpartition(".")[2] for path in found} == set(targets)
    assert set(found) == set(target_linears(model, "all-linear"))


@pytest.mark.parametrize("name", ["mt0_base", "flan_t5_large"])
def test_float16_is_named_as_the_trap_it_is(name):
    text = CONFIGS[f"backbones/{name}.yaml"].read_text()
    assert "Never float16" in text
    assert yaml.safe_load(text)["model"]["network"]["init_args"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("typed", "expected"), [("false", False), ("true", True), ("auto", "auto")])
def test_how_it_is_computed_is_one_word_on_the_command_line(parsed, typed, expected):
    words = [*with_configs("flan/radargate.yaml"), "--model.network.execution.compile", typed]
    assert parsed(*words)["model"]["network"]["init_args"]["execution"] == {
        "mixture": "auto",
        "compile": expected,
        "attention": "auto",
    }
    base = with_configs("quickstart/radargate.yaml")  # it spells all three out
    assert parsed(*base, "--model.network.execution.compile", typed)["model"]["network"]["init_args"]["execution"] == {
        "mixture": "auto",
        "compile": expected,
        "attention": "auto",
    }
