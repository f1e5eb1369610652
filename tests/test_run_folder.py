"""The run folder's own rules: secrets, configs that are kept, what counts as a run, what a checkpoint name means."""

import json
from pathlib import Path

import pytest
import yaml

from radargate_pl.checkpoint_files import write_checkpoint
from radargate_pl.redaction import redact, redact_arguments, redact_text
from radargate_pl.run_folder import (
    check_run_folder,
    config_changes,
    holds_run,
    resolve_checkpoint,
    stored_config,
    write_config,
)
from radargate_pl.run_loggers import RunCSVLogger

HIDDEN = "<redacted>"


def test_secrets_are_redacted_by_name_and_by_look():
    config = {
        "trainer": {"logger": [{"init_args": {"api_key": "abc", "project": "radar"}}]},
        "hub_token": "x",
        "data": {"tasks": ["https://me:pw@host/file.jsonl", "hf_" + "a" * 34], "max_new_tokens": 3, "tokenizer": "t"},
    }
    assert redact(config) == {
        "trainer": {"logger": [{"init_args": {"api_key": HIDDEN, "project": "radar"}}]},
        "hub_token": HIDDEN,
        "data": {"tasks": [f"https://{HIDDEN}@host/file.jsonl", HIDDEN], "max_new_tokens": 3, "tokenizer": "t"},
    }


SECRET = {
    "api_key": "a",
    "accessToken": "b",
    "tokens": ["c", "d"],
    "auth": "Bearer e",
    "headers": {"Authorization": "f", "X-Anything": "g"},
    "password": 12345678901234,
    "apiKeys": {"one": "h"},
    "client_secret": "i",
    "wandb_tokens": ["j"],
}
ORDINARY = {
    "max_new_tokens": 3,
    "special_tokens": ["<a>", "<b>"],
    "tokenizer": "t",
    "author": "me",
    "pad_token": "</s>",
    "token_budget": 4096,
    "monkey": "m",
    "sort_keys": True,
    "password": None,
    "headers": ["a", "b"],
    "prompt": "Key: {source}\nToken:",
    "url": "https://host/a?page=2",
}


def leaves(value):
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
    return [value]


def test_secrets_go_by_every_name_and_in_every_form():
    assert set(leaves(redact({"a": [{"init_args": SECRET}]}))) == {HIDDEN}
    assert redact({"a": [{"init_args": ORDINARY}]}) == {"a": [{"init_args": ORDINARY}]}
    hidden = redact({"auth": {"class_path": "my.Auth", "init_args": {"user": "x", "on": True}}})
    assert hidden == {"auth": {"class_path": "my.Auth", "init_args": {"user": HIDDEN, "on": True}}}
    urls = {"a": "redis://:p@ss@host/0", "b": "https://host/?api_key=SECRET&x=1", "c": "Basic YWJjZGVmZ2g="}
    expected = {"a": f"redis://{HIDDEN}@host/0", "b": f"https://host/?api_key={HIDDEN}&x=1", "c": f"Basic {HIDDEN}"}
    assert redact(urls) == expected


@pytest.mark.parametrize("name", SECRET)
def test_secrets_leave_arguments_in_every_form(name):
    value, words = SECRET[name], []
    written = value if isinstance(value, str) else json.dumps(value)
    nested = {"class_path": "my.L", "init_args": {name: value, "project": "radar"}}
    words += [f"--logger.init_args.{name}={written}", f"--logger.init_args.{name}", written]
    words += ["--trainer.logger", json.dumps(nested), f"--trainer.logger={json.dumps([nested])}"]
    shown = " ".join(redact_arguments(words))
    found = [leaf for leaf in map(str, leaves(value)) if leaf in shown.replace(name, "").split('"')]
    assert not found, shown
    assert shown.count(HIDDEN) >= 4
    assert shown.count("radar") == 2
    assert "my.L" in shown


def test_secrets_leave_yaml_on_the_command_line_and_lines_of_text():
    word = "{class_path: my.L, init_args: {api_key: SECRET, tokens: [SECRET, b], auth: Bearer SECRET, project: radar}}"
    (shown,) = redact_arguments([word])
    assert "SECRET" not in shown
    assert "project: radar" in shown
    for line in ('{"accessToken": "SECRET"}', "accessToken: SECRET", "WANDB_API_KEY=SECRET", 'x: "api_key": "SECRET",'):
        assert "SECRET" not in redact_text(line)
    ordinary = [f"--data.{name}={value}" for name, value in ORDINARY.items() if name != "password"]
    assert redact_arguments(ordinary) == ordinary
    assert redact_arguments(["--data.prompt", "Key: {source}"]) == ["--data.prompt", "Key: {source}"]


def test_configs_of_the_package_stay_as_they_are():
    for path in Path(__file__).parents[1].glob("configs/**/*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert redact(config) == config, path


def test_stored_config_holds_nothing_of_one_command_only():
    text = stored_config({"model": {"a": None}, "ckpt_path": "x", "overwrite": True, "preview": False, "verbose": True})
    assert yaml.safe_load(text) == {"model": {"a": None}}


def test_older_configs_are_kept(tmp_path):
    folder = tmp_path / "new/run"
    for text in ("a: 1\n", "a: 2\n", "a: 2\n", "a: 3\n"):
        assert write_config(folder, "fit", text).name == "config.yaml"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "config.1.yaml": "a: 1\n",
        "config.2.yaml": "a: 2\n",
        "config.yaml": "a: 3\n",
    }
    assert write_config(folder, "test", "a: 3\n").name == "config.yaml"
    assert write_config(folder, "test", "a: 4\n").name == "config.test.yaml"
    assert write_config(folder, "test", "a: 5\n").name == "config.test.yaml"
    assert (folder / "config.test.1.yaml").read_text() == "a: 4\n"
    assert (folder / "config.yaml").read_text() == "a: 3\n"


