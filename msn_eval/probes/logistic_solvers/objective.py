"""The objective of L2-regularised multinomial regression and the certificate of a solution."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_VALUES = 1 << 18  # logits of a block of rows: what a core's cache holds


@dataclass(frozen=True, kw_only=True)
class CrossEntropyProblem:
    """Minimise mean softmax cross-entropy + (mu / 2) ||W||^2 over W, without intercept."""

    rows: Tensor  # (n, d) float64
    labels: Tensor  # (n,) int64 in [0, n_classes)
    n_classes: int
    mu: float  # positive, lambda / n


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Weights and what is proven of them."""

    weights: Tensor  # (n_classes, d)
    objective: float
    gap: float  # relative duality gap, an upper bound of (objective - minimum) / objective


def evaluate_objective(problem: CrossEntropyProblem, weights: Tensor) -> tuple[float, Tensor]:
    """Compute the objective and its gradient, (n_classes, d), in the dtype of the rows; no logits are kept."""
    n, loss, gradient = len(problem.rows), 0.0, torch.zeros_like(weights)
    size = n if problem.rows.is_cuda else max(1, BLOCK_VALUES // problem.n_classes)
    for some, labels in zip(torch.split(problem.rows, size), torch.split(problem.labels, size), strict=True):
        logits = some @ weights.T
        log_probabilities = logits.log_softmax(dim=1)
        loss -= float(log_probabilities.gather(1, labels[:, None]).sum(dtype=torch.float64))
        residual = log_probabilities.exp_()
        residual[torch.arange(len(labels), device=labels.device), labels] -= 1
        gradient.addmm_(residual.T, some)
    return loss / n + problem.mu / 2 * inner(weights, weights), gradient.div_(n).add_(weights, alpha=problem.mu)


def certify(problem: CrossEntropyProblem, weights: Tensor) -> Solution:
    """Evaluate (n_classes, d) weights, and prove how far they are from the minimum.

    The dual point is the residual P - Y, where P is the softmax of the logits. With G = (P - Y)' X / n the gap is

        primal - dual = <G, W> + (mu / 2) ||W||^2 + ||G||^2 / (2 mu) = ||G + mu W||^2 / (2 mu),

    the squared norm of the gradient over 2 mu: for this dual point Fenchel's inequality is tight in every row.
    """
    weights = weights.to(problem.rows.dtype)
    objective, gradient = evaluate_objective(problem, weights)
    return Solution(
        weights=weights, objective=objective, gap=relative_gap(objective, inner(gradient, gradient), problem.mu)
    )


def add_block(total: Tensor, left: Tensor, rows: Tensor) -> None:
    """Add left.T @ rows to (n_classes, d) `total`, which has the dtype of the rows or float64."""
    if total.dtype == rows.dtype:
        total.addmm_(left.T, rows)
    else:
        total += left.T @ rows


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of two matrices, for which the host does not wait."""
    return torch.dot(left.flatten(), right.flatten())


def inner(left: Tensor, right: Tensor) -> float:
    """Return the inner product of two matrices."""
    return float(dot(left, right))


def read_scalars(*scalars: Tensor) -> list[float]:
    """Return the values of scalars, for which the host waits once."""
    if scalars[0].is_cuda:
        return torch.stack([each.double() for each in scalars]).tolist()
    return [float(each) for each in scalars]


def relative_gap(objective: float, slope: float, mu: float) -> float:
    """Return the duality gap over the objective for the squared norm `slope` of the gradient; where a tiny mu underflows, the
    largest float."""
    scale = 2 * mu * objective
    return slope / scale if scale > 0 else sys.float_info.max
