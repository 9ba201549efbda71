"""Limited-memory BFGS for the regularised cross-entropy, with a line search that costs no matrix product."""

from collections import deque

from torch import Tensor

from msn_eval.protocols.cross_entropy import CrossEntropyProblem, Point, evaluate_point
from msn_eval.protocols.line_search import search_line

_MEMORY = 20
_MOST_STEPS = 2000


def minimise_by_lbfgs(problem: CrossEntropyProblem, *, target: float) -> tuple[Point, int]:
    """Minimise until the relative duality gap is at most `target`; give the point reached and the steps taken.

    Two-loop recursion of Nocedal (1980), float64.
    """
    point = evaluate_point(problem, problem.rows.new_zeros(problem.n_classes, problem.rows.shape[1]))
    history: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)
    for step in range(_MOST_STEPS):
        if point.gap <= target:
            return point, step
        direction = -_inverse_curvature_product(point.gradient, history, problem.mu)
        length, along = search_line(problem, point, direction)
        moved = evaluate_point(problem, point.weights + length * direction, point.logits + length * along)
        if moved.objective > point.objective:
            if not history:  # even the steepest direction leads nowhere: float64 has no better answer
                return point, step
            history.clear()
            continue
        change = moved.gradient - point.gradient
        curvature = float((change * direction).sum()) * length
        if curvature > 0:
            history.append((length * direction, change, 1 / curvature))
        point = moved
    return point, _MOST_STEPS


def _inverse_curvature_product(gradient: Tensor, history: "deque[tuple[Tensor, Tensor, float]]", mu: float) -> Tensor:
    """Give the L-BFGS approximation of the inverse Hessian times the gradient."""
    product = gradient.clone()
    shares = []
    for move, change, weight in reversed(history):
        share = weight * float((move * product).sum())
        product.sub_(change, alpha=share)
        shares.append(share)
    if history:
        _, change, weight = history[-1]
        product.div_(weight * float(change.square().sum()))
    else:
        product.div_(mu + 1 / len(gradient))
    for (move, change, weight), share in zip(history, reversed(shares), strict=True):
        product.add_(move, alpha=share - weight * float((change * product).sum()))
    return product
