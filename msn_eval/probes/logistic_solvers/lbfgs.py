"""Limited-memory BFGS for the regularised cross-entropy, with a line search that costs no matrix product."""

from collections import deque

from torch import Tensor

from msn_eval.probes.logistic_solvers.line_search import search_line
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Solution, evaluate_point, zero_point

_MEMORY = 20
_MOST_STEPS = 2000


def minimise_by_lbfgs(problem: CrossEntropyProblem, *, target: float) -> tuple[Solution, int]:
    """Minimise until the relative duality gap is at most `target`; give the solution and the steps taken.

    Two-loop recursion of Nocedal (1980), float64.
    """
    point, step = zero_point(problem), 0
    history: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)
    while point.gap > target and step < _MOST_STEPS:
        direction = -_inverse_curvature_product(point.gradient, history, problem.mu)
        along = problem.rows @ direction.T
        length = search_line(problem, point, direction, along)
        moved = evaluate_point(problem, point.weights + length * direction, point.logits + length * along)
        step += 1
        if moved.objective > point.objective:
            if not history:  # even the steepest direction leads nowhere: float64 has no better answer
                break
            history.clear()
            continue
        change = moved.gradient - point.gradient
        curvature = float((change * direction).sum()) * length
        if curvature > 0:
            history.append((length * direction, change, 1 / curvature))
        point = moved
    return Solution(weights=point.weights, objective=point.objective, gap=point.gap), step


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
