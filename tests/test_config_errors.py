"""Mistakes in a config: every one, with its place and the nearest accepted names, and never a page of usage."""

import pytest

from radargate_pl.cli import main

BASE = "configs/debug.yaml"


@pytest.fixture
def mistakes(capsys, tmp_path, monkeypatch):
    """Runs ``radargate fit`` with a config of these lines and/or these words; returns what it complains about."""

    def run(*words, text="", base=True, command="fit"):
        monkeypatch.chdir(tmp_path)
        if text:
            (tmp_path / "my.yaml").write_text(text)
        files = (["--config", BASE] if base else []) + (["--config", "my.yaml"] if text else [])
        assert main([command, *files, *words]) == 2
        captured = capsys.readouterr()
        assert "usage" not in captured.err
        assert "Traceback" not in captured.err
        assert not (tmp_path / "runs").exists()
        head, *lines = captured.err.splitlines()
        assert head == f"radargate: {len(lines)} mistake{'s' if len(lines) > 1 else ''} in the configuration:"
        return [line.strip() for line in lines]

    return run


MISSPELT = """\
trainer:
  max_step: 3
  accelerator: [1]
  max_epochs: lots
model:
  network:
    init_args:
      backbon: x
      gate: {class_path: radargate_pl.gates.RadarGate, init_args: {topk: 2, angle_norm: rsm}}
      new_experts:
        ranks: 8
        alpha: yes please
  optimizer: {class_path: torch.optim.AdamWW}
  lr_scheduler: {class_path: LinearLR, init_args: {start: 1}}
data:
  init_args: {batchsize: 4}
moddel: 1
"""


def test_every_mistake_at_once(mistakes):
    gate = "my.yaml:9: model.network.init_args.gate.init_args"
    assert mistakes(text=MISSPELT) == [
        "my.yaml:2: trainer.max_step: Trainer has no argument 'max_step'. Nearest: max_steps, max_time, min_steps.",
        "my.yaml:3: trainer.accelerator: expected str or Accelerator, found [1].",
        "my.yaml:4: trainer.max_epochs: expected int or null, found 'lots'.",
        "my.yaml:8: model.network.init_args.backbon: GatedNetwork has no argument 'backbon'. Nearest: backbone.",
        f"{gate}.topk: RadarGate has no argument 'topk'. Nearest: top_k.",
        f"{gate}.angle_norm: expected 'none' or 'rms', found 'rsm'. Nearest: rms.",
        "my.yaml:11: model.network.init_args.new_experts.ranks: NewExperts has no argument 'ranks'. Nearest: rank.",
        "my.yaml:12: model.network.init_args.new_experts.alpha: expected float, found 'yes please'.",
        "my.yaml:13: model.optimizer: cannot import 'torch.optim.AdamWW' (module 'torch.optim' has no attribute "
        "'AdamWW'). Nearest: AdamW, Adam, RAdam.",
        "my.yaml:14: model.lr_scheduler.init_args.start: LinearLR has no argument 'start'. Accepted: end_factor, "
        "last_epoch, start_factor, total_iters.",
        "my.yaml:16: data.init_args.batchsize: FlanMixture has no argument 'batchsize'. Nearest: batch_size.",
        "my.yaml:17: moddel: there is no key 'moddel'. Nearest: model.",
    ]


def test_keys_of_the_class_in_effect_not_of_another(mistakes):
    text = "model: {network: {init_args: {gate: {class_path: StretchGate, init_args: {rotation_rank: 4}}}}}\n"
    (mistake,) = mistakes(text=text)
    assert "StretchGate has no argument 'rotation_rank'. Accepted: output_scale, " in mistake
    assert "renormalize, scorer, temperature, top_k." in mistake


def test_typed_on_the_command_line(mistakes):
    assert mistakes("--trainer.max_step=3", "--model.network.gate.topk", "3", "--model.network.gate.scorer", "z") == [
        "command line: --trainer.max_step: Trainer has no argument 'max_step'. Nearest: max_steps, max_time, "
        "min_steps.",
        "command line: --model.network.gate.topk: RadarGate has no argument 'topk'. Nearest: top_k.",
        "command line: --model.network.gate.scorer: expected 'x' or 'experts', found 'z'.",
    ]


