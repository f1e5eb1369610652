"""The one LightningModule: trains and evaluates whatever network it is given (layer 5)."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from radargate_pl.auxiliary_terms import AuxiliaryTerms
from radargate_pl.benchmark_step import BenchmarkOutput, answer_batch, is_benchmark
from radargate_pl.checkpoint import restore_network, store_network
from radargate_pl.fit_checks import check_fit, check_trainer
from radargate_pl.generation import checked_length, generate_texts
from radargate_pl.losses import example_mean_cross_entropy
from radargate_pl.metrics import TaskScore, TaskScores, named_scores, score_examples
from radargate_pl.networks import GatedNetwork, LabelledLogits
from radargate_pl.parameter_groups import optimizer_and_schedule
from radargate_pl.search import NevergradSearch
from radargate_pl.step_gradients import StepGradients
from radargate_pl.step_logging import log_step
from radargate_pl.steps import CompletedStep, EvaluationOutput, Prediction, StepOutput, StepRequests, WantsGates
from radargate_pl.strategy import processes_averaged_over


class AdaptedLM(LightningModule):
    """A frozen language model with experts and gates: one step for training, validation and test.

    The loss is the mean over examples of the mean cross-entropy over that example's answer tokens, exact over ranks and
    accumulation steps, also when their last batches are smaller. While experts train under TaskGate each expert's
    gradient is the mean over its own examples and is clipped by itself, so that experts trained together equal experts
    trained alone.

    Args:
        network: makes the network from the tasks' categories, once the data are known.
        optimizer: makes the optimiser from the trainable parameters.
        lr_scheduler: makes a learning rate schedule from the optimiser; it advances with every optimiser step.
        lr_multipliers: part of parameter names ("rotation", "scorer", "lora_A") to the factor on the learning rate of
            the parameters that have it between dots.
        max_new_tokens: longest generated answer in ``predict`` and sample generations, in tokens.
        auxiliary_losses: name to the factor with which it is added to the training loss: load_balancing, gshard,
            mole_balance, z, orthogonality, variance_tokens, variance_experts. Every loss that is reported but for
            ``train/aux/<name>`` (without the factor) is the task's alone.
    """

    def __init__(
        self,
        network: Callable[[Mapping[str, str | None]], GatedNetwork],
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = lambda parameters: torch.optim.AdamW(
            parameters, lr=1e-4, weight_decay=0.0
        ),
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr_multipliers: dict[str, float] = {},  # noqa: B006 (read only; jsonargparse shows it in --help)
        max_new_tokens: int = 64,
        auxiliary_losses: dict[str, float] = {},  # noqa: B006 (read only; jsonargparse shows it in --help)
    ) -> None:
        super().__init__()
        self.network_factory = network
        self.network: GatedNetwork | None = None
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.lr_multipliers = dict(lr_multipliers)
        self.max_new_tokens = checked_length(max_new_tokens)
        self.auxiliary_losses = AuxiliaryTerms(auxiliary_losses)
        # restore_network compares the keys itself; Lightning's own loading finds nothing left to do
        self.strict_loading = False
        self.task_names: tuple[str, ...] = ()
        self.task_results: dict[str, TaskScore] = {}
        self.completed_step: CompletedStep | None = None
        self.requests = StepRequests()  # of this rank, for the end of the step under way
        self.restored_step = 0  # optimiser steps behind the weights of a loaded checkpoint
        self._expert_of_task = torch.empty(0, dtype=torch.int64)
        self._gate_requests: list[WantsGates] = []

    def request_gates(self, wants: WantsGates) -> None:
        """Ask for the gates of some batches: ``outputs["gates"]`` of their steps, detached, by layer path.

        Args:
            wants: called before every batch with the stage (``train``, ``val``, ``test``) and the number of finished
                optimiser steps.
        """
        if wants not in self._gate_requests:  # callbacks ask in setup, which runs once for fit and again for test
            self._gate_requests.append(wants)

    def setup(self, stage: str) -> None:
        """Begin a command: results of the one before are not its own."""
        if stage == "fit":
            check_trainer(self.trainer)
        self.task_results = {}

    def configure_model(self) -> None:
        """Build the network from the data's tasks, once.

        Raises:
            ValueError: if the trainer runs without a LightningDataModule that knows its tasks, or the gates that are to
                train cannot give an auxiliary loss.
        """
        if self.network is not None:
            return
        datamodule = self._datamodule
        if not hasattr(datamodule, "categories"):
            raise ValueError(
                "Expected the trainer to run with a datamodule that has `categories`, but got "
                f"{type(datamodule).__name__}; pass `datamodule=FlanMixture(...)`"
            )
        self.task_names = tuple(datamodule.task_names)
        self.network = self.network_factory(dict(datamodule.categories))
        ids = [self.network.expert_of_task.get(name, -1) for name in self.task_names]
        self._expert_of_task = torch.tensor(ids, dtype=torch.int64)
        self.scores = TaskScores(len(self.task_names))
        if self.trainer.state.fn == "fit":
            self.auxiliary_losses.check(self.network)

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    @property
    def built_network(self) -> GatedNetwork:
        """The network, which exists from ``configure_model`` on."""
        assert self.network is not None, "the network is built in configure_model"
        return self.network

    def expert_ids(self, task: Tensor) -> Tensor:
        """Expert id of each example.

        Args:
            task: task indices, (B,) int64.

        Returns:
            (B,) int64 on the same device, -1 for a task without an expert of its own.
        """
        self._expert_of_task = self._expert_of_task.to(task.device)
        return self._expert_of_task[task]

    def model_step(self, batch: dict[str, Any], stage: str) -> StepOutput:
        """Run one batch: logits at the labelled positions, their loss, and the gates if anyone asked for them.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``labels`` (B, S) and ``task`` (B,), all int64.
            stage: ``train``, ``val`` or ``test``.

        Returns:
            The logits, the loss and, in training, the auxiliary losses with their graph; the gates without.
        """
        network = self.built_network
        is_wanted = any(wants(stage, self.trainer.global_step) for wants in self._gate_requests)
        terms = self.auxiliary_losses if stage == "train" else AuxiliaryTerms({})
        with terms.recording(network, is_wanted) as outputs:
            labelled: LabelledLogits = network(
                batch["input_ids"], batch["attention_mask"], batch["labels"], expert=self.expert_ids(batch["task"])
            )
        loss = example_mean_cross_entropy(*labelled, len(batch["task"]))
        # Lightning passes step outputs on to callbacks as they are, graph included.
        gates = {path: output.detach() for path, output in outputs.items()} if is_wanted else None
        return StepOutput(labelled, loss, gates, terms.values(network, outputs))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """One micro-batch.

        Returns:
            ``loss``: the task's and the auxiliary ones, weighted by the number of examples (by 1 for a full batch),
                which makes accumulation exact; ``gates``.
        """
        self.completed_step = None  # until configure_gradient_clipping says that this batch completes one
        num_examples = len(batch["task"])
        if not num_examples:  # no expert of this process has any
            nothing = torch.zeros((), device=self.device)
            self._step_gradients.add(nothing, 0, self.expert_ids(batch["task"]))
            return {"loss": nothing, "gates": None}
        _, loss, gates, auxiliary = self.model_step(batch, "train")
        factor = self._step_gradients.add(loss, num_examples, self.expert_ids(batch["task"]))
        loss = loss + self.auxiliary_losses.add(auxiliary, num_examples)
        return {"loss": loss * factor, "gates": gates}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, where there are any: a search has none, nor has a batch without any expert's example."""
        is_searched = isinstance(self.trainer.optimizers[0], NevergradSearch)
        if loss.requires_grad or not (self._step_gradients.experts_alone or is_searched):
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> EvaluationOutput:
        """Score one batch; returns its ``gates`` and ``scores``."""
        return self._score(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> EvaluationOutput | BenchmarkOutput:
        """Score one batch; returns its ``gates``, and ``scores`` or the ``rows`` of a benchmark."""
        return answer_batch(self, batch) if "protocol" in batch else self._score(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Prediction]:
        """Answer the prompts of one batch greedily."""
        answers = self.generate(batch["input_ids"], batch["attention_mask"], batch["task"])
        rows = zip(batch["id"], batch["task"].tolist(), answers, batch["references"], strict=True)
        return [Prediction(id=i, task=self.task_names[t], prediction=a, references=list(r)) for i, t, a, r in rows]

    def generate(self, input_ids: Tensor, attention_mask: Tensor, task: Tensor) -> list[str]:
        """Greedy answers as text.

        Args:
            input_ids: left-padded prompts, (B, S) int64.
            attention_mask: (B, S) int64.
            task: task indices, (B,) int64.

        Returns:
            B texts without special tokens and outer white space.
        """
        limit, expert = self.max_new_tokens, self.expert_ids(task)
        written = generate_texts(self.built_network, input_ids, attention_mask, max_new_tokens=limit, expert=expert)
        return [text.strip() for text, _ in written]

    def _score(self, batch: dict[str, Any], stage: str) -> EvaluationOutput:
        step = self.model_step(batch, stage)
        scores = score_examples(*step.labelled, len(batch["task"]), self.built_network.end_ids)
        self.scores.update(scores, batch["task"])
        return EvaluationOutput(gates=step.gates, scores=scores)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of every task and their plain mean."""
        self._finish_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of every task and their plain mean."""
        self._finish_scores("test")

    def _finish_scores(self, stage: str) -> None:
        if is_benchmark(self._datamodule):
            return  # `BenchmarkWriter` has their scores
        self.task_results = self.scores.results(self.task_names)
        self.scores.reset()
        values = named_scores(stage, self.task_results)
        # Already equal on every rank: averaging equal values changes nothing and keeps Lightning from warning.
        self.log_dict({name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Optimiser over what trains, and a schedule that advances with every step; see `optimizer_and_schedule`."""
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        factories = (self.optimizer_factory, self.lr_scheduler_factory)
        return optimizer_and_schedule(trained, *factories, self.lr_multipliers, self.built_network.describe())

    def on_fit_start(self) -> None:
        """Put the network into training mode; its frozen parts stay in eval mode by themselves."""
        self.built_network.train()
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def on_train_start(self) -> None:
        """Start counting examples."""
        check_fit(self)
        self._step_gradients = StepGradients(self.built_network, int(getattr(self._datamodule, "batch_size", 1)))
        self.auxiliary_losses.reset()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Prepare the gradients of the update, see `StepGradients`, and log the step about to be taken.

        Args:
            optimizer: the optimiser about to step.
            gradient_clip_val: the trainer's limit; nothing is clipped without one.
            gradient_clip_algorithm: ``norm`` (default) or ``value``.
        """
        loss, requests = self._step_gradients.finish(
            optimizer,
            self.requests,
            divided_by=self.trainer.accumulate_grad_batches * processes_averaged_over(self.trainer.strategy),
            clip_value=gradient_clip_val,
            clip_algorithm=gradient_clip_algorithm,
        )
        rate = float(optimizer.param_groups[0]["lr"])
        self.completed_step = CompletedStep(self.trainer.global_step + 1, loss, rate, requests)
        self._log_step(self.completed_step, self.auxiliary_losses.finish(self.device))

    def _log_step(self, done: CompletedStep, auxiliary: dict[str, Tensor]) -> None:
        values = {f"train/aux/{name}": value for name, value in auxiliary.items()}
        shown = {"train/loss": done.loss, "train/lr": torch.tensor(done.learning_rate, dtype=torch.float64)}
        # Lightning itself would write the row after the callbacks, too late for a checkpoint of this very step.
        log_step(self.trainer, done.step, {**shown, **values})
        self.log_dict(values, logger=False, batch_size=1)
        self.log_dict(shown, logger=False, prog_bar=True, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """See to a validation after the very last step."""
        if self.completed_step is not None and self.completed_step.step == self.trainer.max_steps:
            # Lightning ends at max_steps without validating, unless an interval falls there; asked to stop, it does.
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains, with the fingerprints of what it belongs to."""
        store_network(checkpoint, self.built_network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what trained, or refuse a checkpoint of another gate, backbone or expert."""
        restore_network(checkpoint, self.built_network, is_resuming=self.trainer.state.fn == "fit")
        self.restored_step = int(checkpoint["global_step"])