@pytest.fixture
def run(tmp_path):
    """A folder that looks like that of a fit, with a file of somebody else."""
    folder = tmp_path / "run"
    for name in ("last", "best"):
        write_checkpoint(folder / f"checkpoints/{name}.ckpt", {"name": name})
    for name in ("gate/gate_config.json", "metrics.csv", "mine.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    write_config(folder, "fit", stored_config({"model": {"gate": "a"}, "data": 1}))
    return folder


def test_what_counts_as_a_run(run, tmp_path):
    assert holds_run(run) == ["checkpoints", "gate", "metrics.csv"]
    assert holds_run(tmp_path / "nowhere") == []
    write_config(tmp_path / "failed", "fit", "a: 1\n")
    (tmp_path / "failed/summary.json").write_text("{}")
    assert holds_run(tmp_path / "failed") == []


@pytest.mark.parametrize(
    ("command", "model", "checkpoint", "is_resuming", "is_allowed"),
    [
        ("fit", {"gate": "a"}, None, False, False),
        ("fit", {"gate": "b"}, None, True, True),
        ("fit", {"gate": "b"}, "checkpoints/last.ckpt", False, True),
        ("fit", {"gate": "a"}, "../other/last.ckpt", False, False),
        ("validate", {"gate": "a"}, None, False, True),
        ("validate", {"gate": "b"}, None, False, False),
        ("test", {"gate": "b"}, "gate", False, True),
    ],
)
def test_two_runs_are_not_mixed(run, command, model, checkpoint, is_resuming, is_allowed):
    path = run / checkpoint if checkpoint else None
    if is_allowed:
        check_run_folder(run, command, model, path, is_resuming)
        return
    with pytest.raises(
        ValueError, match=r"already holds another run .*nothing was overwritten. Three ways out"
    ) as error:
        check_run_folder(run, command, model, path, is_resuming)
    assert [f"\n  {number}. " in str(error.value) for number in (1, 2, 3)] == [True] * 3


class TestResolveCheckpoint:
    @pytest.mark.parametrize(
        ("ckpt_path", "command", "expected"),
        [
            ("auto", "fit", "checkpoints/last.ckpt"),
            ("auto", "test", "checkpoints/best.ckpt"),
            ("last", "test", "checkpoints/last.ckpt"),
            ("best", "fit", "checkpoints/best.ckpt"),
            ("{run}", "fit", "checkpoints/last.ckpt"),
            ("{run}", "validate", "checkpoints/best.ckpt"),
            ("{run}/gate", "validate", "gate"),
            ("{run}/checkpoints/last.ckpt", "validate", "checkpoints/last.ckpt"),
        ],
    )
    def test_names(self, run, ckpt_path, command, expected):
        assert resolve_checkpoint(ckpt_path.format(run=run), run, command) == run / expected

    def test_newest_step_where_the_last_is_lost(self, run):
        for name in ("last.ckpt", "best.ckpt"):
            (run / "checkpoints" / name).unlink()
        for step in (5, 10):
            write_checkpoint(run / f"checkpoints/step={step:08d}.ckpt", {"step": step})
        for name, command in (("auto", "fit"), ("last", "test"), (str(run), "predict")):
            assert resolve_checkpoint(name, run, command) == run / "checkpoints/step=00000010.ckpt"
        with pytest.raises(ValueError, match="--ckpt_path best: no checkpoint for it"):
            resolve_checkpoint("best", run, "test")

    def test_auto_of_an_empty_folder_starts_a_fit_and_evaluates_nothing(self, tmp_path):
        assert resolve_checkpoint("auto", tmp_path, "fit") is None
        with pytest.raises(ValueError, match="holds no checkpoints"):
            resolve_checkpoint("auto", tmp_path, "test")


def test_changes_of_a_config_are_named_with_both_values():
    before = {"model": {"optimizer": {"lr": 0.1}, "gate": "a"}, "seed": 1, "gone": 2}
    now = {"model": {"optimizer": {"lr": 0.2}, "gate": "a"}, "seed": 1, "new": [3]}
    assert config_changes(before, now) == [
        "model.optimizer.lr: 0.1 before, 0.2 now",
        "gone: 2 before, None now",
        "new: None before, [3] now",
    ]
    assert config_changes(before, before) == []


def test_a_validation_to_be_repeated_loses_its_row_and_the_step_keeps_its_own(tmp_path):
    logger = RunCSVLogger(tmp_path, flush_logs_every_n_steps=1)
    for step in range(2):
        logger.log_metrics({"train/loss": float(step)}, step)
        logger.log_metrics({"val/loss": 10.0 + step}, step)
    logger.finalize("success")
    RunCSVLogger(tmp_path).drop_after(2, may_validate_again=True)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["step,train/loss,val/loss", "0,0.0,", "0,,10.0", "1,1.0,"]


def test_csv_logger_appends_and_drops_steps_to_be_taken_again(tmp_path):
    for steps in (range(4), range(2, 5)):
        logger = RunCSVLogger(tmp_path, flush_logs_every_n_steps=1)
        logger.drop_after(steps[0])
        for step in steps:
            logger.log_metrics({"loss": step + len(steps) / 10}, step)
        logger.log_metrics({"extra": 1.0}, steps[-1])
        logger.finalize("success")
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["extra,loss,step", ",0.4,0", ",1.4,1", ",2.3,2", ",3.3,3", ",4.3,4", "1.0,,4"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
