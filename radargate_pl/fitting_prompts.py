"""Hands the prompt of a fit over to the benchmarks that ask the tasks of the fit (layer 6)."""

from typing import Any

from radargate_pl.config_places import COMMAND_LINE, Located
from radargate_pl.config_sources import CommandLine

FIT, BENCHMARKS = "FlanMixture", "BenchmarkData"
# Arguments of the mixture with their defaults, to the arguments of the benchmarks that they become.
HANDED_OVER = {"prompt": ("chat", "fitting_prompt"), "special_tokens": (True, "fitting_special_tokens")}


class FittingPrompts:
    """What the config of a run says about its prompts, kept when a later config replaces its data by benchmarks.

    A class that takes another's place starts from its own defaults; how tasks were asked in the fit however is part of
    what the weights are: asked otherwise, they answer worse. What somebody writes beats what is handed over.
    """

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def read(self, merged: Located) -> None:
        """Notes the prompts of the mixture, if these configs have one by now.

        Args:
            merged: The config files so far.
        """
        data = merged.value.get("data")
        if data is not None and _class_of(data) == FIT:
            given = _arguments(data)
            self._found = {new: given.get(name, default) for name, (default, new) in HANDED_OVER.items()}

    def hand_over(self, merged: Located, line: CommandLine) -> None:
        """Writes them into the arguments of `BenchmarkData`, if that is what comes of files and command line.

        Args:
            merged: All config files; changed in place.
            line: The command line.
        """
        data = merged.value.get("data", Located(None, COMMAND_LINE))
        typed = [text for key, text in line.settings if key in ("data", "data.class_path") and text]
        name = typed[-1] if typed else _class_of(data, short=False)
        if not self._found or name is None or name.rpartition(".")[2] != BENCHMARKS:
            return
        given = _arguments(data) if _class_of(data) == BENCHMARKS else {}
        names = {key.rpartition(".")[2] for key, _ in line.settings if key.startswith("data.")}
        new = {key: value for key, value in self._found.items() if key not in given and key not in names}
        kept = data.value if _class_of(data) == BENCHMARKS and isinstance(data.value, dict) else {}
        arguments = kept.get("init_args", Located({}, data.where))
        located = {key: Located(value, data.where) for key, value in new.items()}
        whole = {"class_path": Located(name, data.where), **kept}
        whole["init_args"] = Located({**(arguments.value or {}), **located}, arguments.where)
        merged.value["data"] = Located(whole, data.where)


def _class_of(data: Located, short: bool = True) -> str | None:
    named = data.value.get("class_path") if isinstance(data.value, dict) else data
    name = named.value if isinstance(named, Located) else None
    return (name.rpartition(".")[2] if short else name) if isinstance(name, str) else None


def _arguments(data: Located) -> dict[str, Any]:
    """What is given of a class: its ``init_args``, and what stands beside ``class_path``."""
    if not isinstance(data.value, dict):
        return {}
    plain = data.plain()
    return {**(plain.pop("init_args", None) or {}), **plain}
