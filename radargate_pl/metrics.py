"""Per-task loss and exact match of teacher-forced answers: a function per example, a metric that pools them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from radargate_pl.losses import token_cross_entropy


class ExampleScores(NamedTuple):
    """What one forward says about each example of a batch.

    Attributes:
        loss_sum: summed cross-entropy over the answer tokens in nats, (B,) float64.
        tokens: number of answer tokens, end token included, (B,) int64.
        exact: whether every answer token is the argmax at its position, (B,) bool.
    """

    loss_sum: Tensor
    tokens: Tensor
    exact: Tensor


@dataclass(frozen=True)
class TaskScore:
    """The scores of one task over a whole evaluation.

    Attributes:
        loss: mean cross-entropy over all answer tokens of the task, in nats.
        exact_match: share of examples answered exactly, in [0, 1].
        n: number of examples.
    """

    loss: float
    exact_match: float
    n: int


def score_examples(
    logits: Tensor, targets: Tensor, example: Tensor, num_examples: int, ends: Sequence[int] = ()
) -> ExampleScores:
    """Score each example of a batch from the logits at its labelled positions.

    ``exact_i = all_t argmax(logits_t) == target_t`` over the answer tokens t of example i. Greedy decoding reproduces
    the target (end token included) iff this holds, by induction over positions, so no generation is needed. Where a
    generation stops at several tokens, each of them is right where the target is one of them.

    Args:
        logits: labelled positions only, (N, V), any float dtype.
        targets: (N,) int64.
        example: row of the batch each position belongs to, (N,) int64 in [0, num_examples).
        num_examples: rows in the batch, B; a row without answer tokens counts as not exact.
        ends: ids at which a generation stops.

    Returns:
        The scores of the B rows.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
        >>> score_examples(logits, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).exact
        tensor([ True, False])
    """
    losses = token_cross_entropy(logits, targets).double()
    likeliest = logits.argmax(dim=-1)
    is_right = likeliest == targets
    if len(ends) > 1:
        stops = torch.tensor(ends, device=targets.device)
        is_right |= torch.isin(targets, stops) & torch.isin(likeliest, stops)
    hits = is_right.long()
    zeros = torch.zeros(num_examples, dtype=torch.int64, device=logits.device)
    tokens = zeros.index_add(0, example, torch.ones_like(hits))
    right = zeros.index_add(0, example, hits)
    return ExampleScores(zeros.double().index_add(0, example, losses), tokens, (right == tokens) & (tokens > 0))


class TaskScores(Metric):
    """Loss and exact match per task, exact over batches and ranks.

    The loss of a task pools its tokens, ``sum of cross-entropies / number of tokens``; exact match is the mean over its
    examples. States are sums sized by the number of tasks, so ranks add up whatever share each of them saw.

    Args:
        num_tasks: number of tasks T; ``task`` indices lie in [0, T).
    """

    full_state_update = False
    loss_sum: Tensor
    tokens: Tensor
    exact: Tensor
    examples: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros(num_tasks, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tokens", "exact", "examples"):
            self.add_state(name, torch.zeros(num_tasks, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: ExampleScores, task: Tensor) -> None:
        """Add one batch.

        Args:
            scores: the scores of the batch's B examples.
            task: task index of each example, (B,) int64.
        """
        self.loss_sum.index_add_(0, task, scores.loss_sum)
        self.tokens.index_add_(0, task, scores.tokens)
        self.exact.index_add_(0, task, scores.exact.long())
        self.examples.index_add_(0, task, torch.ones_like(task))

    def compute(self) -> dict[str, Tensor]:
        """Scores of every task; NaN where a task has seen no example.

        Returns:
            ``loss`` and ``exact_match``, (T,) float64, and ``n``, (T,) int64.
        """
        return {
            "loss": self.loss_sum / self.tokens,
            "exact_match": self.exact / self.examples.double(),
            "n": self.examples.clone(),
        }

    def results(self, names: Sequence[str]) -> dict[str, TaskScore]:
        """Scores by task name, over all ranks; tasks without examples are left out.

        Args:
            names: name of each task, in index order.
        """
        # torchmetrics hands a single task's (1,) out as a scalar
        loss, exact, n = (scores.reshape(-1).tolist() for scores in self.compute().values())
        rows = zip(names, loss, exact, n, strict=True)
        return {name: TaskScore(*scores) for name, *scores in rows if scores[-1]}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        # Lightning casts the whole module under bf16-true, and torchmetrics guards .bfloat16() but not .to(bfloat16):
        # sums of losses in bf16 stop growing after 256 tokens. Only the device may change.
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)


def mean_over_tasks(results: dict[str, TaskScore]) -> TaskScore:
    """The plain mean over tasks of loss and exact match: each task counts once, however many examples it has.

    Args:
        results: scores by task name, at least one.

    Returns:
        The means; ``n`` is the total number of examples.
    """
    assert results, "mean over no tasks"
    scores = list(results.values())
    return TaskScore(
        loss=sum(score.loss for score in scores) / len(scores),
        exact_match=sum(score.exact_match for score in scores) / len(scores),
        n=sum(score.n for score in scores),
    )


def named_scores(stage: str, results: dict[str, TaskScore]) -> dict[str, float]:
    """Scores under the names they are logged by: ``<stage>/loss`` for the mean, ``<stage>/<task>/loss`` for each task.

    Args:
        stage: ``val`` or ``test``.
        results: scores by task name; without any there is nothing to log.
    """
    if not results:
        return {}
    mean = mean_over_tasks(results)
    values = {f"{stage}/loss": mean.loss, f"{stage}/exact_match": mean.exact_match}
    for task, score in results.items():
        values |= {f"{stage}/{task}/loss": score.loss, f"{stage}/{task}/exact_match": score.exact_match}
    return values
