"""One day for the prompts of all processes: those that start behind midnight take the first one's."""

from typing import Any


def take_common_day(data: Any) -> bool:
    """Replace the date of a data module by that of the first process.

    Args:
        data: A data module with ``date``.

    Returns:
        Whether it was another one.
    """
    trainer = data.trainer
    if trainer is None or trainer.world_size == 1:
        return False
    before, data.date = data.date, trainer.strategy.broadcast(data.date)
    return bool(before != data.date)
