import json
import math
import subprocess
import sys

import pytest
from fake_runs import summary_of, write_angles, write_curve, write_run

from radargate_pl.report import QUICKSTART, Requirement, as_markdown, as_text, check_experts, main, table_rows
from radargate_pl.report_runs import read_angles, read_group, read_losses, read_run, rms_by_layer, split_layer

FROZEN = {"add": (2.0, 0.0, 40), "echo": (3.0, 0.1, 40)}
RIGHT = {"add": (1.0, 0.8, 40), "echo": (1.5, 0.6, 40)}


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "frozen", FROZEN)
    write_run(tmp_path / "uniform", {"add": (1.8, 0.1, 40), "echo": (2.0, 0.2, 40)})
    write_run(tmp_path / "stretch", {"add": (1.4, 0.4, 40), "echo": (1.8, 0.4, 40)}, command="fit")
    radar = write_run(tmp_path / "radargate", {"add": (1.2, 0.5, 40), "echo": (1.6, 0.5, 40)}, command="fit")
    (radar / "summary.json").write_text(
        json.dumps(summary_of({"add": (1.2, 0.5, 40), "echo": (1.6, 0.5, 40)}, rotation={"rms_angle_rad": 0.15678}))
    )
    write_run(tmp_path / "task", RIGHT)
    return tmp_path


# ---- the table ----


def test_the_table_has_a_row_per_run_and_a_column_per_task(runs):
    rows = table_rows([read_group(runs / "frozen"), read_group(runs / "radargate", "RadarGate")])
    assert rows == [
        ["run", "add", "echo", "mean", "RMS angle (rad)"],
        ["frozen", "2.0000 / 0.00", "3.0000 / 0.10", "2.5000 / 0.05", "-"],
        ["RadarGate", "1.2000 / 0.50", "1.6000 / 0.50", "1.4000 / 0.50", "0.157"],
    ]


def test_seeds_become_mean_and_spread(tmp_path):
    for seed, loss in enumerate((1.0, 1.2, 1.7)):
        write_run(tmp_path / "rms" / str(seed), {"add": (loss, 0.5, 4)}, rotation={"rms_angle_rad": 0.1 + 0.1 * seed})
    rows = table_rows([read_group(tmp_path / "rms")])
    # mean 1.3, deviations -0.3, -0.1, 0.4: squares 0.09 + 0.01 + 0.16 = 0.26, over 2, root 0.3606
    assert rows[1] == [
        "rms", "3", "1.3000 +-0.3606 / 0.50 +-0.00", "1.3000 +-0.3606 / 0.50 +-0.00", "0.200 +-0.100",
    ]  # fmt: skip


def test_a_task_that_a_run_lacks_is_a_gap_and_is_said(runs, tmp_path):
    write_run(runs / "less", {"add": (1.0, 0.5, 7)}, precision="bf16-mixed")
    groups = [read_group(runs / "frozen"), read_group(runs / "less")]
    assert table_rows(groups)[2] == ["less", "1.0000 / 0.50", "-", "1.0000 / 0.50", "-"]


def test_markdown_and_text_are_aligned():
    rows = [["run", "a"], ["long name", "1"], ["x", "22.5"]]
    assert (
        as_markdown(rows) == "| run       |    a |\n|-----------|-----:|\n| long name |    1 |\n| x         | 22.5 |\n"
    )
    assert as_text(rows) == "run           a\n---------------\nlong name     1\nx          22.5\n"


def test_the_command_prints_and_writes_the_table(runs, capsys):
    output = runs / "table.md"
    code = main([str(runs / "frozen"), str(runs / "task"), "--names", "base", "right", "--output", str(output)])
    shown = capsys.readouterr().out
    assert code == 0
    assert "validation: loss in nats per answer token / exact match" in shown
    assert "base   2.0000 / 0.00  3.0000 / 0.10" in shown
    assert "| base  | 2.0000 / 0.00 | 3.0000 / 0.10 |" in output.read_text()


