"""The objective of L2-regularised multinomial regression, its gradient, and the certificate that follows from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_VALUES = 1 << 18  # values of a block of logits: what a core's cache holds while they are worked on


@dataclass(frozen=True, kw_only=True)
class CrossEntropyProblem:
    """Minimise mean softmax cross-entropy + (mu / 2) ||W||^2 over W, without intercept.

    rows:   (n, d), float64 unless a rough answer will do; every product takes its dtype
    labels: (n,) int64 in [0, n_classes)
    mu:     > 0, lambda / n
    """

    rows: Tensor
    labels: Tensor
    n_classes: int
    mu: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial solution and what is known of it, in the dtype of the problem's rows.

    weights:       (n_classes, d)
    logits:        (n, n_classes), rows @ weights.T
    probabilities: (n, n_classes)
    gradient:      (n_classes, d)
    gap:           relative duality gap, an upper bound of (objective - minimum) / objective
    """

    weights: Tensor
    logits: Tensor
    probabilities: Tensor
    objective: float
    gradient: Tensor
    gap: float


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Weights, (n_classes, d), and what is proven of them: the fields of Point that outlive the solving."""

    weights: Tensor
    objective: float
    gap: float


def row_blocks(problem: CrossEntropyProblem) -> Iterator[slice]:
    """Cut the rows so that a block of logits stays in a core's cache; a GPU takes all of them at once."""
    n = len(problem.rows)
    size = n if problem.rows.device.type == "cuda" else max(1, _BLOCK_VALUES // problem.n_classes)
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def evaluate_point(problem: CrossEntropyProblem, weights: Tensor, logits: Tensor | None = None) -> Point:
    """Evaluate objective, gradient and relative duality gap at `weights`, and keep logits and probabilities.

    logits: rows @ weights.T where it is known
    """
    rows = problem.rows
    known = logits is not None
    logits = rows.new_empty(len(rows), problem.n_classes) if logits is None else logits
    probabilities = torch.empty_like(logits)
    gradient, loss = problem.mu * weights, 0.0
    for block in row_blocks(problem):
        if not known:
            torch.mm(rows[block], weights.T, out=logits[block])
        loss += _add_block(problem, block, logits[block], probabilities[block], gradient)
    objective, gap = _judged(problem, weights, loss, gradient)
    return Point(
        weights=weights, logits=logits, probabilities=probabilities, objective=objective, gradient=gradient, gap=gap
    )


def certify(problem: CrossEntropyProblem, weights: Tensor) -> Solution:
    """Give what is proven of `weights`, in the dtype of the problem's rows; no logits are kept.

    The dual point is the residual P - Y, P being the softmax of the logits. With G = (P - Y)' X / n the gap is

        primal - dual = <G, W> + (mu / 2) ||W||^2 + ||G||^2 / (2 mu) = ||G + mu W||^2 / (2 mu),

    the squared norm of the gradient over 2 mu: for this dual point Fenchel's inequality is tight in every row.
    """
    weights = weights.to(problem.rows.dtype)
    gradient, loss = problem.mu * weights, 0.0
    for block in row_blocks(problem):
        logits = problem.rows[block] @ weights.T
        loss += _add_block(problem, block, logits, torch.empty_like(logits), gradient)
    objective, gap = _judged(problem, weights, loss, gradient)
    return Solution(weights=weights, objective=objective, gap=gap)


def _add_block(
    problem: CrossEntropyProblem, block: slice, logits: Tensor, probabilities: Tensor, gradient: Tensor
) -> float:
    """Fill the probabilities of a block of rows, add its share to the gradient, and give the sum of its losses."""
    label = problem.labels[block, None]
    torch.softmax(logits, dim=1, out=probabilities)
    # log-sum-exp = largest logit - log of the largest probability, which is at least 1 / n_classes.
    normaliser = logits.amax(dim=1) - probabilities.amax(dim=1).log()
    loss = float((normaliser - logits.gather(1, label)[:, 0]).sum(dtype=torch.float64))
    own = probabilities.gather(1, label)
    probabilities.scatter_(1, label, own - 1)  # the residual P - Y, without a copy of P
    gradient.addmm_(probabilities.T, problem.rows[block], alpha=1 / len(problem.rows))
    probabilities.scatter_(1, label, own)
    return loss


def _judged(problem: CrossEntropyProblem, weights: Tensor, loss: float, gradient: Tensor) -> tuple[float, float]:
    objective = loss / len(problem.rows) + problem.mu / 2 * _squared(weights)
    return objective, _squared(gradient) / (2 * problem.mu * objective)


def _squared(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def zero_point(problem: CrossEntropyProblem) -> Point:
    """Give the point of zero weights, where every class is equally likely: no product is needed."""
    rows, n_classes = problem.rows, problem.n_classes
    n = len(rows)
    sums = rows.new_zeros(n_classes, rows.shape[1]).index_add_(0, problem.labels, rows)
    gradient = (rows.sum(dim=0) / n_classes - sums) / n
    objective = math.log(n_classes)
    return Point(
        weights=torch.zeros_like(gradient),
        logits=rows.new_zeros(n, n_classes),
        probabilities=rows.new_full((n, n_classes), 1 / n_classes),
        objective=objective,
        gradient=gradient,
        gap=_squared(gradient) / (2 * problem.mu * objective),
    )


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
