"""``radargate harness``: any task of lm-evaluation-harness on a gated model (layer 6; heavy imports stay lazy).

radargate harness --gate runs/flan/radargate --tasks arc_easy,my_task --include_path my_tasks --output scores.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radargate_pl import __version__
from radargate_pl.word_parser import WordParser, check_output

if TYPE_CHECKING:
    from radargate_pl.networks import GatedNetwork


def main(words: Sequence[str]) -> int:
    """Run tasks of the harness, print its table and write its results.

    Args:
        words: those after ``radargate harness``.

    Returns:
        0; mistakes are raised.

    Raises:
        ValueError: for bad input, and where the harness is not installed.
    """
    options = _parser().parse_args(words)
    names = [name for name in options.tasks.split(",") if name]
    if not names:
        raise ValueError("Expected --tasks to name at least one task of the harness, but got none.")
    _check_numbers(options)
    if options.output is not None:
        check_output(Path(options.output))
    _check_installed()
    manager = _task_manager(names, options.include_path)
    network = _network(options)
    expert = expert_id(network, options.expert)
    results = evaluate(network, names, expert=expert, manager=manager, **_settings(options))
    results["radargate"] = _provenance(network, options)
    _write(results, options.output)
    return 0


def evaluate(
    network: "GatedNetwork", tasks: Sequence[str], *, expert: int | None, manager: Any, batch_size: Any, **settings: Any
) -> dict[str, Any]:
    """Let the harness evaluate a network.

    Args:
        network: the model, in evaluation mode.
        tasks: names that ``manager`` knows.
        expert: id of the expert that answers under TaskGate, see `expert_id`.
        manager: the harness's ``TaskManager``.
        batch_size: examples a batch, or "auto".
        settings: further arguments of ``lm_eval.simple_evaluate`` (``limit``, ``num_fewshot``, ...).

    Returns:
        What ``simple_evaluate`` returns.
    """
    from lm_eval import simple_evaluate

    from radargate_pl.harness_model import GatedHFLM

    model = GatedHFLM(network.eval(), expert, batch_size)
    found: dict[str, Any] = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **settings)
    return found


def expert_id(network: "GatedNetwork", name: str | None) -> int | None:
    """Return the id of the expert that answers: TaskGate goes by the task, and the harness's are none of its own.

    Args:
        network: the model.
        name: ``--expert``, or None.

    Raises:
        ValueError: if TaskGate is given none, another gate is given one, or there is no such expert.
    """
    from radargate_pl.network_checks import goes_by_task

    by_task = goes_by_task(network)
    if by_task and name is None:
        raise ValueError(
            "Expected --expert with TaskGate: it answers with the expert of an example's own task, and tasks of the "
            f"harness have none. Name one of {list(network.experts)}, or take another gate."
        )
    if name is None:
        return None
    if not by_task:
        raise ValueError(f"Expected --expert with TaskGate alone, but the gate is {network.describe()}, which chooses.")
    if name not in network.experts:
        raise ValueError(f"Expected --expert to be one of {list(network.experts)}, but got {name!r}.")
    return network.experts.index(name)


def _parser() -> argparse.ArgumentParser:
    parser = WordParser(prog="radargate harness", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--gate", help="gate folder, or the run folder that has one; without it the bare backbone")
    add("--backbone", help="hub id, folder, .gguf file or built-in name; of the gate, if not where its folder says")
    add("--experts", help="folder of PEFT folders, where the gate's folder does not find them; alone: under TaskGate")
    add("--expert", help="the expert that answers everything, for TaskGate")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of backbone and experts")
    add("--tasks", required=True, help="names of tasks, groups or tags, separated by commas")
    add("--include_path", help="folder of your own task files (YAML)")
    add("--limit", type=float, help="examples of each task, from the front; below 1: the share of them")
    add("--num_fewshot", type=int, help="examples before each question; the task's own number without it")
    add("--batch_size", default="8", help="examples a batch, or auto")
    add("--apply_chat_template", action="store_true", help="ask in the tokenizer's chat template")
    add("--log_samples", action="store_true", help="write every example and answer into the output file too")
    add("--output", help="file for the harness's results as JSON, with gate and fingerprints")
    return parser


def _check_numbers(options: argparse.Namespace) -> None:
    size = options.batch_size
    if size != "auto" and not (size.isdecimal() and int(size) > 0):
        raise ValueError(f"Expected --batch_size to be auto or a number of at least 1, but got {size!r}.")
    if options.limit is not None and not options.limit > 0:
        raise ValueError(f"Expected --limit to be above 0, but got {options.limit}.")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ValueError(f"Expected --num_fewshot to be at least 0, but got {options.num_fewshot}.")


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "Expected the package lm_eval (lm-evaluation-harness) for radargate harness, but it is not installed. "
            "Run: pip install 'radargate-pl[harness]'"
        ) from error


def _task_manager(names: Sequence[str], folder: str | None) -> Any:
    """The harness's tasks, its own not looked through where the user's folder has all that are asked for.

    Raises:
        ValueError: if there is no such folder, or a name that neither knows.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not Path(folder).is_dir():
            raise ValueError(f"Expected --include_path to be a folder of task files, but there is no {folder!r}.")
        own = TaskManager(include_path=folder, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    manager = TaskManager(include_path=folder)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        import difflib

        near = [near for name in unknown for near in difflib.get_close_matches(name, manager.all_tasks, n=3)]
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise ValueError(
            f"Expected --tasks to be known to the harness, but {unknown} are not{hint}. Files of your own come with "
            "--include_path."
        )
    return manager


def _network(options: argparse.Namespace) -> "GatedNetwork":
    """The model that was asked for, on the GPU if there is one."""
    import torch

    from radargate_pl.gate_folder import CONFIG
    from radargate_pl.gates import TaskGate
    from radargate_pl.networks import GatedNetwork

    if options.gate is not None:
        folder = Path(options.gate)
        folder = folder if (folder / CONFIG).is_file() else folder / "gate"
        if not (folder / CONFIG).is_file():
            raise ValueError(f"Expected --gate to be a gate folder or a run with one, but {options.gate} has none.")
        places = {"backbone": options.backbone, "experts": options.experts}
        network = GatedNetwork.from_pretrained(folder, dtype=options.dtype, **places)
    elif options.backbone is not None:
        experts = options.experts or []
        network = GatedNetwork(backbone=options.backbone, experts=experts, gate=TaskGate, dtype=options.dtype)
    else:
        raise ValueError("Expected --gate, or --backbone for a bare one, but got neither.")
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    whole = options.limit is not None and options.limit >= 1
    return {
        "limit": int(options.limit) if whole else options.limit,
        "num_fewshot": options.num_fewshot,
        "batch_size": int(options.batch_size) if options.batch_size.isdigit() else options.batch_size,
        "apply_chat_template": options.apply_chat_template,
        "log_samples": options.log_samples,
    }


def _provenance(network: "GatedNetwork", options: argparse.Namespace) -> dict[str, Any]:
    return {
        "version": __version__,
        "gate": network.describe(),
        "combine": network.combine,
        "experts": list(network.experts),
        "expert": options.expert,
        "backbone": network.backbone_source,
        "decoder_start": network.decoder_start,
        "prompt_date": network.prompt_date,
        "dtype": str(network.backbone.dtype).removeprefix("torch."),
        "fingerprints": network.fingerprints,
    }


def _write(results: dict[str, Any], output: str | None) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    from radargate_pl.atomic_files import write_text

    print(f"{results['radargate']['gate']}\n{make_table(results)}")
    if results.get("groups"):
        print(make_table(results, "groups"))
    if output is not None:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_text(Path(output), text + "\n")