def test_transposed_there_is_a_row_per_task(runs, capsys):
    assert main([str(runs / "frozen"), str(runs / "task"), "--transpose"]) == 0
    assert "add              2.0000 / 0.00  1.0000 / 0.80" in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_told_apart(runs, capsys):
    write_run(runs / "other", {"add": (1.0, 0.5, 7)}, precision="bf16", fingerprints={"backbone": "sha256:c"})
    main([str(runs / "frozen"), str(runs / "other")])
    shown = capsys.readouterr().out
    assert "The runs differ in backbone: sha256:b, sha256:c." in shown
    assert "The runs differ in precision: 32-true, bf16." in shown
    assert "The runs differ in the number of add examples: 7, 40." in shown
    assert "Not every run has echo." in shown


def test_groups_are_named_on_the_command_line(runs, capsys):
    words = ["--group", "both", str(runs / "stretch"), str(runs / "radargate")]
    assert main([str(runs / "frozen"), *words]) == 0
    assert "both        2  1.3000 +-0.1414 / 0.45 +-0.07" in capsys.readouterr().out


# ---- which scores ----


def test_a_validation_after_a_fit_beats_it_and_a_test_is_another_split(tmp_path):
    fit = summary_of({"add": (3.0, 0.0, 1)}, command="fit")
    validate = summary_of({"add": (2.0, 0.0, 1)}, command="validate")
    test = summary_of({"add": (1.0, 0.0, 1)}, command="test", earlier={"fit": fit, "validate": validate})
    (tmp_path / "summary.json").write_text(json.dumps(test))
    assert read_run(tmp_path).mean.loss == 2.0
    assert read_run(tmp_path, "test").mean.loss == 1.0
    (tmp_path / "summary.json").write_text(json.dumps({**test, "earlier": {"fit": fit}}))
    assert read_run(tmp_path).mean.loss == 3.0


def test_a_failed_fit_does_not_hide_the_one_before(tmp_path):
    good = summary_of({"add": (3.0, 0.0, 1)}, command="fit")
    failed = {**good, "status": "failed", "tasks": {}, "mean": None, "earlier": {"fit": good}}
    (tmp_path / "summary.json").write_text(json.dumps(failed))
    assert read_run(tmp_path).mean.loss == 3.0


def test_a_loss_that_was_not_a_number_stays_one(tmp_path):
    write_run(tmp_path, {"add": (1.0, 0.0, 1)})
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["tasks"]["add"]["loss"] = None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert math.isnan(read_run(tmp_path).tasks["add"].loss)


# ---- the check ----


def checked(runs, frozen=FROZEN, right=RIGHT, **options):
    write_run(runs / "frozen", frozen)
    write_run(runs / "task", right)
    groups = [read_group(runs / "frozen"), read_group(runs / "task")]
    return check_experts(groups, Requirement("frozen", "task", **options))


def test_good_experts_pass(runs):
    assert checked(runs) == []
    assert checked(runs, right={"add": (1.4, 0.51, 40), "echo": (2.1, 0.51, 40)}) == []  # 30 % exactly is enough


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ({"add": (1.41, 0.8, 40), "echo": (1.5, 0.6, 40)}, "add: loss 1.4100 with its expert is not 30% below 2.0000"),
        ({"add": (math.nan, 0.8, 40), "echo": (1.5, 0.6, 40)}, "add: loss nan"),
        ({"add": (1.0, 0.8, 40), "echo": (1.5, 0.5, 40)}, "1 tasks (add) exceed 0.5 exact match with 'task'"),
        ({"add": (1.0, 0.1, 40), "echo": (1.5, 0.5, 40)}, "0 tasks (none) exceed 0.5"),
    ],
    ids=["loss", "nan", "one-solved", "none-solved"],
)
def test_what_is_missing_is_named(runs, right, message):
    (failure,) = checked(runs, right=right)
    assert message in failure


