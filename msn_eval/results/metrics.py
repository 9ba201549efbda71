"""Metrics of one set of predictions. Accuracies are fractions in [0, 1]; higher is better."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TOP = 5
_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """top1, top5: share of images whose label ranks first, or among the first five; top1_ci95: Wilson interval."""

    top1: float
    top5: float
    top1_ci95: tuple[float, float]
    n: int


def measure(rank_of_label: NDArray[np.int64]) -> Metrics:
    """Compute the metrics from the 1-based ranks of the labels; top5 is 1.0 where no rank can exceed five."""
    n = len(rank_of_label)
    right = int((rank_of_label == 1).sum())
    return Metrics(
        top1=right / n, top5=int((rank_of_label <= _TOP).sum()) / n, top1_ci95=wilson_interval(right, n), n=n
    )


def wilson_interval(right: float, n: float) -> tuple[float, float]:
    """Give the 95 % interval of a share, `right` of `n` images, over test images of this kind.

    Source: Wilson 1927; unlike the normal interval it stays within [0, 1] and does not vanish at 0 and 1.
    """
    share = right / n
    centre = share + _Z95**2 / (2 * n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n))
    scale = 1 + _Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
