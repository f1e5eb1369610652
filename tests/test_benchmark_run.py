"""`radargate test` on benchmarks: exact counting, any number of processes, kills, and what is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing
from ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_benchmarks import COUNTS, After, benchmark_lm, data_of, files_of, lines_of, run_test, write_benchmarks
from tiny_models import batch_of, network_of
from tiny_runs import adapters, read_json

import radargate_pl
from radargate_pl import answers_key, benchmark_step
from radargate_pl.benchmark_results import scores_of
from radargate_pl.benchmarks import BENCHMARKS
from radargate_pl.cli import main
from radargate_pl.gates import StretchGate, TaskGate
from radargate_pl.prompt_gates import record_prompts
from radargate_pl.records import record_gates
from radargate_pl.report_runs import read_run
from radargate_pl.scoring import equivalence


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def undisturbed(root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    _, counted = run_test(run, root)
    assert sorted(counted.ids) == sorted(row["id"] for task in COUNTS for row in predictions(run, task))
    return run


def predictions(run: Path, task: str) -> list[dict[str, Any]]:
    return lines_of(run / "test" / task / "predictions.jsonl")


def partial_files(run: Path) -> list[Path]:
    return sorted((run / "test").rglob("answers.*rank*.jsonl"))


def test_every_example_is_answered_once_in_the_order_of_the_file(undisturbed: Path, root: str) -> None:
    for task, count in COUNTS.items():
        rows = predictions(undisturbed, task)
        assert [row["id"] for row in rows] == [line["id"] for line in lines_of(Path(root) / f"{task}.jsonl")]
        assert len(rows) == count
        for row in rows:
            assert row["task"] == task
            assert set(row["gate"]["top_expert_share"]) == {"add", "echo", "turn"}
            assert sum(row["gate"]["top_expert_share"].values()) == pytest.approx(1, abs=1e-5)
            assert row["gate"]["rms_angle_rad"] > 0
            assert row["truncated"] is False
    assert not partial_files(undisturbed)


def test_ranking_rows_hold_what_their_scores_are_made_of(undisturbed: Path) -> None:
    for row in predictions(undisturbed, "arc_easy"):
        assert len(row["logprobs"]) == len(row["choices"])
        assert row["output"] == row["extracted"] == row["choices"][row["logprobs"].index(max(row["logprobs"]))]
        by_bytes = [score / len(text.encode()) for score, text in zip(row["logprobs"], row["choices"], strict=True)]
        assert row["chosen_bytes"] == by_bytes.index(max(by_bytes))
        assert row["correct"] == (row["output"] == row["answer"])
    for row in predictions(undisturbed, "gsm8k"):
        assert 1 <= row["tokens"] <= 6
        assert "logprobs" not in row


def test_results_and_summary(undisturbed: Path) -> None:
    for task, count in COUNTS.items():
        found, rows = read_json(undisturbed / "test" / task / "results.json"), predictions(undisturbed, task)
        assert (found["format_version"], found["task"], found["n"]) == (2, task, count)
        right = sum(row["correct"] for row in rows) / count
        name = found["score"]["name"]
        assert found["metrics"][name]["value"] == found["score"]["value"] == right
        assert 0 <= found["score"]["low"] <= right <= found["score"]["high"] <= 1
        assert found["gate"].startswith("RadarGate(")
        assert found["tokens_per_second"] > 0
        assert found["prompt_version"] == f"{task}-v1"
        assert found["fingerprints"]["backbone"].startswith("sha256:")
        angles = [row["gate"]["rms_angle_rad"] ** 2 for row in rows]
        assert found["gate_summary"]["rms_angle_rad"] == pytest.approx(math.sqrt(sum(angles) / count))
    sst2, gsm8k = (read_json(undisturbed / "test" / task / "results.json") for task in ("sst2", "gsm8k"))
    assert (sst2["protocol"], sst2["chance"], sst2["majority"]) == ("ranking", 0.5, 6 / 11)
    assert "accuracy_bytes" in sst2["metrics"]
    assert sst2["stop"] is None
    assert (gsm8k["protocol"], gsm8k["chance"], gsm8k["majority"]) == ("generation", None, None)
    assert gsm8k["max_new_tokens"] == 6
    summary = read_json(undisturbed / "summary.json")
    assert summary["status"] == "ok"
    assert summary["tasks"]["sst2"]["score"] == sst2["score"]
    assert {task: values["n"] for task, values in summary["tasks"].items()} == COUNTS
    assert summary["rotation"]["rms_angle_rad"] > 0


def test_levels_are_those_of_the_score() -> None:
    """Who always says the same, or draws lots, has no correlation with anything."""
    row = {"correct": True, "output": "no", "extracted": "no", "answer": "no", "choices": ["no", "yes"]}
    rows = [{**row, "chosen_bytes": 0, "truncated": False, "gate": {"top_expert_share": {}, "rms_angle_rad": None}}] * 3
    for name, levels in (("cola", (0.0, 0.0)), ("sst2", (1.0, 0.5))):
        found = scores_of(BENCHMARKS[name], "ranking", rows)
        assert (found["majority"], found["chance"]) == levels


def test_a_report_over_losses_says_where_scores_are(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match=r"found none .*test/<task>/results\.json"):
        read_run(undisturbed, "test")


def test_scalars_lie_in_the_run_folder(undisturbed: Path) -> None:
    events = EventAccumulator(str(undisturbed)).Reload()
    for task in COUNTS:
        for name, found in read_json(undisturbed / "test" / task / "results.json")["metrics"].items():
            (scalar,) = events.Scalars(f"test/{task}/{name}")
            assert scalar.value == pytest.approx(found["value"])


def test_the_table_says_how_sure_the_scores_are(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_test(tmp_path / "run", root, tasks=["sst2", "gsm8k"])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("task"))
    header, sst2, gsm8k = lines[start : start + 3]
    assert re.split(r"  +", header) == [
        "task",
        "n",
        "score",
        "95 % interval",
        "chance",
        "majority",
        "protocol",
        "seconds",
    ]
    score = read_json(tmp_path / "run" / "test" / "sst2" / "results.json")["score"]
    interval = f"{score['low']:.3f} - {score['high']:.3f}"
    expected = ["sst2", "11", "accuracy", f"{score['value']:.3f}", interval, "0.500", "0.545", "ranking"]
    assert re.split(r"  +", sst2)[:-1] == expected
    assert re.split(r"  +", gsm8k)[-4:-1] == ["-", "-", "generation"]


def test_gates_of_an_item_are_those_of_its_own_prompt(tmp_path: Path) -> None:
    """Against full records of one prompt alone, among rows of other lengths that are left out."""
    network = benchmark_lm(adapters(tmp_path / "experts")).network_factory({})
    ids = torch.randint(4, 260, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 5:] = False
    rows = torch.tensor([0, 1])
    with torch.no_grad(), record_prompts(network.backbone, {"decoder": mask[:2]}, rows) as found:
        network(ids, mask.long(), ids)
        network(ids.roll(1), mask.long(), ids)  # only the first forward counts
    alone = ids[1:2, :5]
    with torch.no_grad(), record_gates(network.backbone, angles=list(network.layers)) as recorded:
        network(alone, torch.ones_like(alone), alone)
    top = dict.fromkeys(network.experts, 0)
    angles = torch.cat([output.angles.double().flatten() for output in recorded.values()])
    for output in recorded.values():
        best = output.indices.gather(-1, output.weights.abs().argmax(-1, keepdim=True))
        for index in best.flatten().tolist():
            top[output.experts[index]] += 1
    _, summary = found.summaries(2)
    total = 5 * len(network.layers)
    assert summary["top_expert_share"] == pytest.approx({name: count / total for name, count in top.items()}, abs=1e-6)
    assert summary["rms_angle_rad"] == pytest.approx(float(angles.square().mean().sqrt()), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_equal_weights_share_the_top_and_an_encoder_counts(kind: str) -> None:
    network = network_of(kind, "uniform")
    batch = {name: value for name, value in batch_of(kind).items() if name != "expert"}
    stream = "encoder" if kind == "t5" else "decoder"
    with (
        torch.no_grad(),
        record_prompts(network.backbone, {stream: batch["attention_mask"].bool()}, torch.arange(3)) as found,
    ):
        network(**batch)
    for summary in found.summaries(3):
        assert sum(summary["top_expert_share"].values()) == pytest.approx(1, abs=1e-5)
        assert summary["rms_angle_rad"] is None
    layers = [layer for layer in network.layers.values() if layer.gate.site.stream == stream]
    others = len(network.layers) - len(layers)
    pairs = torch.stack(list(found.top.values())).sum(0)
    assert pairs.tolist() == pytest.approx([n * len(layers) + others for n in batch["attention_mask"].sum(1).tolist()])


def test_batch_size_and_protocol(undisturbed: Path, root: str, tmp_path: Path) -> None:
    run_test(tmp_path / "run", root, batch_size=1)
    for task in COUNTS:
        for found, expected in zip(predictions(tmp_path / "run", task), predictions(undisturbed, task), strict=True):
            assert found.pop("logprobs", []) == pytest.approx(expected.pop("logprobs", []), abs=1e-4)
            assert found.pop("gate")["rms_angle_rad"] == pytest.approx(expected.pop("gate")["rms_angle_rad"], rel=1e-4)
            assert found == expected
    run_test(tmp_path / "written", root, protocol="generation", tasks=["sst2"])
    results = read_json(tmp_path / "written" / "test" / "sst2" / "results.json")
    assert results["protocol"] == "generation"
    assert "accuracy_bytes" not in results["metrics"]


def test_answers_that_are_not_numbers_are_no_answers(root: str, tmp_path: Path, monkeypatch: Any) -> None:
    """float16 that overflows: every comparison with NaN is false, so that the first choice would always win."""

    def overflown(*arguments: Any) -> torch.Tensor:
        found = likelihoods(*arguments)
        found[-1] = float("nan")
        return found

    likelihoods = benchmark_step.shared_log_likelihoods
    monkeypatch.setattr(benchmark_step, "shared_log_likelihoods", overflown)
    expected = r"arc_easy to be numbers, but that of q\d+ is NaN in float32; .*model.network.dtype bfloat16 or float32"
    with pytest.raises(ValueError, match=expected):
        run_test(tmp_path / "run", root, tasks=["arc_easy"])
    assert not partial_files(tmp_path / "run")


def written(root: Path, task: str, line: dict[str, Any], text: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The prediction for one example, of which the model wrote this text."""
    root.mkdir()
    whole = {"id": "x1", "task": task, "benchmark": task, **line}
    (root / f"{task}.jsonl").write_text(json.dumps(whole) + "\n")
    patch.setattr(benchmark_step, "generate_texts", lambda *_, **__: [(text, 3)])
    run_test(root.parent / "run", str(root), tasks=[task], protocol="generation")
    (row,) = predictions(root.parent / "run", task)
    return row


