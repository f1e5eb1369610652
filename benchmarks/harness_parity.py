"""Holds `radargate test` against lm-evaluation-harness, item by item: same examples, prompt and plain backbone.

    python benchmarks/harness_parity.py --root DATA --runs runs/harness_parity --limit 40

DATA holds sst2, arc_easy and openbookqa as files, see `BenchmarkData`. Prints for each task how many items both answer
alike (by the log-likelihood, and by it a byte) and the largest difference of a log-likelihood.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from radargate_pl.backbones import load_backbone
from radargate_pl.callbacks import BenchmarkWriter
from radargate_pl.data import BenchmarkData
from radargate_pl.module import AdaptedLM
from radargate_pl.networks import GatedNetwork

# Prompts and choices written out once more, as the harness's own task files have them.
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "doc_to_text": "{{inputs.sentence}}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        "doc_to_choice": ["negative", "positive"],
    },
    "arc_easy": {"doc_to_text": "Question: {{inputs.question}}\nAnswer:", "doc_to_choice": "{{choices}}"},
    "openbookqa": {"doc_to_text": "{{inputs.question}}", "doc_to_choice": "{{choices}}"},
}


class Parity(NamedTuple):
    """What came out for one task.

    Attributes:
        items: how many there were.
        alike: items with the same choice.
        alike_by_bytes: the same, by the log-likelihood a byte.
        difference: largest difference of a log-likelihood, in nats.
        accuracy: of radargate and of the harness.
    """

    items: int
    alike: int
    alike_by_bytes: int
    difference: float
    accuracy: tuple[float, float]


def by_radargate(root: str, run: Path, backbone: str, limit: int, batch_size: int) -> None:
    """`radargate test` in float32."""
    lm = AdaptedLM(lambda tasks: GatedNetwork(tasks, backbone=backbone, dtype="float32", experts=[]))
    data = BenchmarkData(list(TASKS), tokenizer=backbone, root=root, limit=limit, batch_size=batch_size)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=run, callbacks=[BenchmarkWriter()], **options)
    trainer.test(lm, datamodule=data, verbose=False)


def by_harness(root: str, backbone: str, limit: int, batch_size: int) -> dict[str, list[dict[str, Any]]]:
    """The harness's samples, by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = load_backbone(backbone, "float32")
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        for name, prompt in TASKS.items():
            task = {
                "task": f"local_{name}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(file_of(root, name))}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_target": "answer_index",
                "metric_list": [{"metric": metric} for metric in ("acc", "acc_bytes")],
                **prompt,
            }
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(task))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        names = [f"local_{name}" for name in TASKS]
        found = simple_evaluate(model, tasks=names, limit=limit, task_manager=tasks, bootstrap_iters=0)
    assert found is not None
    return {name: found["samples"][f"local_{name}"] for name in TASKS}


def file_of(root: str, name: str) -> Path:
    """The file of a task."""
    places = [Path(root, folder, name + suffix) for folder in ("", "benchmarks") for suffix in (".jsonl", ".jsonl.gz")]
    return next(path.resolve() for path in places if path.is_file())


def compare(rows: list[dict[str, Any]], samples: list[dict[str, Any]]) -> Parity:
    """Hold the rows of `predictions.jsonl` against the harness's samples."""
    of_id = {sample["doc"]["id"]: sample for sample in samples}
    assert of_id.keys() == {row["id"] for row in rows}
    alike = alike_by_bytes = 0
    difference = 0.0
    for row in rows:
        sample = of_id[row["id"]]
        theirs = torch.tensor([float(response[0]) for response in sample["filtered_resps"]], dtype=torch.float64)
        ours = torch.tensor(row["logprobs"], dtype=torch.float64)
        difference = max(difference, float((ours - theirs).abs().max()))
        sizes = torch.tensor([len(choice.encode()) for choice in row["choices"]])
        is_alike = int(theirs.argmax()) == row["choices"].index(row["output"])
        alike += is_alike and sample["acc"] == row["correct"]
        is_right_by_bytes = row["choices"][row["chosen_bytes"]] == row["answer"]
        alike_by_bytes += int((theirs / sizes).argmax()) == row["chosen_bytes"] and (
            sample["acc_bytes"] == is_right_by_bytes
        )
    accuracies = (sum(r["correct"] for r in rows) / len(rows), sum(s["acc"] for s in samples) / len(samples))
    return Parity(len(rows), alike, alike_by_bytes, difference, accuracies)


def measure(root: str, run: Path, backbone: str, limit: int, batch_size: int = 8) -> dict[str, Parity]:
    """Run both and compare, task by task."""
    by_radargate(root, run, backbone, limit, batch_size)
    samples = by_harness(root, backbone, limit, batch_size)
    found = {}
    for name in TASKS:
        lines = (run / "test" / name / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = compare([json.loads(line) for line in lines], samples[name])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder with the files of the benchmarks")
    parser.add_argument("--runs", default="runs/harness_parity")
    parser.add_argument("--backbone", default="smollm2-135m-q4")
    parser.add_argument("--limit", type=int, default=40)
    options = parser.parse_args()
    for name, found in measure(options.root, Path(options.runs), options.backbone, options.limit).items():
        print(
            f"{name}: {found.alike} of {found.items} alike, {found.alike_by_bytes} by bytes; largest difference "
            f"{found.difference:.2e} nats; accuracy {found.accuracy[0]:.3f} and {found.accuracy[1]:.3f}"
        )


if __name__ == "__main__":
    main()
