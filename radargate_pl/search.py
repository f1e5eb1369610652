"""LoraHub's search without gradients, as an optimiser in Lightning's own loop (layer 5)."""

import math
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from radargate_pl.gates import LoraHub

if TYPE_CHECKING:
    from radargate_pl.module import AdaptedLM

WORST = 1e10  # what a candidate counts whose loss is not finite; nevergrad itself stops at infinity
REMEDY = "See configs/rules/lorahub.yaml."


class NevergradSearch(Optimizer):
    """Searches the weights of `LoraHub`: ``min_w loss(w) + penalty * mean_i |w_i|`` over ``|w_i| <= bound``.

    Every step tries one candidate on the whole batch and leaves the best one so far in the gates. The first candidate
    is w = 0, the bare backbone, so that the result is never worse than it on these examples. LoraHub's code divides the
    loss once more by the number of examples, which makes the penalty's weight depend on it: not done here.

    Args:
        params: the weights of the gates of all layers, which all get the same values.
        budget: candidates in all, by which nevergrad chooses its method; ``trainer.max_steps`` is at most as large.
        bound: largest absolute weight.
        penalty: factor on the mean absolute weight.
        seed: of nevergrad's random numbers.
        algorithm: name of an optimiser of nevergrad.

    Attributes:
        losses: objective of every candidate so far.
        candidates: the weights tried, each (library,).

    Raises:
        ValueError: without nevergrad, for an unknown algorithm or values out of range, for parameters that are no
            weights of LoraHub, and when nevergrad's method fails.

    Source: LoraHub, arXiv 2307.13269, section 3; sail-sg/lorahub, algorithm.py (NGOpt, 40 steps, bounds 1.5, 0.05).
    """

    def __init__(
        self,
        params: Iterable[Any],
        budget: int = 40,
        bound: float = 1.5,
        penalty: float = 0.05,
        seed: int = 42,
        algorithm: str = "NGOpt",
    ) -> None:
        if budget < 1 or not 0 < bound < math.inf or not 0 <= penalty < math.inf:
            raise ValueError(
                "Expected budget of at least 1, bound above 0 and penalty of at least 0, all finite, but got "
                f"budget={budget}, bound={bound}, penalty={penalty}."
            )
        # No step follows a gradient; logs and schedules read a learning rate nevertheless.
        super().__init__(params, {"lr": 0.0})
        self._weights = [weights for group in self.param_groups for weights in group["params"]]
        shapes = {tuple(weights.shape) for weights in self._weights}
        if len(shapes) != 1 or any(weights.dim() != 1 for weights in self._weights):
            raise ValueError(
                "Expected NevergradSearch to be given the weights of LoraHub, one vector of the same length per layer, "
                f"but got parameters of shapes {sorted(shapes)}. Use the gate LoraHub and train: gate. {REMEDY}"
            )
        self.budget, self.bound, self.penalty, self.seed, self.algorithm = budget, bound, penalty, seed, algorithm
        self._restart()

    def _restart(self) -> None:
        self.losses: list[float] = []
        self.candidates: list[Tensor] = []
        self._method = _method(len(self._weights[0]), self.budget, self.bound, self.seed, self.algorithm)
        self._pending: Any = None  # a proposal of nevergrad's that waits behind w = 0

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Try one candidate, then leave the best one so far in the gates.

        Args:
            closure: computes the loss of the whole batch, a scalar.

        Returns:
            The candidate's loss.

        Raises:
            ValueError: without a closure, or when the budget is used up.
        """
        if closure is None:
            raise ValueError("Expected a closure that computes the loss: use a trainer.precision other than 16-mixed.")
        if len(self.losses) == self.budget:
            raise ValueError(
                f"Expected at most budget={self.budget} steps, but got one more. Lower trainer.max_steps, or start a "
                "search with a larger budget."
            )
        weights, proposal = self._propose()
        self._write(weights)
        with torch.no_grad():
            loss = closure()
        objective = float(loss) + self.penalty * float(weights.abs().mean())
        self._tell(weights, proposal, objective if math.isfinite(objective) else WORST)
        self._write(self.best[0])
        return loss

    @property
    def best(self) -> tuple[Tensor, float]:
        """The best weights so far, (library,) float64, and their objective; the first of equals."""
        index = min(range(len(self.losses)), key=self.losses.__getitem__)
        return self.candidates[index], self.losses[index]

    def _propose(self) -> tuple[Tensor, Any]:
        try:
            proposal = _ask(self._method) if self._pending is None else self._pending
        except Exception as error:  # whatever a method of nevergrad's raises, e.g. for the installed numpy
            raise ValueError(
                f"Expected nevergrad's {self.algorithm} to propose candidate {len(self.losses) + 1} of {self.budget}, "
                f"but it failed: {error}. Choose another algorithm, for example OnePlusOne, or a smaller budget."
            ) from error
        self._pending = None
        weights = torch.tensor(proposal.value, dtype=torch.float64)
        if not self.losses and weights.any():  # most methods begin at 0 themselves
            self._pending = proposal
            return torch.zeros_like(weights), None
        return weights, proposal

    def _tell(self, weights: Tensor, proposal: Any, objective: float) -> None:
        if proposal is not None:
            self._method.tell(proposal, objective)
        self.candidates.append(weights)
        self.losses.append(objective)

    @torch.no_grad()
    def _write(self, weights: Tensor) -> None:
        for parameter in self._weights:
            parameter.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been tried, as tensors: ``losses`` (steps,) and ``candidates`` (steps, library), float64."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        candidates = torch.stack(self.candidates) if self.candidates else torch.empty(0, len(self._weights[0]))
        return super().state_dict() | {"losses": losses, "candidates": candidates.double()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go through the same candidates again, without evaluating them: nevergrad's own state is never stored.

        Raises:
            ValueError: when nevergrad now proposes others.
        """
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self._restart()
        for tried, objective in zip(state_dict["candidates"].cpu(), state_dict["losses"].tolist(), strict=True):
            weights, proposal = self._propose()
            if not torch.equal(weights, tried):
                raise ValueError(
                    f"Expected nevergrad to propose candidate {len(self.losses) + 1} of the checkpoint again, but it "
                    "proposes another. Resume with the budget, bound, seed and algorithm, and the versions of "
                    "nevergrad and scipy, that the search began with; or start a new one without --ckpt_path."
                )
            self._tell(weights, proposal, objective)


