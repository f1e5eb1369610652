"""The command line by its own mouth: help, the four commands on debug.yaml, checkpoints, run folders, errors."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from radargate_pl import __version__
from radargate_pl.checkpoint import load_checkpoint
from radargate_pl.cli import main

DEBUG = ["--config", "configs/debug.yaml", "--rotation_angles.warn_below", "0"]  # six steps hardly rotate


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder in which ``radargate fit --config configs/debug.yaml`` was run."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *DEBUG]) == 0
    return folder


@pytest.fixture
def workspace(fitted, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(fitted, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class TestHelp:
    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"radargate-pl {__version__}\n"

    def test_console_script_and_top_level_file_are_main(self):
        root = Path(__file__).parent.parent
        done = subprocess.run(
            [sys.executable, root / "cli.py", "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout == f"radargate-pl {__version__}\n"
        assert len((root / "cli.py").read_text().splitlines()) == 4
        assert 'radargate = "radargate_pl.cli:main"' in (root / "pyproject.toml").read_text()

    def test_top_level_help_names_the_four_commands_only(self, capsys):
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert "{fit,validate,test,predict}" in out
        assert "radargate --help RadarGate" in out

    def test_help_of_a_command(self, capsys):
        assert main(["fit", "--help"]) == 0
        out = capsys.readouterr().out
        for option in ("--model.network", "--data", "--trainer.max_steps", "--ckpt_path", "--preview", "--overwrite"):
            assert option in out
        assert "--weights_only" not in out

    @pytest.mark.parametrize("words", [["--help", "RadarGate"], ["fit", "--help=RadarGate"]])
    def test_short_help_of_a_gate(self, capsys, words):
        assert main(words) == 0
        out = capsys.readouterr().out
        for name in ("top_k", "scorer", "temperature", "renormalize", "rotation_rank", "angle_norm"):
            assert f"--model.network.gate.{name}" in out
        assert "chosen with --model.network.gate RadarGate" in out
        assert "site" not in re.findall(r"--[\w.]+", out)

    def test_long_help_of_a_gate(self, capsys):
        assert main(["fit", "--model.network.gate.help", "StretchGate"]) == 0
        out = capsys.readouterr().out
        assert "top_k" in out
        assert "rotation_rank" not in out

    @pytest.mark.parametrize(
        ("name", "option"),
        [
            ("GatedNetwork", "--model.network.backbone"),
            ("FlanMixture", "--data.mixing"),
            ("AdamW", "--model.optimizer.weight_decay"),
            ("LinearLR", "--model.lr_scheduler.start_factor"),
            ("RotationAngleMonitor", "--every_n_steps"),
        ],
    )
    def test_help_of_other_classes(self, capsys, name, option):
        assert main(["--help", name]) == 0
        out = capsys.readouterr().out
        assert option in out
        assert "tokenizer TOKENIZER" not in out


class TestFit:
    def test_run_folder_is_complete_and_nothing_lies_outside(self, fitted):
        assert [path.name for path in fitted.iterdir()] == ["runs"]
        assert [path.name for path in (fitted / "runs").iterdir()] == ["debug"]
        run = fitted / "runs/debug"
        names = {path.name for path in run.iterdir()}
        events = {name for name in names if name.startswith("events.out.tfevents.")}
        assert names - events == {
            *("config.yaml", "summary.json", "metrics.csv", "convergence.json", "angles.csv"),
            *("checkpoints", "experts", "gate"),
        }
        assert len(events) == 1
        assert summary(run)["status"] == "ok"
        assert summary(run)["steps"] == 6
        assert summary(run)["gate"].startswith("RadarGate(top_k=2, ")

    def test_stored_config_is_resolved_and_runs_again(self, fitted):
        config = yaml.safe_load((fitted / "runs/debug/config.yaml").read_text())
        gate = config["model"]["network"]["init_args"]["gate"]
        assert gate["init_args"]["scorer"] == "x"
        assert config["data"]["init_args"]["test_examples"] is None
        assert not {"ckpt_path", "overwrite", "preview", "config"} & set(config)
        assert "tokenizer" not in config["data"]["init_args"]

    def test_checkpoint_reads_as_data(self, fitted):
        state = torch.load(fitted / "runs/debug/checkpoints/last.ckpt", weights_only=True)
        assert "hyper_parameters" not in state

    def test_command_line_beats_file_wherever_the_file_stands(self, capsys):
        assert main(["fit", "--trainer.max_steps", "3", *DEBUG, "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 3

    def test_preview(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("radargate_pl.networks.load_backbone", lambda *_: pytest.fail("weights were loaded"))
        assert main(["fit", *DEBUG, "--preview"]) == 0
        assert len(re.findall(r"--- \d: task \w+, .* carry loss", capsys.readouterr().out)) == 3
        assert not (tmp_path / "runs").exists()

    def test_fast_dev_run_leaves_no_trace(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["fit", *DEBUG, "--trainer.fast_dev_run", "true"]) == 0
        assert not list(tmp_path.rglob("*.ckpt")) + list(tmp_path.rglob("config.yaml"))


class TestRunFolder:
    def test_another_run_is_refused_with_three_ways_out(self, workspace, capsys):
        before = contents(workspace)
        assert main(["fit", *DEBUG]) == 1
        message = capsys.readouterr().err
        assert "runs/debug (trainer.default_root_dir) already holds another run (checkpoints, " in message
        assert "--trainer.default_root_dir runs/debug-2" in message
        assert "--ckpt_path auto" in message
        assert "--overwrite true" in message
        assert contents(workspace) == before

    def test_overwrite(self, workspace):
        (workspace / "runs/debug/mine.txt").write_text("not the program's")
        assert main(["fit", *DEBUG, "--trainer.max_steps", "2", "--overwrite", "true"]) == 0
        run = workspace / "runs/debug"
        assert (run / "mine.txt").exists()
        assert [path.name for path in run.glob("config*")] == ["config.yaml"]
        assert {path.name for path in (run / "checkpoints").iterdir()} >= {"last.ckpt", "step=00000002.ckpt"}
        assert not (run / "checkpoints/step=00000006.ckpt").exists()
        assert summary(run)["steps"] == 2

    def test_resume_goes_on_with_what_was_typed_and_keeps_the_metrics(self, workspace, caplog):
        run = workspace / "runs/debug"
        stored = {path.name: path.read_text() for path in run.glob("config*")}
        assert main(["fit", *DEBUG, "--ckpt_path", "auto", "--data.max_examples", "3"]) == 1
        assert {path.name: path.read_text() for path in run.glob("config*")} == stored, "refused, and left as it was"
        words = ["--trainer.max_steps", "8", "--ckpt_path", "auto", "--model.optimizer.lr", "0.003"]
        with caplog.at_level("INFO"):
            assert main(["fit", *DEBUG, *words]) == 0
        assert summary(run)["steps"] == 8
        said = caplog.text
        assert "config changed since the run began: trainer.max_steps: 6 before, 8 now" in said
        assert "lr: 0.01 in the checkpoint, 0.003 now, which is used" in said
        assert (
            load_checkpoint(str(run / "checkpoints/last.ckpt"))["optimizer_states"][0]["param_groups"][0]["lr"] == 0.003
        )
        with (run / "metrics.csv").open(newline="") as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/lr"]]
        assert steps == list(range(8))
        assert {path.name for path in run.glob("config*")} == {"config.yaml", "config.1.yaml"}
        assert yaml.safe_load((run / "config.1.yaml").read_text())["trainer"]["max_steps"] == 6
        assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 8

    def test_auto_starts_where_there_is_nothing_to_resume(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["fit", *DEBUG, "--trainer.max_steps", "1", "--ckpt_path", "auto"]) == 0
        assert summary("runs/debug")["steps"] == 1

    def test_failed_start_does_not_occupy_the_folder(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["fit", *DEBUG, "--data.max_length", "2"]) == 1
        assert "max_length" in capsys.readouterr().err
        assert main(["fit", *DEBUG, "--trainer.max_steps", "1"]) == 0

    def test_other_model_is_not_evaluated_into_the_folder_of_a_fit(self, workspace, capsys):
        before = contents(workspace)
        assert main(["validate", *DEBUG, "--model.network.gate.top_k", "1"]) == 1
        assert "already holds another run" in capsys.readouterr().err
        assert contents(workspace) == before

    def test_evaluation_keeps_config_and_metrics_of_the_fit(self, workspace):
        run = workspace / "runs/debug"
        kept = {name: (run / name).read_bytes() for name in ("config.yaml", "metrics.csv", "angles.csv")}
        words = ["--config", "runs/debug/config.yaml", "--ckpt_path", "best", "--data.batch_size", "2"]
        assert main(["validate", *words]) == 0
        assert {name: (run / name).read_bytes() for name in kept} == kept
        assert yaml.safe_load((run / "config.validate.yaml").read_text())["data"]["init_args"]["batch_size"] == 2


class TestCheckpointPath:
    def validate(self, *words):
        assert main(["validate", *DEBUG, *words]) == 0
        return summary("runs/debug")["mean"]["loss"]

    def test_the_same_weights_under_every_name(self, workspace):
        fit = summary("runs/debug")["mean"]["loss"]
        for name in ("last", "runs/debug/checkpoints/last.ckpt"):
            assert self.validate("--ckpt_path", name) == fit
        best = self.validate("--ckpt_path", "best")
        for name in ("auto", "runs/debug"):
            assert self.validate("--ckpt_path", name) == best

    def test_gate_folder(self, workspace):
        fit = summary("runs/debug")["mean"]["loss"]
        frozen = ["--model.network.experts", "runs/debug/experts", "--model.network.train", "gate"]
        words = [*frozen, "--model.network.new_experts", "null", "--ckpt_path", "runs/debug/gate"]
        assert self.validate(*words) == pytest.approx(fit, abs=1e-6)
        shutil.rmtree("runs/debug/checkpoints")
        assert self.validate(*words[:-1], "runs/debug") == pytest.approx(fit, abs=1e-6)

    def test_gate_folder_of_other_experts_is_refused(self, workspace, capsys):
        assert main(["validate", *DEBUG, "--ckpt_path", "runs/debug/gate"]) == 1
        assert "Expected the experts this gate was fitted with" in capsys.readouterr().err

    def test_what_was_typed_beats_what_the_checkpoint_stored(self, workspace):
        with pytest.warns(UserWarning, match="going on with the configuration's"):
            self.validate("--ckpt_path", "last", "--model.network.gate.top_k", "1")
        assert summary("runs/debug")["gate"].startswith("RadarGate(top_k=1, ")

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("nowhere", "--ckpt_path nowhere: there is no such file or folder. There are: runs/debug/checkpoints/best"),
            ("configs", "--ckpt_path configs: no checkpoint for it in configs. configs holds no checkpoints"),
        ],
    )
    def test_nothing_there(self, workspace, capsys, path, expected):
        (workspace / "configs").mkdir()
        assert main(["validate", *DEBUG, "--ckpt_path", path]) == 1
        assert expected in capsys.readouterr().err

    def test_best_of_an_empty_folder(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        for name in ("best", "last", "auto"):
            assert main(["validate", *DEBUG, "--ckpt_path", name]) == 1
            assert f"--ckpt_path {name}: no checkpoint for it in runs/debug." in capsys.readouterr().err


class TestOtherCommands:
    def test_test_and_predict(self, workspace, caplog):
        words = ["--config", "runs/debug/config.yaml", "--data.test_examples", "3", "--ckpt_path", "last"]
        assert main(["test", *words]) == 0
        assert "last test: loss " in caplog.text
        assert {path.name for path in Path("runs/debug/test").iterdir()} == {"chain_sum", "letter_counting"}
        assert main(["predict", *words, "--model.max_new_tokens", "2"]) == 0
        assert "answers: runs/debug/predict/chain_sum/predictions.jsonl" in caplog.text
        predictions = Path("runs/debug/predict/chain_sum/predictions.jsonl")
        rows = predictions.read_text().splitlines()
        assert len(rows) == 3
        first = {
            name: (Path("runs/debug/test/chain_sum") / name).read_text() for name in ("results.json", predictions.name)
        }
        words[-1] = "best"
        assert main(["test", *words]) == 0
        (aside,) = Path("runs/debug/test/chain_sum/earlier").iterdir()
        assert {path.name: path.read_text() for path in aside.iterdir()} == first, (
            "the test of another checkpoint is kept"
        )
        assert main(["predict", *words, "--data.test_examples", "2", "--model.max_new_tokens", "2"]) == 0
        assert predictions.with_name("predictions.1.jsonl").read_text().splitlines() == rows
        assert predictions.read_text().splitlines() != rows


PARTS = """
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

