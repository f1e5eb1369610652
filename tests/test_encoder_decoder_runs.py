"""Encoder-decoders through the command line: experts, every kind of gate, the other commands, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import SEQ2SEQ, model_folder

from radargate_pl.checkpoint import load_checkpoint
from radargate_pl.cli import main
from radargate_pl.domain_command import main as make_domains

TASKS = ("add", "echo", "turn")
TARGETS = {"t5": ["q", "v", "wo"], "mt5": ["q", "k", "wi_1"], "mbart": ["q_proj", "v_proj", "fc1"]}
CONFIGS = Path(__file__).parent.parent / "configs"
# One of each family; ExpertChoiceGate looks at the masks of both streams while it trains.
GATES = ("stretch", "radargate", "radargate_paper", "nexus", "arrow", "rotmole", "tutel", "expert_choice", "uniform")
FIXED = ("arrow", "uniform")  # nothing in them trains
CASES = [*(("t5", gate) for gate in GATES), ("mt5", "radargate"), ("mbart", "radargate"), ("mbart", "expert_choice")]


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for number, task in enumerate(TASKS):
        for split, count in (("train", 10), ("test", 3)):
            rows = [
                {"id": f"{task}-{i}", "source": f"{task} {'x' * (i % 4)}{i}?", "target": "abc"[number] * (1 + i % 3)}
                for i in range(count)
            ]
            (folder / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(kind: str, run: str, **network: object) -> dict:
    init_args = {"backbone": model_folder(kind), "dtype": "float32", **network}
    trainer = {"default_root_dir": f"runs/{run}", "accelerator": "cpu", "devices": 1, "max_steps": 4}
    trainer |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    return {
        "seed_everything": 1,
        "trainer": {**trainer, "log_every_n_steps": 1, "deterministic": True},
        "model": {
            "max_new_tokens": 4,
            "network": {"class_path": "radargate_pl.networks.GatedNetwork", "init_args": init_args},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2, "weight_decay": 0.0}},
        },
        "data": {
            "class_path": "radargate_pl.data.FlanMixture",
            "init_args": {"tasks": "data", "validation_examples": 2, "batch_size": 3, "max_length": 24},
        },
    }


def write_config(name: str, config: dict) -> str:
    Path(name).write_text(yaml.safe_dump(config))
    return name


def words_of(*names: str) -> list[str]:
    return [*(word for name in names for word in ("--config", name)), "--rotation_angles.warn_below", "0"]


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory):
    """For each kind a folder with data and three experts that one fit trained, and that fit's config."""
    made = {}
    for kind in SEQ2SEQ:
        folder = tmp_path_factory.mktemp(kind)
        write_tasks(folder / "data")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            new = {"per": "task", "target_modules": TARGETS[kind], "rank": 2, "alpha": 4}
            gate = {"class_path": "radargate_pl.gates.TaskGate"}
            config = config_of(kind, "experts", new_experts=new, gate=gate, train="experts", dropout=0.1)
            assert main(["fit", *words_of(write_config("experts.yaml", config))]) == 0
            gate = {"class_path": "radargate_pl.gates.RadarGate", "init_args": {"rotation_rank": 4}}
            config = config_of(kind, "gate", experts="runs/experts/experts", gate=gate, train="gate")
            write_config("gate.yaml", config)
            domains = ["--backbone", model_folder(kind), "--experts", "runs/experts/experts", "--tasks", "data"]
            assert make_domains([*domains, "--samples", "4", "--validation_examples", "2"]) == 0
        made[kind] = folder
    return made


@pytest.fixture
def inside(workspaces, monkeypatch):
    """Work in the folder of one kind; a run of one's own is given by its name."""

    def enter(kind: str) -> Path:
        monkeypatch.chdir(workspaces[kind])
        return workspaces[kind]

    return enter


def summary(run: str) -> dict:
    return json.loads((Path("runs") / run / "summary.json").read_text())


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_experts_of_both_streams_train_and_are_plain_peft(inside, kind):
    from safetensors.torch import load_file

    inside(kind)
    assert summary("experts")["status"] == "ok"
    for task in TASKS:
        tensors = load_file(f"runs/experts/experts/{task}/adapter_model.safetensors")
        moved = {name for name, tensor in tensors.items() if "lora_B" in name and tensor.abs().max() > 0}
        assert moved == {name for name in tensors if "lora_B" in name}
        for stream in ("encoder.", "decoder."):
            assert any(stream in name for name in moved)
        config = json.loads(Path(f"runs/experts/experts/{task}/adapter_config.json").read_text())
        assert (config["task_type"], set(config["target_modules"])) == ("SEQ_2_SEQ_LM", set(TARGETS[kind]))


