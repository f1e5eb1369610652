"""What ``--help NAME`` shows: the arguments of one class (layer 6)."""

import argparse
import inspect
from collections.abc import Sequence

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule

from radargate_pl.config_places import COMMAND_LINE, ConfigError
from radargate_pl.config_schema import find_class, named_classes, nearest
from radargate_pl.gates import Gate
from radargate_pl.help_pages import COMMANDS
from radargate_pl.networks import GatedNetwork

# The data's tokenizer is always the backbone's.
LINKS = {"data.init_args.tokenizer": "model.network.init_args.backbone", "benchmarks.overwrite": "overwrite"}

# Classes that --help NAME explains: how many of their first arguments the program gives, and where they are set.
EXPLAINED: dict[type, tuple[int, str | None]] = {
    Gate: (1, "model.network.gate"),
    GatedNetwork: (1, "model.network"),
    LightningDataModule: (0, "data"),
    Callback: (0, None),
    torch.optim.Optimizer: (1, "model.optimizer"),
    torch.optim.lr_scheduler.LRScheduler: (1, "model.lr_scheduler"),
}


def class_to_explain(words: Sequence[str]) -> str | None:
    """The class of ``--help NAME`` or ``--help=NAME``."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("-h", "--help"):
            following = value if equals else next(iter(words[index + 1 :]), "")
            if following and not following.startswith("-") and following not in COMMANDS:
                return following
    return None


def print_class_help(name: str) -> None:
    """Prints the arguments of one gate, data module, callback, optimiser or schedule, as they are typed.

    Raises:
        ConfigError: There is no such class.
    """
    bases = list(EXPLAINED)
    try:
        cls = find_class(name, bases)
    except ValueError as error:
        near = nearest(name.rpartition(".")[2], named_classes(bases))
        raise ConfigError([f"{COMMAND_LINE}: --help {name}: there is no such class. {near}"]) from error
    positionals, key = next(options for base, options in EXPLAINED.items() if issubclass(cls, base))
    skip: set[str | int] = {target.rpartition(".")[2] for target in LINKS}
    parser = ArgumentParser(prog=name, usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(
        cls, key, as_group=False, skip=skip | {positionals} if positionals else skip, fail_untyped=False
    )
    print(f"{cls.__name__}, in {cls.__module__}" + (f"; chosen with --{key} {cls.__name__}" if key else ""))
    print(f"\n{inspect.getdoc(cls) or ''}".split("\nArgs:")[0].rstrip() + "\n")
    print(parser.format_help().strip())
