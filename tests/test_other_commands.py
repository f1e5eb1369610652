"""Paths that are wrong, folders, binary and empty files given to the commands that train nothing: one sentence each."""

import json

import pytest

from radargate_pl import harness, report
from radargate_pl.cli import main
from radargate_pl.domain_command import main as domains

LINE = '{"id": "a", "output": "#### 2", "answer": "#### 2"}\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a folder, an empty, a binary and a good file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    (tmp_path / "good").write_text(LINE)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere", "--output", "o"], "Expected nowhere to be a file of JSON lines, but there is none"),
        (["folder", "--output", "o"], "Expected folder to be a file of JSON lines, but it is a folder"),
        (["empty", "--output", "o"], "Expected empty to hold predictions"),
        (["binary", "--output", "o"], "binary:1: not UTF-8"),
        (["good", "--output", "folder"], "Expected --output to be a file, but folder is a folder; name a file in it."),
        (["good", "--output", "good/o"], "Expected --output to be a file in a folder, but "),
        (
            ["good", "--output", "folder/../good", "--overwrite"],
            "Expected --output to be another file than good, which is read",
        ),
        (["good", "--output", "o", "--references", "folder"], "Expected folder to be a file of JSON lines"),
    ],
)
def test_score(place, capsys, words, expected):
    assert main(["score", *words, "--task", "gsm8k"]) == 1
    assert expected in capsys.readouterr().err
    assert (place / "good").read_text() == LINE
    assert not (place / "o").exists()


def test_missing_words_are_one_line(place, capsys):
    for words in (["score"], ["score", "good", "--output", "o", "--tas", "gsm8k"], ["harness"]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"radargate {words[0]}: error: the following arguments are required: ")
        assert line.endswith("(--help says more)")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output", "folder"], "Expected --output to be a file, but folder is a folder"),
        (["--batch_size", "many"], "Expected --batch_size to be auto or a number of at least 1, but got 'many'."),
        (["--batch_size", "0"], "Expected --batch_size to be"),
        (["--limit", "-1"], "Expected --limit to be above 0, but got -1.0."),
        (["--limit", "nan"], "Expected --limit to be above 0, but got nan."),
        (["--num_fewshot", "-1"], "Expected --num_fewshot to be at least 0, but got -1."),
    ],
)
def test_harness_refuses_before_anything_is_loaded(place, monkeypatch, capsys, words, expected):
    monkeypatch.setattr(harness, "_check_installed", lambda: pytest.fail("went on"))
    assert main(["harness", "--tasks", "x", *words]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "could not read it: Expecting value"),
        (b"[]", "could not read it: expected a JSON object, found list"),
        (b"{}", "could not read it: has no 'command'"),
        (b'{"command": "fit", "status": "ok", "tasks": {"a": 5}}', "could not read it: "),
        (b'{"command": "fit", "status": "ok", "tasks": {"a": {"loss": 1}}}', "could not read it: "),
        (b"[" * 100_000, "could not read it: maximum recursion depth"),
        (bytes(range(128, 256)), "could not read it: 'utf-8' codec"),
    ],
)
def test_report_of_damaged_summaries(place, capsys, content, expected):
    (place / "folder/summary.json").write_bytes(content)
    assert report.main(["folder"]) == 1
    error = capsys.readouterr().err
    assert "folder/summary.json to be a run's summary" in error
    assert expected in error
    assert "Traceback" not in error


def test_report_and_domains_of_wrong_paths(place, capsys):
    for path in ("nowhere", "folder", "good"):
        assert report.main([path]) == 1
        assert f"Expected {path} to be a run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        report.main(["--spli", "test"])
    assert len(capsys.readouterr().err.splitlines()) == 1
    for path in ("nowhere", "folder", "good"):
        assert domains(["--backbone", "debug-tiny", "--experts", path, "--tasks", "good"]) == 1
        assert f"folder '{path}'" in capsys.readouterr().err


def test_report_of_numbers_that_are_text(place, capsys):
    scores = {"loss": "low", "exact_match": 1, "n": 1}
    summary = {"command": "fit", "status": "ok", "tasks": {"a": scores}, "mean": scores, "steps": 1}
    summary |= {"rotation": {"rms_angle_rad": None}, "fingerprints": None, "precision": "32"}
    (place / "folder/summary.json").write_text(json.dumps(summary))
    assert report.main(["folder"]) == 1
    assert "error: TypeError: " in capsys.readouterr().err
