"""The confidence interval of a mean."""

from __future__ import annotations

import math

import numpy as np

CONFIDENCE = 0.95


def half_width(values: np.ndarray) -> float | None:
    """Half of the 95 % confidence interval of the mean of ``values``, (n,); None of fewer than two.

    It is t s / √n, with the sample deviation s, and t of Student's distribution with n - 1 degrees of freedom (Student
    1908): right for independent values of a normal distribution, and about right for others.
    """
    count = len(values)
    if count < 2:
        return None
    return student_t(count - 1) * float(np.std(np.asarray(values, np.float64), ddof=1)) / math.sqrt(count)


def student_t(freedom: int) -> float:
    """The t that a value of Student's distribution exceeds in neither direction with probability 0.95."""
    low, high = 0.0, 16.0  # 12.7 with one degree of freedom, less with more.
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """Probability of a value between -t and t: the finite series of Abramowitz & Stegun (1964), 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for number in range(freedom // 2):
        total += term
        factor = (2 * number + 2) / (2 * number + 3) if odd else (2 * number + 1) / (2 * number + 2)
        term *= factor * cosine * cosine
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