@pytest.mark.parametrize(("kind", "gate"), CASES)
def test_gates_fit_and_move(inside, kind, gate):
    inside(kind)
    words = words_of("gate.yaml", str(CONFIGS / f"gates/{gate}.yaml"))
    command = "validate" if gate in FIXED else "fit"
    assert main([command, *words, "--trainer.default_root_dir", f"runs/{gate}"]) == 0
    found = summary(gate)
    assert found["status"] == "ok"
    assert found["mean"]["loss"] > 0
    if gate not in FIXED:
        assert found["steps"] == 4
        assert found["loss"]["first"] != found["loss"]["last"]


def test_omoe_fits_over_an_encoder_decoder(inside):
    inside("t5")
    words = words_of("gate.yaml", str(CONFIGS / "architectures/omoe.yaml"))
    assert main(["fit", *words, "--trainer.default_root_dir", "runs/omoe"]) == 0
    assert summary("omoe")["status"] == "ok"


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_other_commands_and_what_they_say_of_one_another(inside, kind):
    """Fit, validate, test, predict: scores of answers that predict gives are those that test counts."""
    inside(kind)
    assert main(["fit", *words_of("gate.yaml")]) == 0
    fitted = summary("gate")["mean"]
    words = ["--config", "runs/gate/config.yaml", "--ckpt_path", "last"]
    assert main(["validate", *words]) == 0
    assert summary("gate")["mean"] == pytest.approx(fitted)
    assert main(["test", *words]) == 0
    assert main(["predict", *words]) == 0
    for task in TASKS:
        lines = {name: f"runs/gate/{name}/{task}/predictions.jsonl" for name in ("test", "predict")}
        scored, answered = (
            {row["id"]: row for row in map(json.loads, Path(path).read_text().splitlines())} for path in lines.values()
        )
        assert set(scored) == set(answered) == {f"{task}-{i}" for i in range(3)}
        for name, row in scored.items():  # max_new_tokens is the longest answer with its end: 3 letters and 1
            assert row["exact_match"] <= answered[name]["exact_match"]
    gate = json.loads(Path("runs/gate/gate/gate_config.json").read_text())
    assert gate["decoder_start"] == []


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_a_resumed_fit_is_the_fit_that_never_stopped(inside, kind):
    inside(kind)
    whole, halves = words_of("gate.yaml"), words_of("gate.yaml")
    assert main(["fit", *whole, "--trainer.default_root_dir", "runs/whole"]) == 0
    halves += ["--trainer.default_root_dir", "runs/halves"]
    assert main(["fit", *halves, "--trainer.max_steps", "2"]) == 0
    assert main(["fit", *halves, "--ckpt_path", "auto"]) == 0
    states = [load_checkpoint(f"runs/{run}/checkpoints/last.ckpt") for run in ("whole", "halves")]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert all(
        torch.equal(states[0]["state_dict"][key], states[1]["state_dict"][key]) for key in states[0]["state_dict"]
    )
    assert summary("whole")["mean"] == summary("halves")["mean"]


def test_a_decoder_start_and_a_prompt_of_ones_own_are_settings(inside, capsys):
    """As indicbart.yaml sets them; the fitted gate's folder knows the start."""
    inside("mbart")
    words = [*words_of("gate.yaml"), "--trainer.default_root_dir", "runs/language"]
    words += [
        "--model.network.decoder_start",
        "[e]",
        "--data.prompt",
        "{source}</s>e",
        "--data.special_tokens",
        "false",
    ]
    assert main(["fit", *words, "--preview"]) == 0
    assert "</s>e" in capsys.readouterr().out
    assert main(["fit", *words]) == 0
    assert main(["test", "--config", "runs/language/config.yaml", "--ckpt_path", "best"]) == 0
    assert json.loads(Path("runs/language/gate/gate_config.json").read_text())["decoder_start"] == ["e"]


def test_one_network_config_serves_experts_and_gates(inside):
    """A backbone's config names target modules for new experts; over given experts they are not used."""
    inside("t5")
    new = {"target_modules": ["q", "k", "v", "o"]}
    override = {"model": {"network": {"init_args": {"new_experts": new}}}}
    words = words_of("gate.yaml", write_config("override.yaml", override))
    assert main(["fit", *words, "--trainer.default_root_dir", "runs/override", "--trainer.max_steps", "1"]) == 0
    assert main(["fit", *words, "--model.network.train", "both", "--trainer.default_root_dir", "runs/both"]) == 1