def test_private_texts_do_not_come_back_through_what_the_model_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["a secret crystal", "some other thing", "a third of them", "the secret glass"]
    line = {"inputs": {"question": "secret?"}, "choices": options, "answer": options[3], "answer_index": 3}
    text = "It is a secret crystal or glass. The answer is (C)."  # the third in the order of hashes
    row = written(tmp_path / "root", "gpqa", line, text, monkeypatch)
    assert row["output"] == hashlib.sha256(text.encode()).hexdigest()
    assert (row["extracted"], row["answer"], row["correct"], row["choices"]) == ("C", "C", True, list("ABCD"))
    assert not [path for path in (tmp_path / "run").rglob("*.json*") if "secret" in path.read_text()]


def test_equal_options_are_right_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plainly and by bytes; whichever of them the data call the answer, and for whom draws lots."""
    options = ["to sea", "to bed", "to bed", "home", "to town"]
    line = {"id": "x1", "inputs": {"source": "Where to?"}, "choices": options, "answer": "to bed", "answer_index": 2}
    (tmp_path / "cot_ecqa.jsonl").write_text(json.dumps(line) + "\n")
    likelihoods = torch.tensor([-9.0, -1.0, -1.0, -9.0, -9.0], dtype=torch.float64)
    monkeypatch.setattr(benchmark_step, "shared_log_likelihoods", lambda *_: likelihoods)
    run_test(tmp_path / "run", str(tmp_path), tasks=["cot_ecqa"])
    (row,) = predictions(tmp_path / "run", "cot_ecqa")
    assert (row["output"], row["answer"], row["correct"]) == ("to bed", "to bed", True)
    found = read_json(tmp_path / "run" / "test" / "cot_ecqa" / "results.json")
    assert found["metrics"]["accuracy"] == found["metrics"]["accuracy_bytes"]
    assert (found["score"]["value"], found["chance"]) == (1.0, pytest.approx(2 / 5))


@pytest.mark.parametrize(("text", "extracted"), [("entailment", "True"), ("not_entailment", "False"), ("True", "True")])
def test_the_names_of_the_data_are_answers_too(
    text: str, extracted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for `radargate score`."""
    line = {"inputs": {"sentence1": "It rains.", "sentence2": "It is wet."}, "answer": "entailment", "answer_index": 0}
    row = written(tmp_path / "root", "rte", line, f"It is {text}.", monkeypatch)
    assert (row["extracted"], row["correct"], row["answer"]) == (extracted, extracted == "True", "True")


