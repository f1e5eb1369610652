"""A gated network as lm-evaluation-harness sees a model (layer 6; needs the extra ``harness``)."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from radargate_pl.chat_template import dated_template
from radargate_pl.decoder_start import decoder_inputs, first_ids
from radargate_pl.greedy import with_plain_greedy
from radargate_pl.networks import GatedNetwork


class GatedHFLM(HFLM):
    """The harness's own wrapper of a transformers model, with what gates and decoders must know before every batch.

    Args:
        network: the network; its experts and gates sit inside its backbone.
        expert: id of the expert that answers everything under TaskGate; None for other gates.
        batch_size: examples a batch, or "auto".
    """

    def __init__(self, network: GatedNetwork, expert: int | None, batch_size: int | str) -> None:
        self.network, self.expert = network, expert
        backend = "seq2seq" if network.is_encoder_decoder else "causal"
        template = dated_template(network.tokenizer, network.prompt_date)
        super().__init__(
            network.backbone,
            backend,
            tokenizer=network.tokenizer,
            batch_size=batch_size,
            # The day of the fit, not the clock's.
            chat_template_args=None if template is None else {"chat_template": template},
        )

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with self._known(len(inps)):
            if labels is None:
                return super()._model_call(inps)
            start = self.network.start_ids
            inputs = decoder_inputs(labels, start, int(self.tokenizer.pad_token_id))
            with torch.no_grad():
                logits = self.model(
                    input_ids=inps, attention_mask=attn_mask, decoder_input_ids=inputs.input_ids, use_cache=False
                ).logits
        return logits[:, len(start) - 1 :]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        rows = len(context)
        options = dict(generation_kwargs)
        if options.get("do_sample") is None and not options.get("temperature"):  # as the harness: greedy
            options["do_sample"] = False
        start = self.network.start_ids
        if start:
            context, options["attention_mask"] = padded_on_the_right(context, options["attention_mask"])
        options = {**first_ids(start, context), **with_plain_greedy(options)}
        with self._known(rows):
            return super()._model_generate(context, max_length, stop, **options)[:, len(start) :]

    def _known(self, rows: int) -> AbstractContextManager[None]:
        """Say whose batch the block is about."""
        expert = None if self.expert is None else torch.full((rows,), self.expert, device=self.device)
        return self.network.context.batch(expert)


def padded_on_the_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding behind the tokens: an encoder counts its positions from the left, and the harness pads there.

    Args:
        ids: (examples, length) int64.
        mask: 1 for real tokens, (examples, length) int64.

    Example:
        >>> padded_on_the_right(torch.tensor([[0, 7, 8]]), torch.tensor([[0, 1, 1]]))[0].tolist()
        [[7, 8, 0]]
    """
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)