def test_quickstart_prints_table_places_and_verdict(runs, capsys):
    assert main(["--quickstart", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in QUICKSTART.values())
    assert f"tensorboard --logdir {runs}" in shown
    assert str(runs / "radargate" / "gate") in shown
    assert "met: every expert lowers its task's loss by 30%" in shown
    write_run(runs / "task", {"add": (1.9, 0.8, 40), "echo": (1.5, 0.6, 40)})
    assert main(["--quickstart", str(runs)]) == 1
    assert "not met: add: loss 1.9000" in capsys.readouterr().err


def test_the_check_has_flags(runs, capsys):
    words = [str(runs / "frozen"), str(runs / "task")]
    assert main([*words, "--require-improvement", "0.4"]) == 0
    assert main([*words, "--require-improvement", "0.6"]) == 1
    assert main([*words, "--require-improvement", "0.1", "--require-exact-match", "0.7"]) == 1
    assert main([*words, "--require-improvement", "0.1", "--require-exact-match", "0.7", "--require-tasks", "1"]) == 0
    assert main([*words, "--require-improvement", "0.1", "--reference", "nobody"]) == 1
    assert "Expected a run named 'nobody', but got 'frozen', 'task'" in capsys.readouterr().err


# ---- bad input ----


def test_bad_input_is_told_with_exit_code_1(runs, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    failed = write_run(tmp_path / "failed", FROZEN) / "summary.json"
    failed.write_text(json.dumps({**summary_of(FROZEN), "status": "failed", "tasks": {}}))
    cases = {
        "Expected at least one run folder": [],
        "to be a run folder (with summary.json)": [str(tmp_path / "nowhere")],
        "could not read it": [str(tmp_path / "broken")],
        "to hold validation scores, but found none": [str(tmp_path / "failed")],
        "to hold test scores, but found none": [str(runs / "frozen"), "--split", "test"],
        "as many --names as runs (1), but got 2": [str(runs / "frozen"), "--names", "a", "b"],
        "got frozen twice": [str(runs / "frozen"), str(runs / "frozen")],
        "Expected --group NAME RUN": ["--group", "lonely"],
    }
    for message, words in cases.items():
        assert main(words) == 1, words
        assert message in capsys.readouterr().err


# ---- curves and angles ----


def test_a_curve_comes_from_convergence_json_or_else_from_the_metrics(tmp_path):
    assert read_losses(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,0,2.5,\n0,0,,2.0\n0,9,1.5,\n")
    assert read_losses(tmp_path) == ([1, 10], [2.5, 1.5], [])
    (tmp_path / "convergence.json").write_text(json.dumps({"first_step": 3, "loss": [2.0, 1.0], "ema": [2.0, 1.6]}))
    assert read_losses(tmp_path) == ([3, 4], [2.0, 1.0], [2.0, 1.6])


def test_the_angle_of_a_layer_pools_its_experts_by_tokens(tmp_path):
    write_angles(tmp_path, blocks=1)
    rows = read_angles(tmp_path)
    assert {row["step"] for row in rows} == {"120"}
    q = [row for row in rows if row["layer"].endswith("q_proj")]
    expected = math.sqrt(
        sum(float(r["tokens"]) * float(r["angle_rms"]) ** 2 for r in q) / sum(float(r["tokens"]) for r in q)
    )
    assert rms_by_layer(rows)["model.layers.0.self_attn.q_proj"] == pytest.approx(expected)
    never = {"layer": "x", "tokens": "0.0", "angle_rms": "nan"}
    assert rms_by_layer([never]) == {}


def test_layers_are_split_into_block_and_module():
    assert split_layer("encoder.block.3.layer.0.SelfAttention.q") == (3, "q")
    assert split_layer("head") == (None, "head")


def test_plots_are_drawn_for_what_there_is(runs, capsys):
    for index, name in enumerate(("stretch", "radargate")):
        write_curve(runs / name, 2.0, 1.0, seed=index)
    write_angles(runs / "radargate")
    words = [str(runs / name) for name in ("frozen", "stretch", "radargate")]
    assert main([*words, "--plots", str(runs / "plots")]) == 0
    names = {path.name for path in (runs / "plots").iterdir()}
    assert names == {"losses.png", "angles_by_layer.png", "angles_radargate.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (runs / "plots").iterdir())
    assert main([str(runs / "frozen"), "--plots", str(runs / "none")]) == 0
    assert list((runs / "none").iterdir()) == []


def test_the_report_needs_neither_torch_nor_matplotlib():
    code = "import sys, radargate_pl.report; print({'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
