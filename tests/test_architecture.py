"""The shape of the package: imports point down only, files and functions stay small, importing it is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "radargate_pl"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    0: {"ops", "losses", "auxiliary_losses", "notices", "remembered", "disk_space", "run_lock", "scoring"},
    1: {
        "benchmarks",
        *("arguments", "experts", "expert_shapes", "initialization", "precision", "site", "trainable_experts"),
        *(
            "gates",
            "prototypes",
            "fast_rotation",
            "gathered_rows",
            "native",
            "rank_rotation",
            "rotation_function",
            "rotations",
        ),
    },
    2: {
        *(
            "combines",
            "expert_sources",
            "fast_mixture",
            "kept_grams",
            "mixture",
            "mixture_operators",
            "moe",
            "prompt_gates",
            "records",
        ),
        *("decode_buffers", "decode_kinds", "decode_mixture", "native_decode", "shared_inputs"),
    },
    3: {
        *("adapters", "adapter_checks", "adapter_config", "expert_files", "targets", "expert_banks"),
        *(
            "backbones",
            "built_in_backbones",
            "smollm2",
            "debug_backbone",
            "hub",
            "folders",
            "fingerprints",
            "quantization",
        ),
        *(
            "networks",
            "network_checks",
            "network_state",
            "execution",
            "compiled_layers",
            "grouped_attention",
            "memory_estimate",
            "block_recomputation",
            "new_experts",
            "label_logits",
            "gate_folder",
            "class_specs",
            "expert_library",
            "domains",
            "joining_experts",
            "fixed_compositions",
            "decoder_start",
            "chat_template",
            "backbone_identity",
            "gate_fields",
            "layer_patterns",
            "transposed_linear",
            "greedy",
        ),
    },
    4: {"data"},
    5: {
        *(
            "module",
            "auxiliary_terms",
            "steps",
            "metrics",
            "checkpoint",
            "checkpoint_content",
            "expert_gradients",
            "parameter_groups",
            "fit_checks",
            "schedule_trial",
        ),
        *("checkpoint_files", "expert_division", "optimizer_settings", "preemption", "processes", "random_state"),
        "replicas",
        *("step_gradients", "step_logging", "strategy", "validation_state"),
        *("provenance", "redaction", "search", "callbacks", "slurm"),
        *("answers_key", "benchmark_results", "benchmark_step", "generation", "partial_answers", "ranking"),
        "finished_tests",
    },
    6: {
        *("cli", "lightning_cli", "config_sources", "config_schema", "config_errors", "config_classes"),
        *("class_help", "fitting_prompts", "kept_settings", "config_places", "config_yaml", "config_names"),
        *("error_messages", "standard_streams", "help_pages", "last_lines", "word_parser"),
        *("domain_command", "doctor", "doctor_checks", "harness", "harness_model"),
        *("score_command", "score_references", "predictions"),
        *(
            "run_folder",
            "overwriting",
            "run_loggers",
            "run_callbacks",
            "trainer_config",
            "report",
            "report_runs",
            "report_plots",
        ),
    },
}
FREE = {"", "atomic_files", "cache_folder", "near_paths"}  # the version, and files on a disk: standard library only
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

# What each layer may import besides torch and the standard library.
OUTSIDE = {
    0: {"numpy", "sacrebleu", "rouge_score", "math_verify"},  # of scoring, inside functions
    1: set(),
    2: set(),
    3: {
        *("transformers", "peft", "safetensors", "huggingface_hub", "tokenizers", "gguf", "filelock", "lightning"),
        "bitsandbytes",
    },
    4: {"transformers", "datasets", "lightning", "reasoning_gym", "pyarrow", "numpy", "huggingface_hub", "jinja2"},
    5: {"lightning", "torchmetrics", "nevergrad", "numpy"},
    6: {"lightning", "jsonargparse", "yaml", "safetensors", "matplotlib", "tensorboard", "packaging", "lm_eval"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported(path: Path) -> set[str]:
    """Dotted names of every import in the file, those inside functions too, but not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return names


def test_every_file_has_a_layer():
    assert len(FILES) > 30
    assert {module_of(path) for path in FILES} <= set(LAYER_OF) | FREE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    layer = LAYER_OF.get(module_of(path), 0)
    for name in imported(path):
        head, _, rest = name.partition(".")
        if head == "radargate_pl":
            target = rest.split(".")[0]
            target = target if target in LAYER_OF else ""
            assert LAYER_OF.get(target, 0) <= layer, f"{path.name} (layer {layer}) imports {name}"
        elif head not in sys.stdlib_module_names and head != "torch":
            assert module_of(path) not in FREE, f"{path.name} imports {name}"
            assert head in set().union(*(OUTSIDE[below] for below in range(layer + 1))), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [*FILES, ROOT / "cli.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 40, f"{path.name}: {node.name} is too long"


@pytest.mark.parametrize("name", ["utils", "common", "misc", "helpers"])
def test_no_file_for_leftovers(name):
    assert not list(PACKAGE.rglob(f"{name}.py"))


def heavy(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*[m for m in sys.modules if '.' not in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {"torch", "lightning", "transformers", "peft", "datasets", "matplotlib"} & set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert heavy("import radargate_pl") == set()
    assert heavy("import radargate_pl.cli; radargate_pl.cli.main(['--version'])") == set()


def test_help_loads_no_more_than_lightning_does():
    """So that --help is as quick as that of a bare LightningCLI, which measures 0.9 to 1.1 of it."""
    bare = heavy("import lightning.pytorch.cli")
    assert heavy("import radargate_pl.lightning_cli") == bare


def code_lines(node: ast.ClassDef) -> int:
    """Lines of a class without docstrings, comments, decorators and blank lines."""
    bodies = [node, *(item for item in node.body if isinstance(item, ast.FunctionDef))]
    docs = {
        line
        for body in bodies
        if ast.get_docstring(body)
        for line in range(body.body[0].lineno, body.body[0].end_lineno + 1)
    }
    return len({n.lineno for n in ast.walk(node) if hasattr(n, "lineno")} - docs)


@pytest.mark.parametrize("path", sorted((PACKAGE / "gates").glob("*.py")), ids=lambda path: path.name)
def test_a_gate_stays_under_forty_lines(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            assert code_lines(node) <= 40, f"{node.name}: {code_lines(node)}"
