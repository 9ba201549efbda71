"""A line search for the regularised cross-entropy that costs no matrix product."""

import torch
from torch import Tensor

from msn_eval.protocols.cross_entropy import CrossEntropyProblem, Point

_MOST_TRIALS = 25
_SLOPE_SHARE = 0.2  # the search ends where the slope is this share of the first one
_LONGEST_GROWTH = 10.0


def search_line(problem: CrossEntropyProblem, point: Point, direction: Tensor) -> tuple[float, Tensor]:
    """Give the step length at which the slope has all but vanished, and the logits' change for a unit step.

    Along a direction D the logits move by t (X D'): one product, and none for any trial of t. The objective is convex
    along the line, so Newton's method on its slope, safeguarded by bisection, closes in on the minimum.
    """
    along = problem.rows @ direction.T
    own = along.gather(1, problem.labels[:, None])[:, 0]
    first_slope = float((point.gradient * direction).sum())
    inner = float((point.weights * direction).sum())
    squared = float(direction.square().sum())
    length, shortest, longest = 1.0, 0.0, torch.inf
    for _ in range(_MOST_TRIALS):
        probabilities = (point.logits + length * along).softmax(dim=1)
        weighted = probabilities * along
        mean = weighted.sum(dim=1)
        slope = float((mean - own).mean()) + problem.mu * (inner + length * squared)
        if abs(slope) <= _SLOPE_SHARE * abs(first_slope):
            break
        spread = (weighted * along).sum(dim=1) - mean.square()
        curvature = float(spread.mean()) + problem.mu * squared
        shortest, longest = (length, longest) if slope < 0 else (shortest, length)
        newton = length - slope / curvature
        if longest == torch.inf:
            length = min(max(newton, 1.5 * length), _LONGEST_GROWTH * length)
        else:
            length = newton if shortest < newton < longest else (shortest + longest) / 2
    return length, along
