"""What the steps of the LightningModule hand on (layer 5)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from torch import Tensor

from radargate_pl.metrics import ExampleScores
from radargate_pl.networks import LabelledLogits
from radargate_pl.records import GateOutput

# (stage, finished optimiser steps) -> whether that batch's gates are wanted; stages are train, val and test.
WantsGates = Callable[[str, int], bool]


class StepOutput(NamedTuple):
    """What the shared step hands to training, validation and test.

    Attributes:
        labelled: logits at the labelled positions.
        loss: mean over the batch's examples, in nats, scalar.
        gates: layer path -> what its gate did, without the graph; ``None`` when nobody asked.
        auxiliary: name of each auxiliary loss -> its value with the graph, without its factor; training only.
    """

    labelled: LabelledLogits
    loss: Tensor
    gates: dict[str, GateOutput] | None
    auxiliary: dict[str, Tensor]


class EvaluationOutput(TypedDict):
    """What callbacks get after a validation or test batch.

    Attributes:
        gates: as in `StepOutput`.
        scores: of the batch's examples, in its order.
    """

    gates: dict[str, GateOutput] | None
    scores: ExampleScores


class Prediction(TypedDict):
    """One generated answer.

    Attributes:
        id: of the record.
        task: its name.
        prediction: the generated text.
        references: accepted answers.
    """

    id: str
    task: str
    prediction: str
    references: list[str]


@dataclass
class StepRequests:
    """What is to happen once the optimiser step under way is done.

    Attributes:
        save: write a checkpoint.
        stop: write a checkpoint and end the process, to be started again.
    """

    save: bool = False
    stop: bool = False


@dataclass(frozen=True)
class CompletedStep:
    """The optimiser step that the latest batch completed; batches that only accumulate gradients complete none.

    Attributes:
        step: its number, from 1, equal to ``trainer.global_step`` after it.
        loss: mean over the examples of all its micro-batches and ranks, in nats, scalar float64.
        learning_rate: that of the first parameter group.
        requests: what any rank asked for; the same on all of them.
    """

    step: int
    loss: Tensor
    learning_rate: float
    requests: StepRequests
