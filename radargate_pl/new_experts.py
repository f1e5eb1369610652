"""Experts that are still to be trained: which there are and what they start from (layer 3)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from radargate_pl.initialization import generator_for


@dataclass
class NewExperts:
    """A library of LoRA experts to train from scratch.

    Args:
        per: one expert per "task", per "category" of tasks, one for the "union" of all, or "mixture": ``count`` experts
            that belong to no task and share them out by the gate (HydraLoRA).
        target_modules: layers that receive experts: name suffixes, or "all-linear".
        rank: rank r of every expert.
        alpha: LoRA alpha; the scaling is alpha / rank.
        use_rslora: scale by alpha / sqrt(rank) instead.
        share_A: one A per layer for all experts (HydraLoRA).
        count: how many experts ``per: mixture`` makes.

    Raises:
        ValueError: for another ``per``, a rank or count below 1, or an alpha with which no expert acts.
    """

    per: Literal["task", "category", "union", "mixture"] = "task"
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    rank: int = 8
    alpha: float = 32
    use_rslora: bool = False
    share_A: bool = False
    count: int = 4

    def __post_init__(self) -> None:
        if self.per not in ("task", "category", "union", "mixture"):
            raise ValueError(
                f"Expected new_experts.per to be 'task', 'category', 'union' or 'mixture', but got {self.per!r}."
            )
        for name, value in (("rank", self.rank), ("count", self.count)):
            if value < 1:
                raise ValueError(f"Expected new_experts.{name} to be at least 1, but got {value}.")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"Expected new_experts.alpha to be a number other than 0, but got {self.alpha}.")

    @property
    def scaling(self) -> float:
        """The factor behind B."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def names(self, tasks: Mapping[str, str | None]) -> tuple[str, ...]:
        """Return the names of the experts these tasks ask for.

        Args:
            tasks: task name to category.

        Raises:
            ValueError: when there are no tasks, or ``per`` is "category" and a task has none or two get one name.
        """
        if not tasks:
            raise ValueError("Expected new_experts to be given the tasks of a data module, but there are none.")
        if self.per == "union":
            return ("union",)
        if self.per == "mixture":
            return tuple(f"expert_{index}" for index in range(self.count))
        if self.per == "task":
            return tuple(tasks)
        without = [name for name, category in tasks.items() if category is None]
        if without:
            raise ValueError(
                f"Expected every task to have a category for new_experts.per: category, but these have none: "
                f"{without}. Add a `category` field to their records, or choose per: task."
            )
        categories = dict.fromkeys(category for category in tasks.values() if category is not None)
        named: dict[str, str] = {}
        for category in categories:
            first = named.setdefault(expert_name(category), category)
            if first != category:
                raise ValueError(
                    f"Expected categories with different names, but {first!r} and {category!r} both give an expert "
                    f"called {expert_name(category)!r}. Rename one."
                )
        return tuple(named)

    def initial_weights(
        self, names: tuple[str, ...], path: str, layer: nn.Linear
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the start of every expert at one layer as in PEFT: A Kaiming uniform (a = sqrt 5), B zero; float32.

        A is drawn from the run's seed, the expert's name and the path: an expert starts the same whether it is trained
        alone or in a library.

        Args:
            names: the experts.
            path: module path of the layer.
            layer: the linear layer itself, for its widths.

        Returns:
            Expert name to A (r, in) and to B (out, r).

        Raises:
            ValueError: for a rank above both widths of the layer, which no matrix of that shape has.
        """
        widest = max(layer.in_features, layer.out_features)
        if self.rank > widest:
            raise ValueError(
                f"Expected new_experts.rank to be at most {widest}, the wider side of {path}, but got {self.rank}."
            )
        lora_A: dict[str, Tensor] = {}
        for name in names:
            if self.share_A and lora_A:
                lora_A[name] = next(iter(lora_A.values()))
                continue
            generator = generator_for("shared" if self.share_A else name, path)
            weight = torch.empty(self.rank, layer.in_features, dtype=torch.float32)
            lora_A[name] = nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        lora_B = {name: torch.zeros(layer.out_features, self.rank, dtype=torch.float32) for name in names}
        return lora_A, lora_B


def expert_name(category: str) -> str:
    """Return the name of a category's expert, which is also that of its folder.

    Example:
        >>> expert_name("reading comp./QA")
        'reading_comp__QA'
    """
    return re.sub(r"[^A-Za-z0-9_-]", "_", category)
