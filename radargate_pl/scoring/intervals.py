"""95 % intervals: Wilson's for shares, the percentile bootstrap for everything else."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

DRAWS = 1000
SEED = 12345
_Z = NormalDist().inv_cdf(0.975)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share; unlike the normal one it stays in [0, 1] and is not empty at 0 of n.

    Args:
        successes: how many of the examples are right.
        n: how many examples there are, at least 1.

    Returns:
        Lower and upper end, in [0, 1].

    Source: Wilson, E. B. (1927), Journal of the American Statistical Association 22, 209-212.

    Example:
        >>> [round(end, 4) for end in wilson(8, 10)]
        [0.4902, 0.9433]
    """
    share = successes / n
    centre = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    # At 0 and n of n one end is exactly the share; rounding must not push it outside.
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def bootstrap(
    statistics: Sequence[Sequence[float]], score: Callable[[Any], float]
) -> tuple[float, float] | tuple[None, None]:
    """The percentile bootstrap of a score that depends on sums over examples.

    Each of ``DRAWS`` times, n examples are drawn with replacement and scored; the interval holds the middle 95 %. The
    generator is this function's own with a fixed seed: equal examples give equal ends, nobody's random numbers move.

    Args:
        statistics: numbers of each example that add up over examples, (n, k), n at least 1.
        score: the score of such sums, (k,) float64.

    Returns:
        The 2.5 % and the 97.5 % percentile; ``None`` twice where all draws score alike. That is no certainty: one
        example, or a model that always says the same, shows nothing of how far the score can move.
    """
    import numpy

    table = numpy.asarray(statistics, dtype=numpy.float64)
    generator = numpy.random.default_rng(SEED)
    n = len(table)
    scores = []
    for _ in range(DRAWS):
        times = numpy.bincount(generator.integers(n, size=n), minlength=n)
        scores.append(score(times @ table))
    if min(scores) == max(scores):
        return None, None
    low, high = numpy.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
