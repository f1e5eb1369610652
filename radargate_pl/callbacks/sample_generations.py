"""A few answers in the model's own words, in TensorBoard's text tab."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from radargate_pl.losses import IGNORE_INDEX


class Sample(NamedTuple):
    """One validation example to answer.

    Attributes:
        prompt: token ids without padding, (S,) int64.
        task: task index.
        references: accepted answers.
    """

    prompt: Tensor
    task: int
    references: list[str]


class SampleGenerations(Callback):
    """Answers the first validation example of each of a few tasks greedily and logs prompt, answer and reference.

    The texts go to every logger with a text tab (TensorBoard), as ``samples/<task>``, after each validation of a fit;
    nothing is printed.

    Args:
        num_samples: number of tasks answered, one example each.
    """

    def __init__(self, num_samples: int = 4) -> None:
        if num_samples < 1:
            raise ValueError(f"Expected num_samples to be at least 1, but got {num_samples}")
        self.num_samples = num_samples
        self._samples: dict[int, Sample] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin with no samples."""
        self._samples = {}

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Pick the first example of each task until there are enough."""
        if len(self._samples) == self.num_samples or not self._is_wanted(trainer):
            return
        for row, task in enumerate(batch["task"].tolist()):
            if task not in self._samples and len(self._samples) < self.num_samples:
                prompt = prompt_tokens(batch, row, pl_module.network.is_encoder_decoder)
                self._samples[task] = Sample(prompt, task, batch["references"][row])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Answer the samples and log them."""
        samples = list(self._samples.values())
        if not samples:
            return
        network: Any = pl_module.network
        side = "right" if network.is_encoder_decoder else "left"
        input_ids, attention_mask = pad_prompts([s.prompt for s in samples], network.tokenizer.pad_token_id, side)
        task = torch.tensor([sample.task for sample in samples], device=input_ids.device)
        answers = pl_module.generate(input_ids, attention_mask, task)
        for sample, answer in zip(samples, answers, strict=True):
            name = pl_module.task_names[sample.task]
            text = _as_markdown(network.tokenizer.decode(sample.prompt), answer, sample.references)
            for logger in _text_loggers(trainer):
                logger.experiment.add_text(f"samples/{name}", text, global_step=trainer.global_step)

    def _is_wanted(self, trainer: Trainer) -> bool:
        is_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        return is_fit and trainer.is_global_zero and bool(_text_loggers(trainer))


def prompt_tokens(batch: dict[str, Any], row: int, is_encoder_decoder: bool) -> Tensor:
    """The prompt of one example: its real tokens before the first label; all of them for an encoder.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``labels``, (B, S) int64.
        row: which example.
        is_encoder_decoder: whether labels are a sequence of their own.

    Returns:
        (S',) int64.
    """
    real = batch["attention_mask"][row].bool()
    if not is_encoder_decoder:
        answered = (batch["labels"][row] != IGNORE_INDEX).cumsum(0) > 0
        real = real & ~answered
    return batch["input_ids"][row][real]


def pad_prompts(prompts: list[Tensor], pad_token_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Pad prompts to one length.

    Args:
        prompts: token ids, (S_i,) int64 each.
        pad_token_id: fills the gaps.
        side: ``left`` (decoders: generation goes on from the last position) or ``right``.

    Returns:
        ``input_ids`` and ``attention_mask``, (B, S) int64.

    Example:
        >>> pad_prompts([torch.tensor([5]), torch.tensor([6, 7])], 0, "left")[0].tolist()
        [[0, 5], [6, 7]]
    """
    input_ids = torch.nn.utils.rnn.pad_sequence(prompts, True, pad_token_id, padding_side=side)
    ones = [torch.ones_like(prompt) for prompt in prompts]
    return input_ids, torch.nn.utils.rnn.pad_sequence(ones, True, 0, padding_side=side)


def _text_loggers(trainer: Trainer) -> list[Any]:
    loggers: list[Any] = trainer.loggers
    return [logger for logger in loggers if hasattr(logger.experiment, "add_text")]


def _as_markdown(prompt: str, answer: str, references: list[str]) -> str:
    """Four spaces make a code block in the text tab: white space and markup of the model are shown as they are."""
    parts = {"prompt": prompt, "answer": answer, "reference": " | ".join(references)}
    return "\n\n".join(f"**{name}**\n\n    " + text.replace("\n", "\n    ") for name, text in parts.items())