def test_abbreviations_are_refused(mistakes):
    (mistake,) = mistakes("--model.network.drop", "0.3")
    assert mistake == "command line: --model.network.drop: GatedNetwork has no argument 'drop'. Nearest: dropout."


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.network.gate", "StretchGat"], "no Gate called 'StretchGat'. Nearest: StretchGate"),
        (["--model.network.gate", "torch.nn.Linear"], "'torch.nn.Linear' is not a Gate. "),
        (["--model.network.gate", "nowhere.Gate"], "cannot import 'nowhere.Gate' (No module named 'nowhere')"),
        (["--data", "FlanMixtur"], "no LightningDataModule called 'FlanMixtur'. Nearest: FlanMixture."),
        (["--model.optimizer", "AdamWW"], "no Optimizer called 'AdamWW'. Nearest: AdamW, Adam, RAdam."),
        (["--trainer.logger", "TensorBoardLogge"], "Nearest: TensorBoardLogger"),
        (["--data.tokenizer", "x"], "is set by the program: it always equals model.network.init_args.backbone"),
        (["--rotation_angles.every", "3"], "has no argument 'every'. Accepted: every_n_steps, warn_below."),
    ],
)
def test_one_word(mistakes, words, expected):
    (mistake,) = mistakes(*words)
    assert mistake.startswith("command line: --")
    assert expected in mistake


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "model.optimizer.lr"),
        ("gate", "model.network.gate"),
        ("model.learning_rate", "model.optimizer.lr"),
        ("model.gate", "model.network.gate"),
        ("epochs", "trainer.max_epochs"),
        ("batch_size", "data.batch_size"),
        ("lora_r", "model.network.new_experts.rank"),
        ("rotation_rank", "model.network.gate.rotation_rank"),
        ("backbonee", "model.network.backbone"),
    ],
)
def test_the_nearest_key_of_the_whole_tree(mistakes, word, meant):
    (mistake,) = mistakes(f"--{word}", "1")
    assert mistake.endswith(f"'{word.rpartition('.')[2]}'. Nearest: {meant}.")


def test_null_is_no_value_of_most_keys(mistakes):
    text = """\
trainer: {max_steps: null, logger: null, max_time: null}
model:
  network: {init_args: {gate: null, backbone: null, execution: null}}
  lr_scheduler: null
  optimizer:
"""
    assert mistakes(text=text) == [
        "my.yaml:1: trainer.max_steps: expected int, found null. Leave the key out for its default.",
        "my.yaml:3: model.network.init_args.gate: expected Gate, found null. Leave the key out for its default.",
        "my.yaml:3: model.network.init_args.backbone: expected str, found null. Leave the key out for its default.",
        "my.yaml:5: model.optimizer: expected Optimizer, found null. Leave the key out for its default.",
    ]


def test_an_empty_group_replaces_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "my.yaml").write_text("trainer:\n#  max_steps: 3\nmodel:\nseed_everything: 7\n")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", BASE, "--config", "my.yaml", "--print_config"]) == 0
    out = capsys.readouterr().out
    assert "max_steps: 6" in out
    assert "seed_everything: 7" in out
    assert "rank: 4" in out


FOREIGN = """\
model:
  network: {init_args: {gate: {class_path: os.system, init_args: {command: touch hacked}}}}
  optimizer: os.system
  lr_scheduler: {class_path: subprocess.call, init_args: {args: [touch, hacked]}}
trainer:
  logger: {class_path: subprocess.Popen, init_args: {args: [touch, hacked]}}
  callbacks:
  - {class_path: builtins.exec, init_args: {source: 1/0}}
  - class_path: ModelPruning
    init_args: {pruning_fn: {class_path: os.system, init_args: {command: touch hacked}}}
  - class_path: LambdaCallback
    init_args: {on_fit_start: {class_path: subprocess.call, init_args: {args: [touch, hacked]}}}
"""