def _method(count: int, budget: int, bound: float, seed: int, algorithm: str) -> Any:
    try:
        import nevergrad
    except ImportError as error:
        raise ValueError(
            "Expected the package nevergrad for NevergradSearch, but it is not installed. "
            "Run: pip install 'radargate-pl[search]'"
        ) from error
    if algorithm not in nevergrad.optimizers.registry:
        raise ValueError(
            f"Expected algorithm to be an optimiser of nevergrad (NGOpt, Cobyla, OnePlusOne, CMA, ...), but got "
            f"{algorithm!r}."
        )
    # NGOpt hands small budgets to scipy's COBYLA with settings that scipy corrects, and says so, at every start.
    warnings.filterwarnings("ignore", message="COBYLA: ")
    array = nevergrad.p.Array(init=[0.0] * count, lower=-bound, upper=bound)
    array.random_state.seed(seed)
    return nevergrad.optimizers.registry[algorithm](parametrization=array, budget=budget, num_workers=1)


def _ask(method: Any) -> Any:
    """Ask from a daemon thread, which the threads that nevergrad starts for scipy's methods inherit.

    Such a thread waits for the next loss for ever: a search that ends before its budget would keep the process from
    ending.
    """
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(method.ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer.result()


def check_search(lm: "AdaptedLM") -> None:
    """Refuse, before the first step, what would make a search silently do nothing or something else.

    Args:
        lm: about to train.

    Raises:
        ValueError: when the gate is searched and the optimiser no search, or the other way round; when a step does not
            see all examples at once; when there are more steps than the budget has; for settings that shape gradients.
    """
    trainer, optimizer = lm.trainer, lm.trainer.optimizers[0]
    gates = {type(layer.gate) for layer in lm.built_network.layers.values()}
    if isinstance(optimizer, NevergradSearch) is not (gates == {LoraHub}):
        raise ValueError(
            "Expected the gate LoraHub and the optimiser radargate_pl.search.NevergradSearch together, but got "
            f"{lm.built_network.describe()} and {type(optimizer).__name__}. {REMEDY}"
        )
    if isinstance(optimizer, NevergradSearch):
        _check_followed(lm)
        _check_steps(trainer, optimizer.budget)


def _check_followed(lm: "AdaptedLM") -> None:
    """Refuse settings for gradients, which a search does not have."""
    found = {
        "model.lr_multipliers": lm.lr_multipliers,
        "model.lr_scheduler": lm.lr_scheduler_factory,
        "trainer.gradient_clip_val": lm.trainer.gradient_clip_val,
    }
    without_effect = [name for name, value in found.items() if value]
    if without_effect:
        raise ValueError(f"Expected a search without {without_effect}, which shape gradient steps. Leave them out.")


def _check_steps(trainer: Trainer, budget: int) -> None:
    steps = trainer.max_steps if trainer.max_steps >= 0 else trainer.estimated_stepping_batches
    if steps > budget:
        raise ValueError(
            f"Expected at most budget={budget} steps, but the trainer takes {steps}. Lower trainer.max_steps."
        )
    found = {
        "batches an epoch": trainer.num_training_batches,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "processes": trainer.world_size,
    }
    if set(found.values()) != {1}:
        raise ValueError(
            "Expected a search to see all its examples in every step (1 batch, 1 micro-batch, 1 process), but got "
            f"{found}. Lower data.init_args.max_examples or raise data.init_args.batch_size. {REMEDY}"
        )
    examples = len(getattr(trainer.train_dataloader, "sampler", ()))
    batch_size = getattr(trainer.datamodule, "batch_size", examples)  # type: ignore[attr-defined]
    if 0 < examples < batch_size:  # the loss counts a smaller batch for less
        raise ValueError(
            f"Expected data.init_args.batch_size to be the number of examples, {examples}, but got {batch_size}."
        )
