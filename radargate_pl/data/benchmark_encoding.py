"""Encodes items of benchmarks as token ids, prompt and continuation together as lm-evaluation-harness does.

Tasks of a fit are encoded as in the fit instead: prompt and answer apart.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from radargate_pl.data.benchmark_items import Item, gap
from radargate_pl.data.control_text import say_control_text, say_doubled
from radargate_pl.data.prompts import PromptFormat
from radargate_pl.data.records import BadRecords
from radargate_pl.data.token_ids import answer_ids, prompt_ids, without_middle


class AskedAs(NamedTuple):
    """How a task is put to the model.

    Args:
        prompt: `chat`, `plain` or a template with `{source}` around the task's own prompt; None for that alone.
        special_tokens: Whether prompts get the tokenizer's own special tokens; never with a chat template.
        as_in_fit: Whether this is what a fit shows its sources in.
    """

    prompt: str | None = None
    special_tokens: bool = True
    as_in_fit: bool = False


PLAIN = AskedAs()


class Row(NamedTuple):
    """One sequence of a request.

    Args:
        prompt: Token ids of the prompt; with the ids of the continuation they are what the model reads.
        continuation: Token ids that are scored; empty for generation.
    """

    prompt: list[int]
    continuation: list[int]


class Request(NamedTuple):
    """An item as token ids.

    Args:
        item: The item.
        rows: Ranking: one a choice. Generation: one.
        is_truncated: Whether the prompt lost its middle.
    """

    item: Item
    rows: tuple[Row, ...]
    is_truncated: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.prompt) + len(row.continuation) for row in self.rows)


class RequestEncoder:
    """Encodes items. A prompt that is too long loses its middle, an answer nothing.

    Args:
        tokenizer: A Hugging Face tokenizer.
        asked: How the task is put. What is not as in a fit is plain where the tokenizer has no chat template.
        max_length: Tokens of prompt and answer together; of each of the two for an encoder-decoder backbone.
        is_encoder_decoder: Whether the backbone is one.
        date: The day a chat template prints, as 2026-11-30; today's for None.
    """

    def __init__(
        self,
        tokenizer: Any,
        asked: AskedAs = PLAIN,
        max_length: int = 2048,
        is_encoder_decoder: bool = False,
        date: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.asked = asked
        self.format = PromptFormat(asked.prompt or "plain", tokenizer, is_encoder_decoder, date)
        self.in_chat = self.format.uses_chat_template
        is_template = asked.prompt not in (None, "plain", "chat")
        self._is_framed = self.in_chat or is_template or asked.as_in_fit
        self._special = asked.special_tokens and not self.in_chat
        self.max_length = max_length
        self.is_encoder_decoder = is_encoder_decoder
        if self._is_framed and self._special:
            say_doubled(tokenizer, self._prompts([self._text("")])[0], is_encoder_decoder)

    def ranking(self, items: Sequence[Item], bad_records: BadRecords) -> list[Request]:
        """Encode items with every choice behind the prompt; those whose choices do not fit go to `bad_records`."""
        self._say_control_text(items)
        pairs = [self._pair(item.prompt, choice) for item in items for choice in item.choices]
        rows = iter(self._rows(pairs))
        whole = [Request(item, tuple(next(rows) for _ in item.choices)) for item in items]
        return self._fitting(whole, self.max_length, bad_records)

    def generation(self, items: Sequence[Item], max_new_tokens: int, bad_records: BadRecords) -> list[Request]:
        """Encode the prompts of items, with room for the answer.

        Raises:
            ValueError: If the answer alone fills the context.
        """
        room = self.max_length if self.is_encoder_decoder else self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(
                f"Expected max_length to leave room for a prompt, but it is {self.max_length} and max_new_tokens is "
                f"{max_new_tokens}. Raise data.max_length or lower data.max_new_tokens."
            )
        self._say_control_text(items)
        prompts = self._prompts([self._text(item.prompt) for item in items])
        whole = [Request(item, (Row(prompt, []),)) for item, prompt in zip(items, prompts, strict=True)]
        return self._fitting(whole, room, bad_records)

    def _say_control_text(self, items: Sequence[Item]) -> None:
        task = items[0].task if items else ""
        prompts, places = [item.prompt for item in items], [item.where for item in items]
        say_control_text(self.tokenizer, prompts, places, task, "sources")

    def _fitting(self, requests: Sequence[Request], room: int, bad_records: BadRecords) -> list[Request]:
        fitting = []
        for request in requests:
            item = request.item
            if self._fits(request, room):
                fitting.append(request)
            elif (shorter := self._shortened(request, room)) is not None:
                fitting.append(shorter)
            else:
                reason = f"item {item.id}: the answer leaves no room for the prompt in max_length={self.max_length}"
                bad_records.add(item.task, item.where, reason)
        return fitting

    def _fits(self, request: Request, room: int) -> bool:
        if self.is_encoder_decoder:
            return max(max(len(row.prompt), len(row.continuation)) for row in request.rows) <= room
        return request.length <= room

    def _shortened(self, request: Request, room: int) -> Request | None:
        """The request with as much of both ends of the prompt as fits; None if nothing does."""
        item = request.item

        def shorter(prompt: str) -> Request:
            if request.rows[0].continuation:
                rows = self._rows([self._pair(prompt, choice) for choice in item.choices])
            else:
                rows = [Row(self._prompts([self._text(prompt)])[0], [])]
            return Request(item, tuple(rows), is_truncated=True)

        text = without_middle(item.prompt, lambda prompt: self._fits(shorter(prompt), room))
        return None if text is None else shorter(text)

    def _text(self, prompt: str) -> str:
        """What the tokenizer reads: the prompt in its frame, if it has one."""
        return self.format.render(prompt) if self._is_framed else prompt

    def _pair(self, prompt: str, choice: str) -> tuple[str, str]:
        """Context and continuation as text; white space at the end of the context goes to the continuation."""
        text = self._text(prompt)
        if self.asked.as_in_fit:
            return text, choice
        continuation = choice if self.in_chat else gap(text) + choice
        context = text.rstrip()
        return context, text[len(context) :] + continuation

    def _rows(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        contexts = self._prompts([context for context, _ in pairs])
        if self.asked.as_in_fit:
            answers = answer_ids(self.tokenizer, [answer for _, answer in pairs], self.is_encoder_decoder)
            return [Row(*row) for row in zip(contexts, answers, strict=True)]
        if self.is_encoder_decoder:
            given = [continuation for _, continuation in pairs]
            continuations = prompt_ids(self.tokenizer, given, special=False, is_encoder_decoder=True)
            return [Row(*row) for row in zip(contexts, continuations, strict=True)]
        wholes = self._prompts([context + continuation for context, continuation in pairs])
        # Letters on both sides of the border may be one token; the cut is then where the context alone would end.
        rows = [Row(whole[: len(c)], whole[len(c) :]) for c, whole in zip(contexts, wholes, strict=True)]
        for number, row in enumerate(rows):
            if not row.continuation:  # the border swallowed it: only encoded apart has it tokens of its own
                continuation = prompt_ids(self.tokenizer, [pairs[number][1]], special=False)[0]
                rows[number] = Row(contexts[number], continuation)
        return rows

    def _prompts(self, texts: list[str]) -> list[list[int]]:
        return prompt_ids(self.tokenizer, texts, self._special, self.is_encoder_decoder)
