"""Tasks made on the spot by reasoning-gym: no file, no network, the same examples for the same seed."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from radargate_pl.data.records import Line, Split

PREFIX = "reasoning_gym:"
DEFAULT_SEED = 42
TRAIN_EXAMPLES = 1000
TEST_EXAMPLES = 200
TRIES_PER_EXAMPLE = 50


@dataclass(frozen=True)
class ProceduralSource:
    """A reasoning-gym task: ids 0, 1, ... are train examples, the next ones validation, the next ones test.

    A validation or test question that was already asked in an earlier split is passed over, so small tasks
    do not leak. The data depend on the option `seed`, never on the run's seed: seeds of a run compare on equal data.

    Args:
        generator: Name in reasoning-gym, e.g. `chain_sum`.
        task: Name of the task here.
        fixed_task: Whether the user gave `task`.
        options: Arguments of the generator's configuration, and `seed`.
        sizes: Examples of each split.
    """

    generator: str
    task: str
    sizes: Mapping[Split, int]
    fixed_task: bool = True
    split: None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The generator with its prefix."""
        return PREFIX + self.generator

    @property
    def category(self) -> str:
        """The package of reasoning-gym that the task lies in, e.g. `arithmetic`."""
        return str(self._classes()[0].__module__.split(".")[1])

    def lines(self) -> Iterator[Line]:
        """Yield the examples split by split.

        Raises:
            ValueError: If reasoning-gym is not installed, knows no such task or option, or the task is too small.
        """
        examples = self._examples()
        seen: set[str] = set()
        number = 0
        for split, size in self.sizes.items():
            fresh: set[str] = set()
            yielded, last = 0, number + size + TRIES_PER_EXAMPLE * max(size, 20)
            while yielded < size:
                if number >= last:
                    raise ValueError(self._too_small(split, size, yielded))
                example = examples[number]
                if example["question"] not in seen:
                    fresh.add(example["question"])
                    yielded += 1
                    yield self._line(number, split, example)
                number += 1
            seen |= fresh

    def _line(self, number: int, split: Split, example: Mapping[str, Any]) -> Line:
        fields = {
            "id": f"{self.task}-{number}",
            "source": example["question"],
            "target": example["answer"],
            "split": split,
        }
        return Line(f"{PREFIX}{self.generator} example {number}", fields)

    def _examples(self) -> Any:
        """The generator; it makes example i from (seed, i) alone, whatever its size."""
        dataset_class, config_class = self._classes()
        defaults = config_class()
        unknown = sorted(name for name in self.options if not hasattr(defaults, name))
        if unknown:
            known = ", ".join(sorted(name for name in vars(defaults) if name != "size"))
            raise ValueError(f"Expected options of {PREFIX}{self.generator} among {known}, but got {unknown}.")
        values = {name: _value(text, getattr(defaults, name)) for name, text in self.options.items()}
        try:
            config = config_class(**{"seed": DEFAULT_SEED, **values})
            config.validate()
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected valid options for {PREFIX}{self.generator}, but got {dict(self.options)}: {error}"
            ) from error
        return dataset_class(config)

    def _classes(self) -> tuple[Any, Any]:
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ValueError(
                f"Expected the package reasoning-gym for the task {PREFIX}{self.generator}, but it is not installed. "
                'Run: pip install "radargate-pl[quickstart]"'
            ) from error
        if self.generator not in DATASETS:
            import difflib

            near = difflib.get_close_matches(self.generator, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)[:5]
            raise ValueError(
                f"Expected a task of reasoning-gym after {PREFIX!r}, but got {self.generator!r}; "
                f"nearest: {', '.join(near)}."
            )
        return DATASETS[self.generator]

    def _too_small(self, split: Split, size: int, found: int) -> str:
        return (
            f"Expected {PREFIX}{self.generator} to have {size} {split} questions that earlier splits do not ask, "
            f"but it has only about {found}. Lower max_examples, validation_examples or test_examples, "
            "or widen the task by its options."
        )


def default_sizes(train: int | None, validation: int, test: int | None) -> dict[Split, int]:
    """Examples to make for each split; None takes TRAIN_EXAMPLES and TEST_EXAMPLES."""
    return {
        "train": TRAIN_EXAMPLES if train is None else train,
        "validation": validation,
        "test": TEST_EXAMPLES if test is None else test,
    }


def _value(text: str, default: object) -> object:
    """An option written in a task's name, in the type of its default value; text that is no such value stays text."""
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(default, list | tuple):
        return type(default)(_value(part, next(iter(default), "")) for part in text.split(","))
    kinds = {int: (int,), float: (float,), type(None): (int, float)}.get(type(default), ())
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
