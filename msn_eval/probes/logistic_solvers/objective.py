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
