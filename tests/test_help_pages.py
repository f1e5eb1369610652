"""Help and refusals that need no class: complete, true, and without importing anything heavy."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from radargate_pl.cli import main
from radargate_pl.help_pages import COMMANDS, ELSEWHERE, PROGRAMS

ROOT = Path(__file__).parent.parent
LIGHT = [
    [],
    ["--version"],
    ["--help"],
    ["-h"],
    ["help", "predict"],
    ["fit", "--help"],
    ["fit", "--config", "nowhere.yaml", "-h"],
    ["--help", "doctor"],
    ["doctor", "--help"],
    ["score", "--help"],
    ["score"],
    ["harness", "--help"],
    ["chat"],
    ["--print_shtab", "bash"],
    ["--trainer.max_steps", "3", "fit"],
]
HEAVY = {"torch", "lightning", "transformers", "peft", "datasets", "jsonargparse", "numpy"}


def test_nothing_heavy_is_imported():
    code = f"""
import sys
from radargate_pl.cli import main
for words in {LIGHT}:
    main(words)
    assert not {HEAVY} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_a_command(command, capsys):
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == page
    assert f"radargate {command} --help all" in page


def test_every_option_of_the_page_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--help"]) == 0
    options = re.findall(
        r"^  (--\w+\.[\w.]+|--ckpt_path|--seed_everything|--data) ", capsys.readouterr().out, re.MULTILINE
    )
    assert len(options) > 20
    new = ["--model.network.new_experts.count=lots"]
    assert main(["fit", "--config", "configs/debug.yaml", *(f"{option}=?" for option in options), *new]) == 2
    err = capsys.readouterr().err
    assert "no argument" not in err
    assert "no key" not in err
    assert "new_experts.count" in err


def test_every_option_is_one_word_away(capsys):
    assert main(["fit", "--help", "all"]) == 0
    page = capsys.readouterr().out
    assert "--trainer.num_sanity_val_steps" in page
    assert "--replicas.every_n_steps" in page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["report", "runs/a"], "there is no command 'report'. Run python -m radargate_pl.report RUN [RUN ...]"),
        (["FIT"], "there is no command 'FIT'. Nearest: fit."),
        (["--trainer.max_steps", "3", "fit"], "the command comes first: radargate fit --trainer.max_steps ..."),
        (["--print_shtab", "bash"], "--print_shtab: there is no shell completion; --help all lists every option."),
        (["chat"], "Accepted: doctor, fit, harness, predict, score, test, validate."),
    ],
)
def test_no_such_command(words, expected, capsys):
    assert main(words) == 2
    assert expected in capsys.readouterr().err
    assert not set(ELSEWHERE) & {*COMMANDS, *PROGRAMS}
