"""The declarations of benchmarks: complete, renderable, light to import; prompts equal to lm-evaluation-harness's."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from radargate_pl.benchmarks import BENCHMARKS, GROUPS, PROTOCOLS, natural_instruction
from radargate_pl.data.benchmark_items import PLACE, gap, render

ROOT = Path(__file__).parent.parent.parent
METRICS = {
    *("accuracy", "exact_match", "matthews", "f1", "bleu", "chrf", "sentence_chrf_accuracy", "rouge_l"),
}


def test_the_paper_has_twenty_one_tasks_in_six_benchmarks():
    paper = [BENCHMARKS[name] for name in GROUPS["paper"]]
    assert len(paper) == len(set(GROUPS["paper"])) == 21
    assert {benchmark.group for benchmark in paper} == {"GLUE", "MMLU", "WMT14", "GPQA", "MATH", "GSM8K"}
    assert {name: len(names) for name, names in GROUPS.items()} == {
        **{"glue": 7, "mmlu": 8, "wmt14": 3, "flan_cot": 9, "paper": 21},
    }
    assert set(GROUPS["paper"]).isdisjoint(GROUPS["flan_cot"])


@pytest.mark.parametrize(
    "benchmark",
    [*BENCHMARKS.values(), natural_instruction("task1", "mathematics"), natural_instruction("task2", None)],
    ids=lambda benchmark: benchmark.name,
)
def test_a_declaration_is_whole(benchmark):
    assert benchmark.prompt_version == f"{benchmark.name}-v1"
    assert benchmark.protocol in PROTOCOLS
    assert benchmark.metrics
    assert set(benchmark.metrics) <= METRICS
    assert (benchmark.protocol == "ranking") == (benchmark.answer_format == "choice")
    assert benchmark.citation
    assert benchmark.stop
    assert benchmark.max_new_tokens >= 16
    assert not benchmark.names or len(benchmark.names) == len(benchmark.labels)
    assert len(set(benchmark.labels)) == len(benchmark.labels)
    for template in filter(None, (benchmark.prompt, benchmark.generation_prompt, benchmark.source_prompt)):
        assert template == template.rstrip()
        assert {form for _, form in PLACE.findall(template)} <= {"", "stripped", "sentence", "brackets"}
        inputs = {name for name, _ in PLACE.findall(template)} - {"options"}
        assert inputs
        if benchmark.hub:
            assert inputs == set(benchmark.hub.inputs)
    if benchmark.hub:
        assert bool(benchmark.hub.choices) == (benchmark.answer_format == "choice" and not benchmark.names)
        assert benchmark.hub.is_gated <= benchmark.is_private


def test_the_paper_generates_up_to_512_tokens():
    assert [BENCHMARKS[name].max_new_tokens for name in ("gsm8k", "math")] == [512, 512]


def test_templates():
    inputs = {"a": "  x. ", "b": " y"}
    assert render("{a}|{a:stripped}|{a:sentence}|{b:sentence}", inputs) == "  x. |x.|x.|y."
    assert render("{options}/{options:brackets}", {}, ["{a}", "q"]) == "A. {a}\nB. q/(A) {a}\n(B) q"
    assert render("{b}", {"b": "{a} {options} \\1"}) == "{a} {options} \\1"
    with pytest.raises(ValueError, match="missing input 'c'; there are a, b"):
        render("{c}", inputs)
    assert [gap(prompt) for prompt in ("Answer:", "Answer: ", "x\n", "")] == [" ", "", "", " "]


def test_declarations_load_no_library():
    code = (
        "import sys; import radargate_pl.benchmarks;"
        "print(*{m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "lightning", "transformers", "datasets", "numpy", "pyarrow"} & set(done.stdout.split())


class HarnessLoader(yaml.SafeLoader):
    """Reads `!function module.name` as its name."""


HarnessLoader.add_constructor("!function", lambda loader, node: node.value)

HARNESS = {
    **{name: f"glue/{name}/default.yaml" for name in GROUPS["glue"]},
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "mmlu_professional_law": "mmlu/default/_default_template_yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}


@pytest.mark.parametrize("name", HARNESS)
def test_prompts_and_choices_are_those_of_the_harness(name):
    """Rendered by the harness's own template language from the same inputs."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    jinja2 = pytest.importorskip("jinja2")
    path = Path(lm_eval.__file__).parent / "tasks" / HARNESS[name]
    task = yaml.load(path.read_text(), HarnessLoader)  # a safe loader with one tag more
    benchmark = BENCHMARKS[name]
    inputs = {name: f" some {name} " for name, _ in PLACE.findall(benchmark.prompt) if name != "options"}
    choices = ["red", "blue", "green", "grey"]
    if task["doc_to_text"].startswith("utils."):
        module: dict = {}
        exec((path.parent / "utils.py").read_text(), module)
        expected = module["doc_to_text"](inputs)
    elif "{{" in task["doc_to_text"]:
        template = jinja2.Environment(keep_trailing_newline=True).from_string(task["doc_to_text"])
        expected = template.render(**inputs, choices=choices)
    else:
        expected = inputs["question"]  # the name of a column
    assert render(benchmark.prompt, inputs, choices) == expected
    if isinstance(task.get("doc_to_choice"), list):
        assert list(benchmark.labels) == task["doc_to_choice"]
    if "generation_kwargs" in task:
        assert list(benchmark.stop) == task["generation_kwargs"]["until"]
