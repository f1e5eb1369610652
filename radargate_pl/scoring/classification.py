"""Matthews' correlation and F1 from counts.

Closed formulas of a few lines, tested against scikit-learn: torchmetrics has both, but importing torch takes longer
than all of ``radargate score``.
"""

import math
from collections.abc import Sequence


def matthews(confusion: Sequence[Sequence[float]]) -> float:
    """Matthews' correlation coefficient, for two classes or more.

    ``(c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))`` with ``s`` examples, ``c`` of them right,
    ``t_k`` of class k and ``p_k`` put there; 0 if all are of one class or all were put into one.

    Args:
        confusion: examples by true class (row) and predicted class (column), square.

    Returns:
        The coefficient in [-1, 1].

    Source: Gorodkin, J. (2004), Computational Biology and Chemistry 28, 367-374.

    Example:
        >>> matthews([[3, 1], [1, 3]])
        0.5
    """
    true = [sum(row) for row in confusion]
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    total = sum(true)
    right = sum(row[index] for index, row in enumerate(confusion))
    above = right * total - sum(t * p for t, p in zip(true, predicted, strict=True))
    below = (total**2 - sum(p * p for p in predicted)) * (total**2 - sum(t * t for t in true))
    return float(above / math.sqrt(below)) if below > 0 else 0.0


def f1(both: float, predicted: float, true: float) -> float:
    """The harmonic mean of precision and recall of one class, ``2 both / (predicted + true)``.

    Args:
        both: examples of the class that were put there.
        predicted: examples that were put into the class.
        true: examples of the class.

    Returns:
        F1 in [0, 1]; 0 if the class occurs nowhere.

    Example:
        >>> f1(both=2, predicted=3, true=5)
        0.5
    """
    return float(2 * both / (predicted + true)) if predicted + true else 0.0
