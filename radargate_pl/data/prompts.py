"""Renders records as prompt and answer, and encodes them as token ids with the answer always whole."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from radargate_pl.chat_template import check_shows_question, checked_date, end_token, prints_date, render_prompt
from radargate_pl.data.cache import Encoded, joined, pack
from radargate_pl.data.control_text import say_control_text, say_doubled
from radargate_pl.data.records import BadRecords, Record
from radargate_pl.data.token_ids import GAP, answer_ids, bounded, prompt_ids, without_middle

PIECE = 1000  # records that are tokenised together: the tokenizer needs 100 bytes a token, of which 4 are kept
SOURCE = "{source}"


def answer_text(record: Record, target: Literal["answer", "rationale"]) -> str:
    """The text that is trained on: the first target, or the rationale, a line break and `Therefore, the answer is`."""
    if target == "answer":
        return record.targets[0]
    return f"{record.rationale}\nTherefore, the answer is {record.targets[0]}."


def check_prompt(prompt: str) -> None:
    """Refuse what is no prompt format.

    Args:
        prompt: See PromptFormat.

    Raises:
        ValueError: If it is neither `chat` nor `plain` nor has the source in it.
    """
    if prompt not in ("chat", "plain") and SOURCE not in prompt:
        raise ValueError(f"Expected prompt to be chat, plain or a template with {SOURCE} in it, but got {prompt!r}.")


@dataclass(frozen=True)
class PromptFormat:
    """How a source becomes a prompt.

    `chat` is the tokenizer's chat template with the source as the user's turn; a tokenizer without one gets `plain`:
    the source and a line break (decoder-only) or the source alone (encoder-decoder). Anything else is a template of
    the user's own with `{source}` in it.

    Args:
        prompt: `chat`, `plain` or a template.
        tokenizer: A Hugging Face tokenizer.
        is_encoder_decoder: Whether the answer has a sequence of its own.
        date: The day a chat template prints, as 2026-11-30; today's for None.
    """

    prompt: str
    tokenizer: Any
    is_encoder_decoder: bool = False
    date: str | None = None

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        object.__setattr__(self, "date", checked_date(self.date))  # one day for every prompt, also after midnight
        if self.uses_chat_template:
            check_shows_question(self.tokenizer)

    @property
    def uses_chat_template(self) -> bool:
        """Whether prompts come from the tokenizer's chat template."""
        return self.prompt == "chat" and bool(self.tokenizer.chat_template)

    @property
    def prints_date(self) -> bool:
        """Whether the prompts say which day it is."""
        return self.uses_chat_template and prints_date(self.tokenizer)

    def render(self, source: str) -> str:
        """The prompt of `source` as text."""
        if self.uses_chat_template:
            return render_prompt(self.tokenizer, source, str(self.date))
        if self.prompt in ("chat", "plain"):
            return source if self.is_encoder_decoder else source + "\n"
        # Not str.format: sources and templates may hold other braces.
        return self.prompt.replace(SOURCE, source)


class EncodedPrompt(NamedTuple):
    """A prompt as token ids and as text, and whether its source lost its middle."""

    ids: list[int]
    text: str
    truncated: bool