AQUA = {"source": "Which?", "target": "(B)", "choices": ["(A) 20", "(B) 26", "(C) 24"]}
SENSE = {"source": "Which?", "target": "Sentence B", "choices": ["Sentence A: He ate it", "Sentence B: It ate him"]}


@pytest.mark.parametrize(
    ("task", "line", "text", "chosen"),
    [
        ("cot_aqua", AQUA, "The answer is 26.", 1),
        ("cot_aqua", AQUA, "3 * 8 = 24 codes, so the answer is (C) 24.", 2),
        ("cot_aqua", AQUA, "(B)", 1),
        ("cot_aqua", AQUA, "I cannot say.", None),
        ("cot_aqua", {**AQUA, "choices": ["20", "26", "24"]}, "The answer is 26.", 1),
        ("cot_qasc", {**AQUA, "choices": ["(A) arms", "(B) a shell"]}, "Mussels have a shell.", 1),
        ("cot_sensemaking", SENSE, "It ate him.", 1),
        ("cot_sensemaking", SENSE, "The answer is Sentence A.", 0),
    ],
)
def test_lettered_options_are_judged_as_radargate_score_judges_them(
    task: str, line: dict[str, Any], text: str, chosen: int | None, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """From the predictions, with the choices that they name, and from the data's own file."""
    row = written(tmp_path / "root", task, line, text, monkeypatch)
    assert row["extracted"] == (None if chosen is None else row["choices"][chosen])
    assert row["correct"] == (chosen == 1)
    assert row["answer"] == row["choices"][1]
    path, scores = tmp_path / "run" / "test" / task / "predictions.jsonl", tmp_path / "scores.jsonl"
    words = ["score", str(path), "--task", task, "--output", str(scores), "--overwrite"]
    for more in ([], ["--references", str(tmp_path / "root" / f"{task}.jsonl")]):
        assert main([*words, *more]) == 0, capsys.readouterr().err
        assert lines_of(scores) == [{"id": "x1", "extracted": row["extracted"], "correct": row["correct"]}]
    of_data = tmp_path / "of_data.jsonl"
    of_data.write_text(json.dumps({**line, "id": "x1", "output": text}) + "\n")
    assert main(["score", str(of_data), "--task", task, "--output", str(scores), "--overwrite"]) == 0
    shown = None if chosen is None else line["choices"][chosen]
    assert lines_of(scores) == [{"id": "x1", "extracted": shown, "correct": row["correct"]}]


def test_equal_options_are_counted_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["to sea", "to bed", "to bed", "home", "to town"]
    line = {"inputs": {"source": "Where to?"}, "choices": options, "answer": "home", "answer_index": 3}
    row = written(tmp_path / "root", "cot_ecqa", line, "The answer is home.", monkeypatch)
    assert (row["choices"], row["extracted"], row["correct"]) == (options, "home", True)
    assert read_json(tmp_path / "run" / "test" / "cot_ecqa" / "results.json")["chance"] == pytest.approx(1 / 5)


def test_answers_of_another_judge_are_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Math-Verify accepts formulas that string rules do not."""
    root, run = tmp_path / "root", tmp_path / "run"
    line = {"inputs": {"problem": "x - 1?"}, "answer": "$x-1$"}
    monkeypatch.setattr(equivalence, "is_installed", lambda: False)
    assert written(root, "math", line, r"\boxed{-1 + x}", monkeypatch)["correct"] is False
    results = run / "test" / "math" / "results.json"
    assert read_json(results)["judge"] == {"name": "string rules", "version": radargate_pl.__version__}
    _, counted = run_test(run, str(root), tasks=["math"])
    assert counted.ids == []
    monkeypatch.setattr(equivalence, "is_installed", lambda: True)
    monkeypatch.setattr(equivalence, "_shared", lambda: SimpleNamespace(ask=lambda *_: True))
    monkeypatch.setattr(answers_key, "package_version", {"math-verify": "1.2.3"}.get)
    _, counted = run_test(run, str(root), tasks=["math"])
    assert counted.ids == ["x1"]
    assert predictions(run, "math")[0]["correct"] is True
    assert read_json(results)["judge"] == {"name": "math-verify", "version": "1.2.3"}


def test_another_chat_template_is_another_question(root: str) -> None:
    """Same items, weights and settings: what the model reads is not the same, so no answer may be kept."""
    network = network_of("llama", "stretch")
    asked = {}
    for template in ("<u>{{ messages[0]['content'] }}", "Be brief. {{ messages[0]['content'] }}"):
        data = data_of(root, ["gsm8k"], prompt="chat")
        data.backbone[0].chat_template = template
        data.setup("test")
        key = answers_key.answers_key(network, data, "gsm8k", "32-true")
        asked[key] = data.requests("gsm8k")[0].rows
        again = answers_key.answers_key(network, data, "gsm8k", "32-true")
        assert again == key
        assert answers_key.answers_key(network, data, "gsm8k", "bf16-mixed") != key, "the trainer's precision"
    first, second = asked.values()
    assert first != second


def test_the_judge_is_named_where_it_is_a_package(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_json(undisturbed / "test" / "gsm8k" / "results.json")["judge"] is None
    monkeypatch.setattr(answers_key, "package_version", {"sacrebleu": "2.0", "rouge_score": "0.1"}.get)
    named = {a: answers_key.judge_of(a) for a in ("choice", "number", "text", "rouge", "translation")}
    assert [named.pop(a) for a in ("choice", "number", "text")] == [None] * 3
    assert named == {
        "rouge": {"name": "rouge_score", "version": "0.1"},
        "translation": {"name": "sacrebleu", "version": "2.0"},
    }


# ---------------------------------------------------------------------------------------------- processes and kills


def on_rank(rank: int, world_size: int, folder: str, root: str, limit: int | None) -> list[str]:
    options = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    _, counted = run_test(Path(folder), root, limit=limit, **options)
    return counted.ids


def test_two_processes_equal_one_also_when_uneven(undisturbed: Path, root: str, tmp_path: Path) -> None:
    adapters(tmp_path / "experts")  # both processes read them
    shares = on_ranks(both_ways, 2, str(tmp_path), root)
    even, uneven = (sorted(ids for rank in shares for ids in rank[way]) for way in (0, 1))
    assert len(shares[0][0]) != len(shares[1][0])
    assert even == sorted(row["id"] for task in COUNTS for row in predictions(undisturbed, task))
    assert files_of(tmp_path / "two") == files_of(undisturbed)
    assert uneven == ["s0", "s1", "s2"]
    assert len(shares[1][1]) == 1
    run_test(tmp_path / "one", root, tasks=["sst2"], limit=3)
    assert (
        files_of(tmp_path / "three")["test/sst2/predictions.jsonl"]
        == files_of(tmp_path / "one")["test/sst2/predictions.jsonl"]
    )


def both_ways(rank: int, world_size: int, folder: str, root: str) -> tuple[list[str], list[str]]:
    """All tasks, and three examples in two batches, of which the second process gets one."""
    options = {"devices": 2, "strategy": "ddp"}
    _, whole = run_test(Path(folder) / "two", root, **options)
    _, few = run_test(Path(folder) / "three", root, tasks=["sst2"], limit=3, **options)
    return whole.ids, few.ids


def killed(folder: str, root: str, batches: int) -> None:
    torch.set_num_threads(1)
    run_test(Path(folder), root, After(batches, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def kill_after(batches: int, folder: Path, root: str) -> None:
    process = torch.multiprocessing.get_context("spawn").Process(target=killed, args=(str(folder), root, batches))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_test_goes_on_and_ends_in_the_same_files(undisturbed: Path, root: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_after(5, run, root)
    files = partial_files(run)
    done = [row["id"] for path in files for line in lines_of(path)[1:] for row in line["rows"]]
    assert done
    with files[-1].open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b'{"rows": [{"id": "s10", "out')
    with pytest.warns(UserWarning, match="was not written to its end"):
        _, counted = run_test(run, root)
    assert sorted(done + counted.ids) == sorted(row["id"] for t in COUNTS for row in predictions(undisturbed, t))
    assert not set(done) & set(counted.ids)
    assert files_of(run) == files_of(undisturbed)


def stop(run: Path, root: str, batches: int, **options: Any) -> list[str]:
    """A test that fails after some batches; ids that are answered."""

    def fail() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        run_test(run, root, After(batches, fail), **options)
    return [row["id"] for path in partial_files(run) for line in lines_of(path)[1:] for row in line["rows"]]


def test_answers_of_several_processes_are_gone_on_with_by_one(undisturbed: Path, root: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = stop(run, root, 5)
    for path in partial_files(run):
        header, *lines = path.read_text().splitlines(keepends=True)
        path.with_name(path.name.replace("rank0", "rank3")).write_text(header + "".join(lines[1:]))
        path.write_text(header + "".join(lines[:1]))
    _, counted = run_test(run, root)
    assert not set(done) & set(counted.ids)
    assert files_of(run) == files_of(undisturbed)


def test_when_only_the_results_could_not_be_written_nothing_is_asked_again(
    undisturbed: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("radargate_pl.callbacks.benchmark_writer.write_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run_test(tmp_path / "run", root)
    assert not list((tmp_path / "run").rglob("results.json"))
    _, counted = run_test(tmp_path / "run", root)
    assert counted.ids == []
    assert files_of(tmp_path / "run") == files_of(undisturbed)


def test_a_damaged_line_is_named(root: str, tmp_path: Path) -> None:
    stop(tmp_path / "run", root, 3)
    path = partial_files(tmp_path / "run")[0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    with pytest.raises(ValueError, match=rf"{path}:2 to be a line that `radargate test` wrote"):
        run_test(tmp_path / "run", root)


def test_answers_of_other_weights_are_neither_mixed_in_nor_lost(undisturbed: Path, root: str, tmp_path: Path) -> None:
    run, experts = tmp_path / "run", adapters(tmp_path / "experts")
    done = stop(run, root, 3, lm=benchmark_lm(experts, seed=1))
    before = {path: path.read_bytes() for path in partial_files(run)}
    _, counted = run_test(run, root, lm=benchmark_lm(experts), overwrite=True)
    assert len(counted.ids) == sum(COUNTS.values())
    assert {n: c for n, c in files_of(run).items() if "predictions" in n} == {
        n: c for n, c in files_of(undisturbed).items() if "predictions" in n
    }
    assert {path: path.read_bytes() for path in partial_files(run)} == before
    _, counted = run_test(run, root, lm=benchmark_lm(experts, seed=1))
    assert len(done) + len(counted.ids) == sum(COUNTS.values())


def contents(folder: Path) -> dict[str, bytes]:
    """Results and predictions of one test."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_short_trial_does_not_cost_the_results_of_the_whole_test(
    root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, lm = tmp_path / "run", benchmark_lm(adapters(tmp_path / "experts"))
    folder = run / "test" / "sst2"
    run_test(run, root, lm=lm, tasks=["sst2"])
    whole = contents(folder)
    stop(run, root, 0, lm=lm, tasks=["sst2"], limit=2)
    assert contents(folder) == whole  # until the next is finished
    with caplog.at_level("INFO"):
        run_test(run, root, lm=lm, tasks=["sst2"], limit=2, overwrite=True)
    short = contents(folder)
    (earlier,) = (folder / "earlier").iterdir()
    assert read_json(earlier / "results.json")["key"].startswith(f"sha256:{earlier.name}")
    assert f"kept in earlier/{earlier.name}" in caplog.text
    assert contents(earlier) == whole
    _, counted = run_test(run, root, lm=lm, tasks=["sst2"])
    assert (counted.ids, contents(folder)) == ([], whole)
    (other,) = (folder / "earlier").iterdir()
    assert contents(other) == short
    _, counted = run_test(run, root, lm=lm, tasks=["sst2"], limit=2, overwrite=True)
    assert sorted(counted.ids) == ["s0", "s1"]
    (earlier,) = (folder / "earlier").iterdir()
    assert contents(earlier) == whole


def test_a_finished_test_is_kept_another_one_replaces_it(
    root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run, experts = tmp_path / "run", adapters(tmp_path / "experts")
    options = {"tasks": ["sst2"], "limit": 5}
    run_test(run, root, lm=benchmark_lm(experts), **options)
    first = {path: path.read_bytes() for path in sorted((run / "test").rglob("*")) if path.is_file()}
    capsys.readouterr()
    with caplog.at_level("INFO"):
        _, counted = run_test(run, root, lm=benchmark_lm(experts), **options)
    assert "sst2: finished earlier with this model and these settings" in caplog.text
    assert counted.ids == []
    assert {path: path.read_bytes() for path in first} == first
    assert "sst2" in capsys.readouterr().out
    assert read_json(run / "summary.json")["tasks"]["sst2"]["n"] == 5
    _, counted = run_test(run, root, lm=benchmark_lm(experts), overwrite=True, **options)
    assert len(counted.ids) == 5
    keys = {read_json(run / "test" / "sst2" / "results.json")["key"]}
    for changed in (
        {"lm": benchmark_lm(experts, gate=StretchGate), **options},
        {"lm": benchmark_lm(experts, seed=1), **options},
        {"lm": benchmark_lm(experts), **options, "limit": 6},
        {"lm": benchmark_lm(experts), **options, "protocol": "generation"},
    ):
        _, counted = run_test(run, root, **changed)
        assert len(counted.ids) == changed["limit"]
        keys.add(read_json(run / "test" / "sst2" / "results.json")["key"])
    assert len(keys) == 5


def test_examples_that_nobody_answered_are_named(root: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"11 examples of sst2 to be answered exactly once, but 7 missing \(s\d"):
        run_test(tmp_path / "run", root, tasks=["sst2"], batch_size=8, limit_test_batches=1)
    assert not (tmp_path / "run" / "test" / "sst2" / "results.json").exists()
    (path,) = partial_files(tmp_path / "run")
    header, line = path.read_text().splitlines(keepends=True)
    path.with_name(path.name.replace("rank0", "rank1")).write_text(header + line)
    with pytest.raises(ValueError, match=r"4 answered more than once"):
        run_test(tmp_path / "run", root, tasks=["sst2"], batch_size=8)


def test_a_task_without_an_expert_is_not_answered_by_the_bare_backbone(root: str, tmp_path: Path) -> None:
    lm = benchmark_lm(adapters(tmp_path / "experts"), gate=TaskGate)
    with pytest.raises(ValueError, match=r"TaskGate to know an expert of 'sst2'.*gate DirectLoRA"):
        run_test(tmp_path / "run", root, lm=lm)
    run_test(tmp_path / "bare", root, lm=benchmark_lm([], gate=TaskGate))


def test_a_trial_leaves_nothing_behind(root: str, tmp_path: Path) -> None:
    run_test(tmp_path / "run", root, fast_dev_run=True)
    assert not (tmp_path / "run" / "test").exists()


def test_command_line(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any) -> None:
    """A saved gate is tested, tested again (kept), and tested once more with --overwrite."""
    monkeypatch.chdir(tmp_path)
    experts = adapters(tmp_path / "experts")
    network = benchmark_lm(experts).network_factory({})
    network.save_pretrained(tmp_path / "gate")
    words = ["test", "--model.network.backbone=debug-tiny", f"--model.network.experts={experts}"]
    words += ["--model.network.gate=RadarGate", "--model.network.gate.top_k=2", "--model.network.gate.rotation_rank=4"]
    words += ["--model.network.dtype=float32", "--data=BenchmarkData", "--data.tasks=[sst2]", f"--data.root={root}"]
    words += ["--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.default_root_dir=run"]
    with caplog.at_level("INFO"):
        assert main([*words, "--ckpt_path=gate"]) == 0
        lm = benchmark_lm(experts)
        run_test(tmp_path / "python", root, lm=lm, tasks=["sst2"])
        for found, expected in zip(
            predictions(tmp_path / "run", "sst2"), predictions(tmp_path / "python", "sst2"), strict=True
        ):
            assert found == expected
        assert main([*words, "--ckpt_path=gate"]) == 0
        assert "sst2: finished earlier" in caplog.text
        caplog.clear()
        assert main([*words, "--ckpt_path=gate", "--overwrite"]) == 0
        assert "finished earlier" not in caplog.text
    assert capsys.readouterr().out.count("95 % interval") == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"]["sst2"]["n"] == 11
