"""What the decoder of an encoder-decoder model reads: its first tokens, then the targets one position later (layer 3).

The same ids in training, scoring and generation, so that teacher-forced exact match says what greedy decoding answers.
transformers' own shifts differ from model to model: mBART's takes a row's last label for its first token, M2M-100 has
none, and a forced first token is a rule of generation alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from radargate_pl.losses import IGNORE_INDEX


class DecoderInputs(NamedTuple):
    """Targets as the decoder sees them.

    Attributes:
        input_ids: the first tokens, then the targets but for the last, (examples, start + length - 1) int64.
        targets: what is predicted at each of these positions, IGNORE_INDEX for nothing, same shape.
        tokens: which positions are real, same shape, bool.
    """

    input_ids: Tensor
    targets: Tensor
    tokens: Tensor


def start_ids(model: PreTrainedModel, tokenizer: Any, words: Sequence[str]) -> tuple[int, ...]:
    """Return the ids every answer of an encoder-decoder model begins behind, and let ``generate`` begin with them too.

    Args:
        model: the backbone; where the answer begins and ends is written into its ``generation_config``.
        tokenizer: of the backbone; its end token ends an answer, as in training.
        words: tokens by name, as "<2en>" (IndicBART) or ["</s>", "de_DE"] (mBART-50); without any those the model's own
            configuration names: its start token, and the first token it forces.

    Raises:
        ValueError: for a word that is no single token, and where neither the user nor the model says what comes first.
    """
    if not model.config.is_encoder_decoder:
        if words:
            raise ValueError(f"Expected decoder_start for an encoder-decoder backbone only, but got {list(words)}.")
        return ()
    settings: Any = model.generation_config
    start = tuple(_id_of(word, tokenizer) for word in words) or _own_start(model)
    settings.decoder_start_token_id = start[0]
    settings.eos_token_id = tokenizer.eos_token_id
    settings.forced_bos_token_id = None  # `start` holds it
    return start


def decoder_inputs(labels: Tensor, start: Sequence[int], pad_token_id: int) -> DecoderInputs:
    """Put the first tokens before the targets, and shift.

    Args:
        labels: (examples, length) int64, IGNORE_INDEX where nothing is to be predicted.
        start: ids of the first tokens, at least one.
        pad_token_id: read where there is no target.

    Example:
        >>> decoder_inputs(torch.tensor([[5, 6, 2], [7, 2, -100]]), (2, 9), 0).input_ids.tolist()
        [[2, 9, 5, 6], [2, 9, 7, 2]]
    """
    first = torch.tensor(start, device=labels.device).expand(labels.shape[0], -1)
    before = labels[:, :-1]
    targets = F.pad(labels, (len(start) - 1, 0), value=IGNORE_INDEX)
    tokens = F.pad(labels != IGNORE_INDEX, (len(start) - 1, 0), value=True)
    return DecoderInputs(torch.cat([first, before.where(before != IGNORE_INDEX, pad_token_id)], 1), targets, tokens)


def first_ids(start: Sequence[int], input_ids: Tensor) -> dict[str, Tensor]:
    """What ``generate`` is given for the decoder to begin with.

    Args:
        start: ids of the first tokens; none for a causal model.
        input_ids: the prompts, (examples, length) int64.
    """
    if not start:
        return {}
    return {"decoder_input_ids": torch.tensor(start, device=input_ids.device).repeat(input_ids.shape[0], 1)}


def _id_of(word: str, tokenizer: Any) -> int:
    number = tokenizer.convert_tokens_to_ids(word)
    if number is None or (number == tokenizer.unk_token_id and word != tokenizer.unk_token):
        known = ", ".join(tokenizer.all_special_tokens[:12])
        raise ValueError(
            f"Expected decoder_start to name single tokens of the backbone's tokenizer, but {word!r} is none. Its "
            f"special tokens are {known}."
        )
    return int(number)


def _own_start(model: PreTrainedModel) -> tuple[int, ...]:
    found = [_setting(model, name) for name in ("decoder_start_token_id", "forced_bos_token_id")]
    if found[0] is None:
        raise ValueError(
            f"Expected decoder_start, the tokens an answer begins behind, since the configuration of this "
            f"{type(model).__name__} has no decoder_start_token_id. It is a language's token in multilingual models, "
            "e.g. decoder_start: [<2en>] for IndicBART, ['</s>', de_DE] for mBART-50."
        )
    return tuple(number for number in found if number is not None)


def _setting(model: PreTrainedModel, name: str) -> int | None:
    for settings in (model.generation_config, model.config):
        value = getattr(settings, name, None)
        if value is not None:
            return int(value[0] if isinstance(value, list | tuple) else value)
    return None
