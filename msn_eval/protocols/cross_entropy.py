"""The objective of L2-regularised multinomial regression, its gradient, and the certificate that follows from it."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def evaluate_point(problem: CrossEntropyProblem, weights: Tensor, logits: Tensor | None = None) -> Point:
    """Evaluate objective, gradient and relative duality gap at `weights`.

    The dual point is the residual P - Y, P being the softmax of the logits. With G = (P - Y)' X / n the gap is

        primal - dual = <G, W> + (mu / 2) ||W||^2 + ||G||^2 / (2 mu) = ||G + mu W||^2 / (2 mu),

    the squared norm of the gradient over 2 mu: for this dual point Fenchel's inequality is tight in every row.
    """
    logits = problem.rows @ weights.T if logits is None else logits
    log_normaliser = logits.logsumexp(dim=1, keepdim=True)
    own = logits.gather(1, problem.labels[:, None])
    penalty = problem.mu / 2 * weights.square().sum()
    objective = float((log_normaliser - own).mean() + penalty)
    probabilities = (logits - log_normaliser).exp()
    residual = probabilities.clone()
    residual[torch.arange(len(residual), device=residual.device), problem.labels] -= 1
    gradient = residual.T @ problem.rows / len(residual) + problem.mu * weights
    gap = float(gradient.square().sum()) / (2 * problem.mu * objective)
    return Point(
        weights=weights, logits=logits, probabilities=probabilities, objective=objective, gradient=gradient, gap=gap
    )
