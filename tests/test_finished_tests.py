"""Answers and results of before are kept, whatever somebody has made of them."""

from pathlib import Path

from radargate_pl.finished_tests import replace_answers, set_aside_other


def test_answers_that_are_no_text_any_more_are_kept_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    for old in (b"\xff", b"\xfe"):
        path.write_bytes(old)
        replace_answers(path, "new\n")
    replace_answers(path, "new\n")
    assert path.read_text() == "new\n"
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file != path}
    assert kept == {"predictions.1.jsonl": b"\xff", "predictions.2.jsonl": b"\xfe"}


def test_a_test_that_is_no_text_any_more_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_bytes(b"\xff")
    (tmp_path / "results.json").write_text("{}")
    set_aside_other(tmp_path, "new", "{}")
    (aside,) = (tmp_path / "earlier").iterdir()
    assert (aside / "predictions.jsonl").read_bytes() == b"\xff"
