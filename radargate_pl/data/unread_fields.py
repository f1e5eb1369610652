"""Tells which fields of a source were not read, once for a source."""

import logging
from collections import Counter
from collections.abc import Mapping

from radargate_pl.data.record_fields import unread_fields
from radargate_pl.data.records import Record

logger = logging.getLogger(__name__)
NAMED = 8  # names of fields in a message


class UnreadFields:
    """Counts fields that no rule reads.

    Args:
        place: Of the source.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._counts: Counter[str] = Counter()
        self._unseen_choices = 0

    def note(self, fields: Mapping[str, object] | None, record: Record) -> None:
        """Take one record in.

        Args:
            fields: Of the line.
            record: What was read from them.
        """
        if fields is not None:
            self._counts.update(unread_fields(fields))
        self._unseen_choices += bool(record.choices) and not any(choice in record.source for choice in record.choices)

    def say(self) -> None:
        """Name what was not read, if there is anything."""
        if self._unseen_choices:
            logger.warning("%s: %d questions do not show their choices", self._place, self._unseen_choices)
        if self._counts:
            names = [name for name, _ in self._counts.most_common(NAMED)]
            more = f" and {len(self._counts) - NAMED} more" if len(self._counts) > NAMED else ""
            logger.warning(
                "%s: fields %s%s are not read; what belongs to the question goes into source",
                self._place,
                ", ".join(names),
                more,
            )
