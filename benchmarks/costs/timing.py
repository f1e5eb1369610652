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


def warm_up(row: Row, case: Case, watch: Stopwatch) -> dict[str, float]:
    """Call twice; the first call's surplus is what compiling costs, where the row compiles.

    Returns:
        ``warm_up_seconds`` of the first call, and ``compile_seconds`` of a compiled row.

    Raises:
        UnavailableError: it failed, or nothing was compiled although the row says so.
    """
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    try:
        first = watch.seconds(case.run)
        case.module.zero_grad(set_to_none=True)
        second = watch.seconds(case.run)
    except Exception as error:  # whatever a foreign package or a compiler raises belongs in the table
        raise UnavailableError(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}") from error
    finally:
        case.module.zero_grad(set_to_none=True)
    if row.mode != "compiled":
        return {"warm_up_seconds": first}
    if counters["stats"]["unique_graphs"] == graphs:
        raise UnavailableError("nothing was compiled")
    return {"warm_up_seconds": first, "compile_seconds": max(0.0, first - second)}


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
                failed[row] = f"{type(error).__name__}: {error}"
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
