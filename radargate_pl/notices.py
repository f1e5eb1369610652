"""What is said once per process, however many layers have reason to say it (layer 0: standard library only)."""

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def say_once(message: str) -> None:
    """Log a warning the first time this message comes up."""
    logger.warning(message)
