"""A line search for the regularised cross-entropy that costs no matrix product."""

import torch
from torch import Tensor

from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Point, row_blocks

_MOST_TRIALS = 25
_SLOPE_SHARE = 0.2  # the search ends where the slope is this share of the first one
_LONGEST_GROWTH = 10.0
_SHRINKING = 0.9  # of a step before: those that hardly shrink may swing between both ends for long


def search_line(problem: CrossEntropyProblem, point: Point, direction: Tensor, along: Tensor) -> float:
    """Give the step length at which the slope has all but vanished.

    direction: (n_classes, d), downhill
    along:     (n, n_classes), rows @ direction.T: what a unit step adds to the logits, so that no trial takes a product
    The objective is convex along the line, so Newton's method on its slope, safeguarded by bisection, closes in on
    the minimum.
    """
    first_slope = float((point.gradient * direction).sum(dtype=torch.float64))
    inner = float((point.weights * direction).sum(dtype=torch.float64))
    squared = float(direction.square().sum(dtype=torch.float64))
    length, shortest, longest, last = 1.0, 0.0, torch.inf, torch.inf
    for _ in range(_MOST_TRIALS):
        slope, curvature = _slope(problem, point, along, length)
        slope += problem.mu * (inner + length * squared)
        if abs(slope) <= _SLOPE_SHARE * abs(first_slope):
            break
        shortest, longest = (length, longest) if slope < 0 else (shortest, length)
        newton = length - slope / (curvature + problem.mu * squared)
        if longest == torch.inf:
            length = min(max(newton, 1.5 * length), _LONGEST_GROWTH * length)
        else:
            closer = shortest < newton < longest and abs(newton - length) <= _SHRINKING * last
            trial = newton if closer else (shortest + longest) / 2
            length, last = trial, abs(trial - length)
    return length


def _slope(problem: CrossEntropyProblem, point: Point, along: Tensor, length: float) -> tuple[float, float]:
    """Give slope and curvature of the mean cross-entropy at `length`."""
    labels = problem.labels[:, None]
    slope, curvature = 0.0, 0.0
    for block in row_blocks(problem):
        change = along[block]
        probabilities = torch.add(point.logits[block], change, alpha=length).softmax(dim=1)
        weighted = probabilities.mul_(change)
        mean = weighted.sum(dim=1)
        own = change.gather(1, labels[block])[:, 0]
        slope += float((mean - own).sum(dtype=torch.float64))
        spread = weighted.mul_(change).sum(dim=1) - mean.square()
        curvature += float(spread.sum(dtype=torch.float64))
    return slope / len(along), curvature / len(along)
