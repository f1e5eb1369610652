"""--overwrite: nothing goes before the new run has taken a step, and only what runs write goes at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from radargate_pl.cli import main
from radargate_pl.overwriting import ASIDE, DISCARDED, RETURNING, DiscardOverwritten, Overwriting, files_of_run, settle

DEBUG = ["fit", "--config", "configs/debug.yaml", "--trainer.default_root_dir", "run", "--overwrite", "true"]
OURS = (
    *("summary.json", "metrics.csv", "config.1.yaml", "config.test.yaml", "checkpoints/last.ckpt"),
    *("checkpoints/last.ckpt.sha256", "gate/gate_config.json", "gate/gate.safetensors", "experts/law/expert.json"),
    *(
        "experts/law/adapter_config.json",
        "gate/experts/a/expert.json",
        "test/sum/results.json",
        "test/sum/earlier/ab/results.json",
    ),
    *("predict/sum/predictions.jsonl", "test/sum/answers.ab.rank0.jsonl"),
)
FOREIGN = ("mine.txt", "test/test_mine.py", "predict/sum/mine.jsonl", "config.mine.yaml")


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (*OURS, *FOREIGN):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "run/config.yaml").write_text("model: {}\n")
    return tmp_path / "run"


def test_only_what_a_run_writes_stands_aside_and_goes_after_a_step(run):
    with Overwriting(run, {}) as overwriting:
        assert set(contents(run)) - {f"{overwriting.aside.name}/{name}" for name in (*OURS, "config.yaml")} == set(
            FOREIGN
        )
        callback = DiscardOverwritten(overwriting.aside)
        callback.on_train_batch_end(SimpleNamespace(is_global_zero=True, global_step=0), None)
        assert overwriting.aside.is_dir(), "a micro-batch is no step"
        callback.on_train_batch_end(SimpleNamespace(is_global_zero=True, global_step=1), None)
    assert set(contents(run)) == set(FOREIGN)
    assert not list(run.glob(".*"))


def test_a_run_that_fails_before_its_first_step_puts_the_old_one_back(run):
    before = contents(run)

    def fail() -> None:
        with Overwriting(run, {}):
            (run / "summary.json").write_text("of the new run")
            (run / "events.out.tfevents.1").write_text("of the new run")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(run) == before


@pytest.mark.parametrize("killed_while", ["setting aside", "starting", "putting back", "deleting"])
def test_a_kill_at_any_moment_is_settled_by_the_next_command(run, killed_while):
    before = contents(run)
    overwriting = Overwriting(run, {})
    if killed_while == "setting aside":
        (run / f"{RETURNING}x/checkpoints").mkdir(parents=True)
        (run / "checkpoints/last.ckpt").rename(run / f"{RETURNING}x/checkpoints/last.ckpt")
    elif killed_while == "deleting":
        (run / f"{DISCARDED}x").mkdir()
    else:
        overwriting.__enter__()
        (run / "metrics.csv").write_text("of the new run")
    if killed_while == "putting back":
        (run / "metrics.csv").unlink()
        rest = overwriting.aside.rename(run / overwriting.aside.name.replace(ASIDE, RETURNING))
        (rest / "metrics.csv").rename(run / "metrics.csv")
    settle(run)
    assert contents(run) == before
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"experts": "run/experts"}},
        {"model": {"experts": ["elsewhere", "run/experts/law"]}},
        {"model": {"experts": {"law": "run/experts/law"}}},
        {"data": {"tasks": ["run/predict/sum/*.jsonl"]}},
        {"data": {"tasks": {"sum": {"path": "run/predict/sum/predictions.jsonl"}}}},
        {"model": {"backbone": "link/gate"}},
        {"model": {"experts": "run"}},
    ],
)
def test_what_the_new_run_reads_is_not_overwritten(run, config):
    (run.parent / "link").symlink_to(run)
    before = contents(run)
    with pytest.raises(ValueError, match=r"read nothing that --overwrite true would replace in .*run, but it reads"):
        Overwriting(run, config)
    assert contents(run) == before


@pytest.mark.parametrize("has_new", [True, False])
def test_a_kill_while_a_folder_is_replaced_is_settled(run, has_new):
    for name in ("gate", "experts/law"):
        folder = run / name
        shutil.copytree(folder, folder.parent / f".{folder.name}.old-ab_12345")
        shutil.copytree(folder, folder.parent / f".{folder.name}.new-ab_12345")
        if not has_new:
            shutil.rmtree(folder)
    (run / ".mine.old-ab_12345").mkdir()
    settle(run)
    for name in ("gate/gate_config.json", "experts/law/expert.json"):
        assert (run / name).read_text() == name
    assert [path.name for path in run.rglob(".*")] == [".mine.old-ab_12345"], "what is not ours stays"


def test_what_lies_beside_is_read(run):
    Overwriting(run, {"data": {"tasks": "run/mine.txt", "split": "train"}, "model": {"experts": "elsewhere"}})


@pytest.mark.parametrize("name", ["gate/my_notes.txt", "experts/theirs/adapter_config.json", "experts/law/notes.md"])
def test_files_of_ones_own_where_the_new_gate_would_lie_are_named(run, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    before = contents(run)
    with pytest.raises(ValueError, match=f"only what runs write.*found run/{name}"):
        Overwriting(Path("run"), {})
    assert contents(run) == before


def test_a_folder_without_a_run_is_not_overwritten(run):
    for path in (run / "config.yaml", run / "summary.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has neither the config\.yaml nor the summary\.json of one, and holds"):
        Overwriting(run, {})
    shutil.rmtree(run)
    run.mkdir()
    with Overwriting(run, {}):
        assert not list(files_of_run(run))


def test_the_command_line_keeps_the_old_run_until_there_is_a_new_one(run, capsys):
    before = contents(run)
    for words, expected in (
        (["--model.network.backbone", "no-such-folder/xyz/w"], "no-such-folder"),
        (["--model.network.experts", "run/experts", "--model.network.new_experts", "null"], "experts: run/experts"),
        (["--data.max_length", "2"], "max_length"),
    ):
        assert main([*DEBUG, *words]) != 0
        assert expected in capsys.readouterr().err
        assert contents(run) == before
