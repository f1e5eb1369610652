"""Rounds in which all cases take turns: warm-up apart, medians and spread afterwards."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from costs.case import Case, UnavailableError
from costs.rows import Row

HEAVY_ROUNDS = 2


class Stopwatch:
    """Seconds of a call: CUDA events on a GPU, the clock otherwise.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, run: Callable[[], Any]) -> float:
        """Call once and return how long it took."""
        if self.device.type != "cuda":
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1000


def warm_up(case: Case, watch: Stopwatch) -> dict[str, Any]:
    """Call twice, and tell what was compiled.

    Returns:
        ``warm_up_seconds`` of the first call; ``compile_seconds`` and ``graphs`` of a compiled row.

    Raises:
        UnavailableError: it failed, or nothing was compiled although the row says so.
    """
    try:
        first = watch.seconds(case.run)
        case.module.zero_grad(set_to_none=True)
        watch.seconds(case.run)
    except Exception as error:  # whatever a foreign package or a compiler raises belongs in the table
        raise UnavailableError(reason_of(error)) from error
    finally:
        case.module.zero_grad(set_to_none=True)
    return {"warm_up_seconds": first, **({} if case.compiled is None else case.compiled())}


def reason_of(error: Exception) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def take_turns(
    cases: Mapping[Row, Case], rounds: int, seed: int, watch: Stopwatch
) -> tuple[dict[Row, dict[int, float]], dict[Row, str]]:
    """Run every case once per round, in an order drawn anew for every round; heavy ones in the first two only.

    Returns:
        Seconds of each row by round, and the reasons of rows that failed.
    """
    order, shuffle = list(cases), random.Random(seed)
    seconds: dict[Row, dict[int, float]] = {row: {} for row in cases}
    failed: dict[Row, str] = {}
    for number in range(rounds):
        shuffle.shuffle(order)
        gc.collect()
        for row in order:
            if row in failed or (row.is_heavy and number >= HEAVY_ROUNDS):
                continue
            try:
                seconds[row][number] = watch.seconds(cases[row].run)
            except Exception as error:  # as in warm_up
                failed[row] = reason_of(error)
            cases[row].module.zero_grad(set_to_none=True)
    return seconds, failed


def spread(values: list[float]) -> tuple[float, float]:
    """Return the quartiles; of fewer than four values the smallest and the largest.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        (1.0, 3.0)
    """
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