class NoLogger(CSVLogger):
    def __init__(self):
        raise RuntimeError("the file store is gone")

class NoCallback(Callback):
    def __init__(self):
        raise KeyError("nothing")
"""


class TestErrors:
    WORDS = ("fit", *DEBUG, "--data.tasks", "[nothing.jsonl]")

    def test_bad_input_is_one_message(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(self.WORDS) == 1
        message = capsys.readouterr().err
        assert "radargate: error: Expected an entry of tasks to be" in message
        assert "'nothing.jsonl' is no such file or folder" in message
        assert "Traceback" not in message
        assert "Namespace" not in message

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")],
    )
    def test_too_little_memory_is_a_sentence(self, monkeypatch, capsys, error):
        def fail(words):
            raise error

        monkeypatch.setattr("radargate_pl.cli._run", fail)
        assert main(self.WORDS) == 1
        said = capsys.readouterr().err
        assert "There is not enough memory" in said
        assert "ulimit -v" in said
        assert "Traceback" not in said

    def test_debug_shows_the_traceback(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="is no such file or folder"):
            main([*self.WORDS, "--debug"])
        monkeypatch.setenv("RADARGATE_TRACEBACK", "1")
        with pytest.raises(ValueError, match="is no such file or folder"):
            main(self.WORDS)

    def test_a_disk_that_refuses(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").write_text("a file where a folder is needed")
        assert main(["fit", *DEBUG]) == 1
        assert "runs" in capsys.readouterr().err

    def test_errors_of_the_program_keep_their_traceback_in_a_file(self, monkeypatch, tmp_path, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("radargate_pl.lightning_cli.read_yaml", lambda *_: 1 / 0)
        assert main(["fit", *DEBUG]) == 1
        (kept,) = (tmp_path / "cache/errors").iterdir()
        head, place = capsys.readouterr().err.splitlines()
        assert head == "radargate: error: ZeroDivisionError: division by zero"
        assert place.startswith("(ZeroDivisionError in ")
        assert place.endswith(f"; the traceback: {kept})")
        assert "Traceback" in kept.read_text()
        assert kept.stat().st_mode & 0o777 == 0o600
        monkeypatch.setenv("RADARGATE_CACHE", "/dev/null")
        assert main(["fit", *DEBUG]) == 1
        assert "Traceback" in capsys.readouterr().err
        with pytest.raises(ZeroDivisionError):
            main(["fit", *DEBUG, "--debug"])

    @pytest.mark.parametrize(
        ("words", "code", "expected"),
        [
            (["--trainer.logger", "my_parts.NoLogger"], 1, "my_parts.NoLogger: the file store is gone"),
            (["--trainer.callbacks", "my_parts.NoCallback"], 1, "my_parts.NoCallback: 'nothing'"),
            (["--trainer.strategy", "dp"], 2, "You selected an invalid strategy name: `strategy='dp'`."),
            (["--model.network.new_experts.alpha", "0"], 1, "alpha to be a number other than 0, but got 0.0."),
            (["--model.max_new_tokens", "0"], 1, "Expected max_new_tokens to be at least 1, but got 0."),
            (
                ["--model.optimizer.dict_kwargs", "{foo: 1}"],
                1,
                "model.optimizer: AdamW.__init__() got an unexpected keyword",
            ),
            (["--seed_everything", "-1"], 2, "seed_everything: expected 0 to 4294967295, found -1."),
            (["--trainer.default_root_dir", "null"], 2, "default_root_dir: expected the run folder, found None."),
        ],
    )
    def test_a_users_mistake_is_one_sentence(self, monkeypatch, tmp_path, capsys, words, code, expected):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "my_parts", raising=False)
        (tmp_path / "my_parts.py").write_text(PARTS)
        assert main(["fit", *DEBUG, *words]) == code
        lines = capsys.readouterr().err.splitlines()[-2:]
        assert lines[0].startswith("radargate: ")
        assert expected in "".join(lines)
        assert "Union" not in "".join(lines)


def test_the_trainers_switches_turn_off_checkpoints_and_progress_bar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    switches = ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *DEBUG, *switches, "--trainer.max_steps=1"]) == 0
    assert summary("runs/debug")["status"] == "ok"
    assert not Path("runs/debug/checkpoints").exists()
