"""Renders records as prompt and answer, and encodes them as token ids with the answer always whole."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from radargate_pl.data.cache import Encoded, pack
from radargate_pl.data.records import BadRecords, Record

GAP = " ... "  # stands for the middle that a long source loses
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
    """

    prompt: str
    tokenizer: Any
    is_encoder_decoder: bool = False

    def __post_init__(self) -> None:
        check_prompt(self.prompt)

    @property
    def uses_chat_template(self) -> bool:
        """Whether prompts come from the tokenizer's chat template."""
        return self.prompt == "chat" and bool(self.tokenizer.chat_template)

    def render(self, source: str) -> str:
        """The prompt of `source` as text."""
        if self.uses_chat_template:
            turns = [{"role": "user", "content": source}]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
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
    with the end token. Where both do not fit into `max_length`, the source loses its middle, the answer never.

    Args:
        tokenizer: A Hugging Face tokenizer with an end token.
        prompt: See PromptFormat.
        target: `answer` or `rationale`.
        max_length: Tokens of prompt and answer together; of each of the two for an encoder-decoder backbone.
        is_encoder_decoder: Whether the backbone is one.
        special_tokens: Whether prompts get the tokenizer's own special tokens. A chat template writes them itself;
            false where a template of the user's own does.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: str = "chat",
        target: Literal["answer", "rationale"] = "answer",
        max_length: int = 512,
        is_encoder_decoder: bool = False,
        special_tokens: bool = True,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("Expected the tokenizer to have an end token (eos_token), but it has none.")
        if target not in ("answer", "rationale"):
            raise ValueError(f"Expected target to be answer or rationale, but got {target!r}.")
        self.tokenizer = tokenizer
        self.format = PromptFormat(prompt, tokenizer, is_encoder_decoder)
        self.target = target
        self.max_length = max_length
        self.is_encoder_decoder = is_encoder_decoder
        self.special_tokens = special_tokens and not self.format.uses_chat_template

    def key(self) -> str:
        """Hash of everything but the records that token ids depend on."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        parts = [words, tokenizer.chat_template, tokenizer.eos_token_id, type(tokenizer).__name__]
        parts += [repr(sorted(tokenizer.init_kwargs.items(), key=str)) if backend is None else ""]
        parts += [self.format.prompt, self.target, self.max_length, self.is_encoder_decoder, self.special_tokens, GAP]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def encode(self, records: Sequence[Record], task: str, bad_records: BadRecords) -> Encoded:
        """Encode records; those whose answer leaves no room go to `bad_records`.

        Args:
            records: Records of one task and split.
            task: The task's name, for messages.
            bad_records: Receives what cannot be encoded.
        """
        prompts = self._prompt_ids([self.format.render(record.source) for record in records])
        answers = self._answer_ids([answer_text(record, self.target) for record in records])
        kept: list[int] = []
        truncated: list[bool] = []
        for number, record in enumerate(records):
            room = self.max_length - (0 if self.is_encoder_decoder else len(answers[number]))
            fits = len(prompts[number]) <= room
            if not fits:
                prompts[number] = self._shortened(record.source, room)[0]
            if not prompts[number] or len(answers[number]) > self.max_length:
                bad_records.add(task, record.where, self._too_long(len(answers[number])))
                continue
            kept.append(number)
            truncated.append(not fits)
        return pack([prompts[i] for i in kept], [answers[i] for i in kept], kept, truncated)

    def prompt(self, source: str) -> EncodedPrompt:
        """The prompt of a source whose answer is not known; a causal model's leaves room for an end token.

        Args:
            source: The question; a source too long for `max_length` loses its middle. No ids where even that fails.
        """
        room = self.max_length - (0 if self.is_encoder_decoder else 1)
        text = self.format.render(source)
        ids = self._prompt_ids([text])[0]
        fits = len(ids) <= room
        return EncodedPrompt(ids, text, False) if fits else EncodedPrompt(*self._shortened(source, room), True)

    def _shortened(self, source: str, room: int) -> tuple[list[int], str]:
        """The prompt with as much of `source` as fits into `room` tokens; empty if none does."""

        def prompt(text: str) -> list[int]:
            return self._prompt_ids([self.format.render(text)])[0]

        text = without_middle(source, lambda shorter: len(prompt(shorter)) <= room)
        return ([], "") if text is None else (prompt(text), self.format.render(text))

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
        end = self.tokenizer.eos_token_id
        return [[*row, end] for row in answer_ids(self.tokenizer, texts, self.is_encoder_decoder)]


def without_middle(text: str, fits: Callable[[str], bool]) -> str | None:
    """As much of both ends of a text as fits, with a gap between them; None if not even the gap does.

    Args:
        text: The text.
        fits: Whether a text is short enough.
    """
    best = None
    low, high = 0, len(text)
    while low <= high:
        keep = (low + high) // 2
        # A character more is a token more, nearly always; whatever is kept was measured, so a bend in the search costs
        # a few characters and never exceeds the room.
        shorter = text[: keep - keep // 2] + GAP + text[len(text) - keep // 2 :]
        if fits(shorter):
            best, low = shorter, keep + 1
        else:
            high = keep - 1
    return best


def prompt_ids(tokenizer: Any, texts: list[str], special: bool, is_encoder_decoder: bool = False) -> list[list[int]]:
    """Token ids of texts that an answer follows.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The prompts.
        special: Whether the tokenizer adds its special tokens; a chat template writes them as text.
        is_encoder_decoder: Whether a prompt is a sequence of its own, which may be closed.
    """
    rows = _ids(tokenizer, texts, add_special_tokens=special)
    if is_encoder_decoder or not special:
        return rows
    # Some decoder-only tokenizers close every text; a prompt must stay open.
    end = tokenizer.eos_token_id
    begins_alike = tokenizer.bos_token_id == end
    return [row[:-1] if row[-1:] == [end] and not (begins_alike and len(row) == 1) else row for row in rows]


def answer_ids(tokenizer: Any, texts: list[str], is_encoder_decoder: bool = False) -> list[list[int]]:
    """Token ids of answers by themselves, as they are trained on behind a prompt; without an end token.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The answers.
        is_encoder_decoder: Whether an answer is a sequence of its own.
    """
    if is_encoder_decoder:  # some tokenizers have another vocabulary for targets (Marian)
        return _ids(tokenizer, text_target=texts, add_special_tokens=False)
    return _ids(tokenizer, texts, add_special_tokens=False)


def _ids(tokenize: Callable[..., Any], *texts: list[str], **options: Any) -> list[list[int]]:
    """Token ids of each text; verbose off, since the tokenizer's remark on long texts is ours to make."""
    given = texts[0] if texts else options["text_target"]
    if not given:
        return []
    return list(tokenize(*texts, truncation=False, padding=False, verbose=False, **options)["input_ids"])
