"""Help and refusals that need no class, so that nothing is imported for them (layer 6; standard library only)."""

from collections.abc import Sequence
from difflib import get_close_matches

from radargate_pl.config_places import COMMAND_LINE, ConfigError

COMMANDS = {
    "fit": "train gates, experts or both, and validate",
    "validate": "loss and exact match of the validation split",
    "test": "the test split, or benchmarks by generation and ranking",
    "predict": "write answers: to the test split, or to prompts of your own",
}
# Commands that train nothing: each is a program of its own, with its own --help.
PROGRAMS = {
    "doctor": ("radargate_pl.doctor", "what is wrong with this machine or a config, and one dry step"),
    "score": ("radargate_pl.score_command", "judge and score a file of predictions; no model is loaded"),
    "harness": ("radargate_pl.harness", "tasks of lm-evaluation-harness on a gated model"),
}
# What is no command of this name, and how it is done.
ELSEWHERE = {
    "report": "python -m radargate_pl.report RUN [RUN ...]",
    "domains": "python -m radargate_pl.domain_command --help",
    "train": "radargate fit",
    "eval": "radargate validate",
    "evaluate": "radargate validate",
    "generate": "radargate predict",
    "infer": "radargate predict",
    "preview": "radargate fit --preview",
    "prepare": "radargate fit --preview",
    "resume": "radargate fit --ckpt_path auto",
}
_TOP = """\
usage: radargate {{{commands}}} [--config FILE ...] [--key value ...]
       radargate {{{programs}}} --help

Trains gates over frozen LoRA experts.

commands:
{lines}

  radargate fit --help        the options of a command, those most used first
  radargate fit --help all    every option; loads all classes
  radargate --help NAME       one class with its options, e.g. radargate --help RadarGate
  radargate --version         the version
  --debug                     show the traceback of an error (of any command)
"""
_OPTIONS = {
    "-c, --config FILE": "YAML or JSON; may be given several times, later files win, the command line wins over all",
    "--print_config": "print the resolved configuration and stop",
    "--preview": "print three records with the tokens that carry loss and stop; no weights are loaded",
    "--ckpt_path PATH": "a checkpoint, run folder or gate folder; auto, last or best: of this run folder",
    "--overwrite true": "fit: replace the run in the folder; others: evaluate there whatever it holds",
    "--seed_everything N": "seed of everything",
}
_GROUPS = {
    "trainer (radargate fit --help all lists the others)": {
        "--trainer.default_root_dir": "the run folder",
        "--trainer.max_steps": "optimiser steps",
        "--trainer.max_epochs": "passes over the data",
        "--trainer.devices": "processes on this machine",
        "--trainer.accelerator": "cpu, gpu or auto",
        "--trainer.precision": "32-true, bf16-true, bf16-mixed, ...",
        "--trainer.accumulate_grad_batches": "batches a step",
        "--trainer.gradient_clip_val": "largest norm of a gradient",
        "--trainer.val_check_interval": "validate so often",
        "--trainer.logger": "a logger by class_path, besides metrics.csv",
        "--trainer.callbacks": "callbacks by class_path",
    },
    "model (radargate --help GatedNetwork, --help RadarGate, --help AdamW)": {
        "--model.network.backbone": "hub id, folder, .gguf file or built-in name",
        "--model.network.experts": "PEFT adapters: a folder of folders, a list, or name: folder",
        "--model.network.new_experts": "make experts in this run: per, rank, alpha, target_modules",
        "--model.network.gate": "the gate by class_path; its options follow: --model.network.gate.top_k 2",
        "--model.network.train": "gate, experts or both",
        "--model.optimizer": "the optimiser by class_path; --model.optimizer.lr 1e-3",
        "--model.lr_scheduler": "the schedule by class_path",
        "--model.max_new_tokens": "longest generated answer",
    },
    "data (radargate --help FlanMixture, --help BenchmarkData)": {
        "--data": "the data module by class_path",
        "--data.tasks": "files, folders, hub data sets: a list, or name: place",
        "--data.batch_size": "examples a batch",
        "--data.max_length": "tokens a record",
        "--data.prompt": "chat, or a template",
        "--data.inputs": "prompts of your own for predict; - is standard input",
    },
}


def quick_answer(words: Sequence[str]) -> str | None:
    """The help page that these words ask for; None where a class is asked for, or no help at all.

    Args:
        words: those after ``radargate``.
    """
    asked = [index for index, word in enumerate(words) if word in ("-h", "--help")]
    if not asked:
        return None
    following = words[asked[0] + 1 : asked[0] + 2]
    if following and not following[0].startswith("-") and following[0] not in COMMANDS:
        return None
    command = next((word for word in [*words[:1], *following] if word in COMMANDS), None)
    return _top_page() if command is None else _page(command)


def straightened(words: Sequence[str]) -> list[str]:
    """``help X`` as ``--help X``, and ``--help doctor`` as ``doctor --help``."""
    words = ["--help", *words[1:]] if words[:1] == ["help"] else list(words)
    if words[:1] in (["--help"], ["-h"]) and words[1:2] and words[1] in PROGRAMS:
        return [words[1], "--help"]
    return words


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a page of options is asked for, also that of one class: ``--model.network.gate.help RadarGate``."""
    return any(word in ("-h", "--help") or word.partition("=")[0].endswith((".help", "--help")) for word in words)


def check_command(words: Sequence[str]) -> None:
    """Raise unless the first word is a command.

    Args:
        words: those after ``radargate``, none of which asks for help.

    Raises:
        ConfigError: with what there is, or how it is done.
    """
    names = [*COMMANDS, *PROGRAMS]
    if not words:
        raise ConfigError([f"{COMMAND_LINE}: give a command: {', '.join(names)}; --help says more."])
    first = words[0]
    if first in COMMANDS:
        return
    if first.partition("=")[0] == "--print_shtab":
        raise ConfigError(
            [f"{COMMAND_LINE}: --print_shtab: there is no shell completion; --help all lists every option."]
        )
    if first.startswith("-"):
        typed = next((word for word in words if word in COMMANDS), "fit")
        raise ConfigError([f"{COMMAND_LINE}: the command comes first: radargate {typed} {first} ..."])
    near = get_close_matches(first.lower(), names, n=3)
    hint = f"Nearest: {', '.join(near)}." if near else f"Accepted: {', '.join(sorted(names))}."
    hint = f"Run {ELSEWHERE[first]}" if first in ELSEWHERE else hint
    raise ConfigError([f"{COMMAND_LINE}: there is no command '{first}'. {hint}"])


def _top_page() -> str:
    lines = [*COMMANDS.items(), *((name, text) for name, (_, text) in PROGRAMS.items())]
    return _TOP.format(
        commands=",".join(COMMANDS),
        programs=",".join(PROGRAMS),
        lines="\n".join(f"  {name:<12}{text}" for name, text in lines),
    )


def _page(command: str) -> str:
    parts = [f"usage: radargate {command} [--config FILE ...] [--key value ...]", f"{COMMANDS[command].capitalize()}."]
    parts += [_table("options", _OPTIONS), *(_table(title, rows) for title, rows in _GROUPS.items())]
    parts.append(f"radargate {command} --help all lists every option, --help NAME explains one class.")
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: dict[str, str]) -> str:
    return "\n".join([f"{title}:", *(f"  {name:<36}{text}" for name, text in rows.items())])
