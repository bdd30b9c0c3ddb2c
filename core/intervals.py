"""The arithmetic of 95 % intervals: spreads, quantiles, and shares that are so near 0 or 1 that half-samples show no spread."""

import math
from collections.abc import Sequence

PAIRS = 20  # of opposite half-samples: as many degrees of freedom, where there are more images than that
# Two-sided 95 % quantiles of Student's t with 1, 2, … 20 degrees of freedom.
T_95 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
)  # fmt: skip
Z_95 = 1.959964  # of the normal distribution
UNSEEN = -math.log(0.025)  # n times the share of something that never came in n tries, at most, 39 times in 40

Interval = tuple[float, float]


def t_95(n: int) -> float:
    """The quantile for a spread over half-samples of n values: of fewer values than pairs, halves know less.

    >>> t_95(1024), t_95(8)
    (2.085963, 2.364624)
    """
    return T_95[max(0, min(PAIRS, n - 1) - 1)]


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation around their own mean; None of fewer than 2 values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def wilson(share: float, n: int) -> Interval:
    """Score interval of a share of n independent things. Wilson, J. Am. Stat. Assoc. 22 (1927).

    >>> [round(v, 3) for v in wilson(0.0, 8)], [round(v, 3) for v in wilson(0.8, 1024)]
    ([0.0, 0.324], [0.774, 0.823])
    """
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mover(a: float, within_a: Interval, b: float, within_b: Interval) -> Interval:
    """Interval of a - b from those of two independent values. Newcombe, Statistics in Medicine 17 (1998), method 10.

    >>> [round(v, 3) for v in mover(0.0, (0.0, 0.3), 0.0, (0.0, 0.4))]
    [-0.4, 0.3]
    """
    low = a - b - math.hypot(a - within_a[0], within_b[1] - b)
    return low, a - b + math.hypot(within_a[1] - a, b - within_b[0])
