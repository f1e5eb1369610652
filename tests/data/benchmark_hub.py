"""Made-up rows in the layouts of the hub's data sets, laid out on disk as `hf download` lays them out."""

from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Features, Value

TEXT = Value("string")


def glue(config: str, names: list[str], *columns: str, split: str = "validation") -> dict[str, Any]:
    features = Features({**dict.fromkeys(columns, TEXT), "label": ClassLabel(names=names), "idx": Value("int32")})
    rows = [{**{column: f"{column} {i}" for column in columns}, "label": i % len(names), "idx": i} for i in range(3)]
    return {"id": "nyu-mll/glue", "config": config, "split": split, "features": features, "rows": rows}


def lettered(stem: str, identity: str, letters: list[str], key: str) -> dict[str, Any]:
    texts = [f"option {letter}" for letter in letters]
    return {"id": identity, stem: "Why?", "choices": {"text": texts, "label": letters}, "answerKey": key}


def arc(config: str) -> dict[str, Any]:
    rows = [
        lettered("question", "Mercury_1", list("ABCD"), "C"),
        lettered("question", "NYSEDREGENTS_2", list("1234"), "4"),
    ]
    return {"id": "allenai/ai2_arc", "config": config, "split": "test", "rows": rows}


def mctest(config: str) -> dict[str, Any]:
    options = {"A": "a dog", "B": "a cat", "C": "a cow", "D": "a hen"}
    row = {"idx": {"story": 0, "question": 1}, "question": "What ran?", "story": f"{config}: Tom ran.\\newlineTom sat."}
    row |= {"properties": {"author": "x", "work_time": "1"}, "answer_options": options, "answer": "B"}
    return {"id": "sagnikrayc/mctest", "config": config, "split": "test", "rows": [row], "is_converted": True}


def wmt(language: str) -> dict[str, Any]:
    row = {"translation": {language: f"ahoj {language}", "en": "hello"}}
    return {"id": "wmt/wmt14", "config": f"{language}-en", "split": "test", "rows": [row]}


RACE_OPTIONS = ["red", "blue", "green", "grey"]
GPQA_ROW = {
    "Pre-Revision Question": "old",
    "Question": "Made up: which one is it?",
    "Correct Answer": " the right one \n",
    **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
    "Record ID": "rec1",
}
SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)

# Benchmark -> the parts of the hub it is read from.
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "sst2": [glue("sst2", ["negative", "positive"], "sentence")],
    "wnli": [glue("wnli", ["not_entailment", "entailment"], "sentence1", "sentence2")],
    "qnli": [glue("qnli", ["entailment", "not_entailment"], "question", "sentence")],
    "qqp": [glue("qqp", ["not_duplicate", "duplicate"], "question1", "question2")],
    "mnli": [
        glue(*("mnli", ["entailment", "neutral", "contradiction"], "premise", "hypothesis"), split="validation_matched")
    ],
    "rte": [glue("rte", ["entailment", "not_entailment"], "sentence1", "sentence2")],
    "cola": [glue("cola", ["unacceptable", "acceptable"], "sentence")],
    "arc_easy": [arc("ARC-Easy")],
    "arc_challenge": [arc("ARC-Challenge")],
    "openbookqa": [
        {
            "id": "allenai/openbookqa",
            "config": "main",
            "split": "test",
            "rows": [lettered("question_stem", "8-376", list("ABCD"), "A ")],
        }
    ],
    "race": [
        {
            "id": "ehovy/race",
            "config": "all",
            "split": "test",
            "rows": [
                {"example_id": "high1.txt", "article": "A.", "answer": "D", "question": q, "options": RACE_OPTIONS}
                for q in ("One?", "Two _ .")
            ],
        }
    ],
    "mctest": [mctest("mc160"), mctest("mc500")],
    "mmlu_professional_law": [
        {
            "id": "cais/mmlu",
            "config": "professional_law",
            "split": "test",
            "features": Features(
                {
                    "question": TEXT,
                    "subject": TEXT,
                    "choices": datasets.List(TEXT),
                    "answer": ClassLabel(names=list("ABCD")),
                }
            ),
            "rows": [{"question": " Who? ", "subject": "professional_law", "choices": RACE_OPTIONS, "answer": 1}],
        }
    ],
    "wmt14_en_cs": [wmt("cs")],
    "wmt14_en_ru": [wmt("ru")],
    "wmt14_en_de": [wmt("de")],
    "gpqa": [{"id": "Idavidrein/gpqa", "config": "gpqa_main", "split": "train", "rows": [GPQA_ROW], "is_csv": True}],
    "math": [
        {
            "id": "EleutherAI/hendrycks_math",
            "config": subject,
            "split": "test",
            "rows": [
                {
                    "problem": f"Made up, {subject}: halve $x$.",
                    "level": "Level 1",
                    "type": subject,
                    "solution": "First \\boxed{0}, no: $\\boxed{\\frac{x}{2}}$.",
                }
            ],
        }
        for subject in SUBJECTS
    ],
    "gsm8k": [
        {
            "id": "openai/gsm8k",
            "config": "main",
            "split": "test",
            "rows": [{"question": "How many?", "answer": "600*2=<<600*2=1200>>1200\n#### 1,200"}],
        }
    ],
}


def lay_out(cache: Path, parts: list[dict[str, Any]]) -> None:
    """Write the parts of one data set into the folder that stands for the hub's."""
    folder = cache / "datasets" / parts[0]["id"].replace("/", "--")
    configs = []
    for part in parts:
        table = datasets.Dataset.from_list(part["rows"], features=part.get("features"))
        if part.get("is_csv"):
            path = f"{part['config']}.csv"
            folder.mkdir(parents=True, exist_ok=True)
            table.to_csv(folder / path)
        else:
            name = f"{part['split']}/0000" if part.get("is_converted") else f"{part['split']}-00000-of-00001"
            path = f"{part['config']}/{name}.parquet"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(folder / path)
        configs += [
            f"- config_name: {part['config']}",
            "  data_files:",
            f"  - split: {part['split']}",
            f"    path: {path}",
        ]
    if not any(part.get("is_converted") for part in parts):
        (folder / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", "# Made up"]))
