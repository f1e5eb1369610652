"""Tasks as token ids: from the cache where they are, made and kept there where they are not."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from radargate_pl.chat_template import control_tokens
from radargate_pl.data.cache import Encoded, content_key, read_encoded, write_encoded
from radargate_pl.data.library import Task
from radargate_pl.data.prompts import RecordEncoder
from radargate_pl.data.records import BadRecords, Record, Split
from radargate_pl.data.token_ids import holding

NAMED = 5  # tasks that a message names


class TokenisedTasks:
    """Token ids of tasks, by content: what one process made, another finds.

    Where the cache cannot be written, they are kept in memory, and every process makes its own.

    Args:
        encoder: turns records into token ids.
        bad_records: receives records that cannot be encoded.
    """

    def __init__(self, encoder: RecordEncoder, bad_records: BadRecords) -> None:
        self.encoder, self.bad_records = encoder, bad_records
        self._encoder_key = encoder.key()
        self._in_memory: dict[str, Encoded] = {}

    def prepare(self, tasks: Iterable[Task]) -> None:
        """Tokenise what the cache lacks; it is written once everything is known to be good.

        Args:
            tasks: with their records.

        Raises:
            ValueError: for records that cannot be encoded, all in one message, also where another run that skipped
                them has filled the cache.
        """
        if day := self.encoder.prompt_date():
            rank_zero_info(f"prompts are dated {day}, in this run and every later command of it (data.date)")
        new: dict[str, Encoded] = {}
        for task in tasks:
            self.encoder.say_control_text([record for part in task.records.values() for record in part], task.name)
            for records in task.records.values():
                key = self._key(records)
                found = read_encoded(key)
                if found is None or self._must_refuse(found, records):
                    new[key] = self.encoder.encode(records, task.name, self.bad_records)
        self.bad_records.raise_if_any()
        for key, encoded in new.items():
            if not write_encoded(key, encoded):
                self._in_memory[key] = encoded

    def load(self, task: Task, split: Split) -> Encoded:
        """Token ids of one split of a task.

        Args:
            task: with its records.
            split: of them.

        Raises:
            ValueError: for records that cannot be encoded.
        """
        records = task.records[split]
        key = self._key(records)
        encoded = self._in_memory.get(key)
        encoded = read_encoded(key) if encoded is None else encoded
        if encoded is None:  # a cache that could not be written, or that somebody emptied in between
            encoded = self._in_memory[key] = self.encoder.encode(records, task.name, self.bad_records)
            self.bad_records.raise_if_any()
        return encoded

    def _key(self, records: Sequence[Record]) -> str:
        # Earlier versions made control tokens of such answers, and their caches are still there.
        is_text = holding(self.encoder.answer_texts(records), control_tokens(self.encoder.tokenizer))
        return content_key(records, self._encoder_key + (" control tokens in answers are text" if is_text else ""))

    def _must_refuse(self, found: Encoded, records: Sequence[Record]) -> bool:
        return self.bad_records.policy == "raise" and len(found) < len(records)


def contents_of(encoded: Mapping[tuple[str, Split], Encoded], split: Split = "train") -> dict[str, str]:
    """SHA-256 of the token ids that each task is trained on, in their order.

    Args:
        encoded: task and split to token ids.
        split: the one that is looked at.
    """
    contents = {}
    for (task, its_split), one in encoded.items():
        if its_split == split:
            digest = hashlib.sha256()
            for field in fields(Encoded):
                if field.name not in ("kept", "truncated"):  # places in a file, not what is trained on
                    digest.update(getattr(one, field.name).tobytes())
            contents[task] = digest.hexdigest()
    return contents


def content_changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """What differs between the data of a checkpoint and those at hand; empty if nothing does.

    Args:
        saved: ``tasks`` (name to hash) and ``encoding`` (setting to value), as a checkpoint holds them.
        present: the same of this run.
    """
    before, now = saved["tasks"], present["tasks"]
    other = [task for task in dict.fromkeys([*before, *now]) if before.get(task) != now.get(task)]
    if not other:
        return ""
    settings = {name: value for name, value in present["encoding"].items() if saved["encoding"].get(name) != value}
    told = [f"{name} was {saved['encoding'].get(name)!r} and is {value!r}" for name, value in settings.items()]
    more = f" and {len(other) - NAMED} more" if len(other) > NAMED else ""
    return f"task {', '.join(other[:NAMED])}{more}: " + (
        "; ".join(told) if told else "its records are others, or in another order, though every setting is as before"
    )


def encoding_facts(encoder: RecordEncoder) -> dict[str, Any]:
    """Settings that token ids depend on, by the names of `FlanMixture`.

    Args:
        encoder: of the run.
    """
    tokenizer = hashlib.sha256(json.dumps([encoder.tokenizer.get_vocab(), ""], sort_keys=True).encode()).hexdigest()
    template = encoder.tokenizer.chat_template if encoder.format.uses_chat_template else None
    return {
        "prompt": encoder.format.prompt,
        "target": encoder.target,
        "max_length": encoder.max_length,
        "special_tokens": encoder.special_tokens,
        "date": encoder.format.date if encoder.format.uses_chat_template else None,
        "answer_end": encoder.end,
        "tokenizer": tokenizer[:16],
        "chat template": None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()[:16],
    }