def test_a_config_calls_nothing_but_what_was_asked_for(mistakes, tmp_path):
    found = mistakes(text=FOREIGN)
    assert not (tmp_path / "hacked").exists()
    expected = [("os.system", "Gate"), ("os.system", "Optimizer"), ("subprocess.call", "LRScheduler")]
    expected += [("subprocess.Popen", "Logger"), ("builtins.exec", "Callback")]
    for name, what in expected:
        assert any(f"'{name}' is not a {what}" in mistake for mistake in found)
    assert sum("takes no class_path" in mistake for mistake in found) == 2
    assert len(found) == 7
    (mistake,) = mistakes("--model.network.gate", "os.system", "--model.network.gate.command", "touch hacked")[:1]
    assert "'os.system' is not a Gate." in mistake
    call = "{class_path: subprocess.call, init_args: {args: touch hacked}}"
    typed = f"{{class_path: LambdaCallback, init_args: {{on_fit_start: {call}}}}}"
    (mistake,) = mistakes("--trainer.callbacks", typed)
    assert "takes no class_path (subprocess.call)" in mistake
    assert not (tmp_path / "hacked").exists()


def test_a_function_that_says_what_it_makes_is_taken(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_factories.py").write_text(
        "from radargate_pl.gates import StretchGate\n\n\n"
        "def my_gate(site, top_k: int = 2) -> StretchGate:\n    return StretchGate(site, top_k=top_k)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["fit", "--config", BASE, "--model.network.gate", "my_factories.my_gate", "--print_config"]
    assert main(words) == 0
    assert "my_factories.my_gate" in capsys.readouterr().out


def test_what_is_missing(mistakes):
    assert mistakes(base=False) == [
        "configuration: data (a LightningDataModule, by class_path) is required and not given"
    ]
    text = "data: {class_path: FlanMixture}\nmodel: {network: {init_args: {gate: {class_path: FixedGate}}}}\n"
    assert mistakes(text=text, base=False) == [
        "configuration: data: FlanMixture needs 'tasks', which is not given",
        "configuration: model.network.gate: FixedGate needs 'weights', which is not given",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "trainer:\n  max_steps: [1\nmodel: 2\n",
            "my.yaml:3:6: not valid YAML: while parsing a flow sequence expected",
        ),
        (
            "trainer:\n  max_steps: 1\n  max_steps: 2\n",
            "my.yaml:3: the key 'max_steps' is given twice, first in line 2",
        ),
        ("- trainer\n", "my.yaml:1: expected keys such as 'trainer:' and 'model:', found ['trainer']"),
        ("trainer: 5\n", "my.yaml:1: trainer: expected keys of Trainer, found 5"),
        ("a: \x01\n", "my.yaml: not valid YAML: unacceptable character"),
        ("model:\n  network: {class_path: 3}\n", "my.yaml:2: model.network: class_path: expected the name of a class"),
    ],
)
def test_broken_files(mistakes, text, expected):
    (mistake,) = mistakes(text=text)
    assert mistake.startswith(expected)


def test_binary_and_missing_files(mistakes, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert mistakes("--config", "binary.yaml")[0].startswith("binary.yaml: cannot be read: 'utf-8' codec")
    (mistake,) = mistakes("--config", "configs/quickstart/radargat.yaml", base=False)
    assert mistake.startswith("command line: --config configs/quickstart/radargat.yaml: no such file. Nearest: ")
    assert "configs/quickstart/radargate.yaml" in mistake
    assert mistakes("--config", base=False) == ["command line: --config needs the path of a YAML file"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fitt"], "command line: there is no command 'fitt'. Nearest: fit."),
        ([], "command line: give a command: fit, validate, test, predict, doctor, score, harness; --help says more."),
        (["--help", "RadarGat"], "command line: --help RadarGat: there is no such class. Nearest: RadarGate"),
    ],
)
def test_no_such_command_or_class(capsys, words, expected):
    assert main(words) == 2
    assert expected in capsys.readouterr().err


def test_lists_of_classes_are_checked(mistakes):
    text = """\
trainer:
  callbacks:
  - class_path: EarlyStopping
    init_args: {monitr: val/loss}
  - class_path: LearningRateMonito
"""
    assert mistakes(text=text) == [
        "my.yaml:4: trainer.callbacks.0.init_args.monitr: EarlyStopping has no argument 'monitr'. Nearest: monitor.",
        "my.yaml:5: trainer.callbacks.1: no Callback called 'LearningRateMonito'. Nearest: LearningRateMonitor, "
        "LearningRateFinder.",
        "configuration: trainer.callbacks.0: EarlyStopping needs 'monitor', which is not given",
    ]
