"""Standard output and error that break, or were never there."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest

from radargate_pl import cli
from radargate_pl.cli import main
from radargate_pl.preemption import Preempted
from radargate_pl.standard_streams import SteadyStream, steady_streams

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, sys
from radargate_pl.preemption import Preempted
from radargate_pl.standard_streams import steady_streams
with steady_streams():
    for _ in range(3000):
        print("line on stdout")
        print("line on stderr", file=sys.stderr)
    sys.stdout.flush()
    os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    os.write(2, b"of a library")
with open(sys.argv[2], "w") as file:
    file.write("trained")
"""


@pytest.mark.parametrize("redirection", ["2>&1 | head -1", "2>&-", "2>/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_broken_streams_end_nothing(redirection, tmp_path):
    words = f'"{sys.executable}" -c "$0" opened done {redirection}; exit "${{PIPESTATUS[0]}}"'
    command = ["bash", "-c", words, PROGRAM]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "trained"
    assert (tmp_path / "opened").read_text() == "", "a library's words went into a file"
    assert "Traceback" not in done.stderr


class Broken(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, "broken")


def test_a_full_disk_under_the_answers_is_said():
    SteadyStream(Broken(errno.EPIPE), [errno.EPIPE]).write("x")
    with pytest.raises(OSError, match="broken"):
        SteadyStream(Broken(errno.ENOSPC), [errno.EPIPE]).write("x")
    SteadyStream(Broken(errno.ENOSPC), None).writelines(["x"])


def test_a_reader_who_leaves_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE))
    assert main(["--version"]) == 0
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    assert main(["--version"]) == 1
    assert "broken" in capsys.readouterr().err


def test_streams_are_what_they_were(capsys):
    before = sys.stdout, sys.stderr
    with steady_streams():
        assert sys.stderr.isatty() is False
        print("out")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "out\n"


def test_a_fit_that_was_asked_to_end_says_where_it_stands(monkeypatch, capsys):
    def preempt(words: list[str]) -> None:
        raise Preempted(7, saved=True, code=130)

    monkeypatch.setattr(cli, "_run", preempt)
    assert main(["fit", "--config", "x"]) == 130
    assert "asked to stop after step 7; go on with --ckpt_path auto (exit code 130)" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["itself", "Lightning's"])
def test_ctrl_c_is_a_word_and_130(way, monkeypatch, capsys):
    def interrupt(words: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if way == "itself":
                raise
            sys.exit(1)

    monkeypatch.setattr(cli, "_run", interrupt)
    assert main(["fit", "--config", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err
