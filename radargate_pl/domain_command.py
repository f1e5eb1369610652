"""Make the experts' domain embeddings: ``python -m radargate_pl.domain_command`` (layer 6).

    python -m radargate_pl.domain_command --backbone smollm2-135m-q4 --experts runs/flan/experts/experts \
        --tasks data/flan_cot

writes ``domain.safetensors`` into the folder of every expert the tasks belong to; NexusGate reads them.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from radargate_pl.adapters import resolve_adapters
from radargate_pl.backbones import load_backbone
from radargate_pl.data import FlanMixture
from radargate_pl.data.examples import Example
from radargate_pl.domains import DOMAIN_FILE, domain_embedding, write_domain
from radargate_pl.error_messages import print_error
from radargate_pl.expert_banks import experts_of_tasks
from radargate_pl.word_parser import WordParser

BATCH = 8
LONGEST = 512  # records are encoded as for training; how much of each is read is another matter
NAMED = re.compile(r"(?P<name>[A-Za-z0-9_-]+)=(?P<place>.+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words of the command line; those of the process if not given.

    Returns:
        Exit code: 0, or 1 for bad input.
    """
    options = _parser().parse_args(arguments)
    try:
        _make(options)
    except (ValueError, OSError) as error:
        print(f"radargate domains: {error}", file=sys.stderr)
    except Exception as error:  # of a library; the traceback is kept
        print_error(error)
    else:
        return 0
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = WordParser(prog="python -m radargate_pl.domain_command", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", required=True, help="the backbone of the experts")
    parser.add_argument("--experts", required=True, help="a folder of PEFT folders")
    parser.add_argument("--tasks", required=True, nargs="+", help="as in FlanMixture; name=place gives a task its name")
    parser.add_argument("--category_of", nargs="*", default=[], help="task=category, where the records say another")
    parser.add_argument("--samples", type=int, default=32, help="train records an expert's embedding is the mean of")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a record that are read, from its start")
    parser.add_argument("--validation_examples", type=int, default=50, help="as in training: these are not read")
    parser.add_argument("--target", choices=("answer", "rationale"), default="answer", help="as in training")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the backbone")
    parser.add_argument("--overwrite", action="store_true", help="replace embeddings that are there")
    return parser


def _make(options: argparse.Namespace) -> None:
    for name in ("samples", "max_length"):
        if getattr(options, name) < 1:
            raise ValueError(f"Expected {name} to be at least 1, but got {getattr(options, name)}.")
    folders = resolve_adapters(options.experts)
    data = FlanMixture(
        tasks=_tasks(options.tasks),
        category_of=_categories(options.category_of),
        tokenizer=options.backbone,
        max_examples=options.samples,
        validation_examples=options.validation_examples,
        test_examples=0,
        max_length=max(LONGEST, options.max_length),
        target=options.target,
    )
    owners = _owners(data.categories, tuple(folders))
    _check_free({name: folders[name] for name in owners.values()}, options.overwrite)
    backbone = load_backbone(options.backbone, options.dtype)
    model = backbone.model.to("cuda" if torch.cuda.is_available() else "cpu")
    data.prepare_data()
    data.setup("fit")
    for name, examples in _samples(data, owners, options.samples).items():
        embedding = domain_embedding(model, _batches(data, examples, options.max_length))
        write_domain(folders[name], embedding, backbone_fingerprint=backbone.fingerprint, samples=len(examples))
        tasks = ", ".join(task for task, owner in owners.items() if owner == name)
        print(f"{folders[name] / DOMAIN_FILE}: {len(examples)} samples of {tasks}")
    if missing := [name for name in folders if name not in owners.values()]:
        print(f"no task given belongs to {missing}: they get no embedding")


def _tasks(words: Sequence[str]) -> list[str | dict[str, str]]:
    matches = [(word, NAMED.fullmatch(word)) for word in words]
    return [{match["name"]: match["place"]} if match else word for word, match in matches]


def _categories(words: Sequence[str]) -> dict[str, str]:
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise ValueError(f"Expected category_of as task=category, but got {wrong}.")
    return dict(word.split("=", 1) for word in words)


def _owners(categories: Mapping[str, str | None], experts: tuple[str, ...]) -> dict[str, str]:
    """Task to the expert that was trained on it."""
    ids = experts_of_tasks(categories, experts)
    without = {task: categories[task] for task, index in ids.items() if index < 0}
    if without:
        raise ValueError(
            f"Expected every task to have an expert, of its name or its category's, but these (with their categories) "
            f"have none: {without}. The experts are {list(experts)}; leave these tasks out, or name them (name=place)."
        )
    return {task: experts[index] for task, index in ids.items()}


def _check_free(folders: Mapping[str, Path], overwrite: bool) -> None:
    there = [str(folder / DOMAIN_FILE) for folder in folders.values() if (folder / DOMAIN_FILE).exists()]
    if there and not overwrite:
        raise ValueError(
            f"Expected experts without a domain embedding, but there are {there}. Nothing was written; pass "
            "--overwrite to make them anew."
        )


def _samples(data: FlanMixture, owners: Mapping[str, str], samples: int) -> dict[str, list[Example]]:
    """Each expert's first train examples, from all of its tasks in turn."""
    of_task: dict[str, list[Example]] = {name: [] for name in data.task_names}
    records = data.examples("train")
    for example in (records[index] for index in range(len(records))):
        of_task[data.task_names[example.task]].append(example)
    found = {}
    for expert in dict.fromkeys(owners.values()):
        rounds = itertools.zip_longest(*(of_task[task] for task, owner in owners.items() if owner == expert))
        found[expert] = [example for one in rounds for example in one if example is not None][:samples]
    return found


def _batches(data: FlanMixture, examples: list[Example], max_length: int) -> Iterator[dict[str, Tensor]]:
    collate = data.collator()
    for start in range(0, len(examples), BATCH):
        batch = collate(examples[start : start + BATCH])
        yield {
            "input_ids": batch["input_ids"][:, :max_length],
            "attention_mask": batch["attention_mask"][:, :max_length],
        }


if __name__ == "__main__":
    sys.exit(main())