class RecordEncoder:
    """Encodes records as prompt ids and answer ids.

    Prompt and answer are tokenised apart, as generation does, so the border between them is exact. The answer ends
    with one token (`end`). Where both do not fit into `max_length`, the source loses its middle, the answer never.

    Args:
        tokenizer: A Hugging Face tokenizer with an end token.
        prompt: See PromptFormat.
        target: `answer` or `rationale`.
        max_length: Tokens of prompt and answer together; of each of the two for an encoder-decoder backbone.
        is_encoder_decoder: Whether the backbone is one.
        special_tokens: Whether prompts get the tokenizer's own special tokens. A chat template writes them itself;
            false where a template of the user's own does.
        date: The day a chat template prints, as 2026-11-30; today's for None.
        answer_end: `template` closes an answer with what the chat template closes a turn with, where prompts are
            rendered by one; `eos` with the tokenizer's end token always.

    Attributes:
        end: Id of the token that closes an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: str = "chat",
        target: Literal["answer", "rationale"] = "answer",
        max_length: int = 512,
        is_encoder_decoder: bool = False,
        special_tokens: bool = True,
        date: str | None = None,
        answer_end: Literal["template", "eos"] = "template",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("Expected the tokenizer to have an end token (eos_token), but it has none.")
        if target not in ("answer", "rationale"):
            raise ValueError(f"Expected target to be answer or rationale, but got {target!r}.")
        self.tokenizer = tokenizer
        self.format = PromptFormat(prompt, tokenizer, is_encoder_decoder, date)
        self.end = end_token(tokenizer, self.format.uses_chat_template and answer_end == "template")
        self.target = target
        self.max_length = max_length
        self.is_encoder_decoder = is_encoder_decoder
        self.special_tokens = special_tokens and not self.format.uses_chat_template
        if self.special_tokens:
            say_doubled(tokenizer, self._prompt_ids([self.format.render("")])[0], is_encoder_decoder)

    def answer_end(self) -> str:
        """The token that closes an answer, as text."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end))

    def prompt_date(self) -> str | None:
        """The day that prompts are dated, or None where the chat template prints none."""
        return self.format.date if self.format.prints_date else None

    def key(self) -> str:
        """Hash of everything but the records that token ids depend on."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        parts = [words, tokenizer.chat_template, self.end, type(tokenizer).__name__]
        parts += [repr(sorted(tokenizer.init_kwargs.items(), key=str)) if backend is None else ""]
        parts += [self.format.prompt, self.target, self.max_length, self.is_encoder_decoder, self.special_tokens, GAP]
        # What the template makes of a source: the day, and tokens that it prints by name, are not in its text.
        if self.format.uses_chat_template:
            parts += [self.format.render(""), sorted(tokenizer.special_tokens_map.items())]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def encode(self, records: Sequence[Record], task: str, bad_records: BadRecords) -> Encoded:
        """Encode records; those whose answer leaves no room go to `bad_records`.

        Args:
            records: Records of one task and split.
            task: The task's name, for messages.
            bad_records: Receives what cannot be encoded.
        """
        pieces = range(0, len(records), PIECE)
        return joined([self._encode_piece(records[i : i + PIECE], i, task, bad_records) for i in pieces])

    def _encode_piece(self, records: Sequence[Record], first: int, task: str, bad_records: BadRecords) -> Encoded:
        sources = [bounded(record.source, self.max_length) for record in records]
        texts = self.answer_texts(records)
        prompts = self._prompt_ids([self.format.render(source) for source in sources])
        answers = self._answer_ids([bounded(text, self.max_length) for text in texts])
        kept: list[int] = []
        truncated: list[bool] = []
        for number, record in enumerate(records):
            room = self.max_length - (0 if self.is_encoder_decoder else len(answers[number]))
            fits = len(prompts[number]) <= room and sources[number] is record.source
            if not fits:
                prompts[number] = self._shortened(sources[number], room)[0]
            if not prompts[number] or len(answers[number]) > self.max_length:
                bad_records.add(task, record.where, self._too_long(len(answers[number])))
                continue
            if self.end in answers[number][:-1]:
                bad_records.add(task, record.where, self._ends_early())
                continue
            kept.append(first + number)
            truncated.append(not fits)
        places = [i - first for i in kept]
        return pack([prompts[i] for i in places], [answers[i] for i in places], kept, truncated)

    def prompt(self, source: str) -> EncodedPrompt:
        """The prompt of a source whose answer is not known; a causal model's leaves room for an end token.

        Args:
            source: The question; a source too long for `max_length` loses its middle. No ids where even that fails.
        """
        room = self.max_length - (0 if self.is_encoder_decoder else 1)
        whole, source = source, bounded(source, self.max_length)
        text = self.format.render(source)
        ids = self._prompt_ids([text])[0]
        fits = len(ids) <= room and source is whole
        return EncodedPrompt(ids, text, False) if fits else EncodedPrompt(*self._shortened(source, room), True)

    def _shortened(self, source: str, room: int) -> tuple[list[int], str]:
        """The prompt with as much of `source` as fits into `room` tokens; empty if none does."""

        def prompt(text: str) -> list[int]:
            return self._prompt_ids([self.format.render(text)])[0]

        text = without_middle(source, lambda shorter: len(prompt(shorter)) <= room)
        return ([], "") if text is None else (prompt(text), self.format.render(text))

    def say_control_text(self, records: Sequence[Record], task: str) -> None:
        """Name records whose text holds control tokens: whoever reads a warning knows them, whatever is in the cache.

        Args:
            records: Records of one task.
            task: The task's name.
        """
        places = [record.where for record in records]
        say_control_text(self.tokenizer, [record.source for record in records], places, task, "sources")
        answered = [record for record in records if record.targets]
        texts, places = self.answer_texts(answered), [record.where for record in answered]
        say_control_text(self.tokenizer, texts, places, task, "answers")

    def answer_texts(self, records: Sequence[Record]) -> list[str]:
        """What is trained on, as text.

        Args:
            records: Records with answers.
        """
        return [answer_text(record, self.target) for record in records]

    def _ends_early(self) -> str:
        return f"the answer holds {self.answer_end()!r}, the token that ends answers; write it otherwise"

    def _too_long(self, answer_length: int) -> str:
        if self.is_encoder_decoder:
            return f"the answer has {answer_length} tokens, the context max_length={self.max_length}"
        fixed = len(self._prompt_ids([self.format.render("")])[0])
        return (
            f"the answer has {answer_length} tokens and the prompt without its source {fixed}: together more than "
            f"the context max_length={self.max_length}"
        )

    def _prompt_ids(self, texts: list[str]) -> list[list[int]]:
        return prompt_ids(self.tokenizer, texts, self.special_tokens, self.is_encoder_decoder)

    def _answer_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of the answers alone and the end token: what comes first is the decoder's (`decoder_start`)."""
        return [[*row, self.end] for row in answer_ids(self.tokenizer, texts, self.is_encoder_decoder)]
