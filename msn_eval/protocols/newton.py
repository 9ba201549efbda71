"""Newton's method with conjugate gradients for the regularised cross-entropy."""

import torch
from torch import Tensor

from msn_eval.protocols.cross_entropy import CrossEntropyProblem, Point, evaluate_point, objective_along

_MOST_STEPS = 100
_MOST_PRODUCTS = 250  # curvature products a step
_SUFFICIENT_DECREASE = 1e-4
_SMALLEST_STEP = 1e-10
_LOOSEST_FORCING = 0.3


def minimise_by_newton(problem: CrossEntropyProblem, *, target: float) -> tuple[Point, int]:
    """Minimise until the relative duality gap is at most `target`; give the point reached and the steps taken.

    Gradients, objectives and steps are float64; only the curvature products inside a step are float32, which bends
    the direction a little and never the answer. The forcing term of the inner solve shrinks with the gradient
    (Eisenstat and Walker 1996), so that late steps converge superlinearly.
    """
    point = evaluate_point(problem, problem.rows.new_zeros(problem.n_classes, problem.rows.shape[1]))
    first_gradient = float(point.gradient.norm()) or 1.0
    rows = problem.rows.to(torch.float32)
    for step in range(_MOST_STEPS):
        if point.gap <= target:
            return point, step
        forcing = min(_LOOSEST_FORCING, (float(point.gradient.norm()) / first_gradient) ** 0.5)
        direction = _newton_direction(problem, point, rows, forcing)
        moved = _step_along(problem, point, direction)
        if moved is None:  # the objective cannot be told apart any more: float64 has no better answer
            return point, step
        point = moved
    return point, _MOST_STEPS


def _newton_direction(problem: CrossEntropyProblem, point: Point, rows: Tensor, forcing: float) -> Tensor:
    """Solve H D = -gradient by conjugate gradients to a relative residual of `forcing`."""
    probabilities = point.probabilities.to(torch.float32)
    # Scaled to unit length, so that float32 holds gradients of any size.
    scale = float(point.gradient.norm())
    residual = (-point.gradient / scale).to(torch.float32)
    direction = torch.zeros_like(residual)
    search = residual.clone()
    squared = float(residual.square().sum())
    goal = forcing**2 * squared
    for _ in range(_MOST_PRODUCTS):
        product = _curvature_product(search, probabilities, rows, problem.mu)
        along = float((search * product).sum())
        if along <= 0:  # rounding; the Hessian is positive definite
            break
        length = squared / along
        direction.add_(search, alpha=length)
        residual.sub_(product, alpha=length)
        previous, squared = squared, float(residual.square().sum())
        if squared <= goal:
            break
        search.mul_(squared / previous).add_(residual)
    return direction.to(torch.float64) * scale


def _curvature_product(vector: Tensor, probabilities: Tensor, rows: Tensor, mu: float) -> Tensor:
    """Give the Hessian times (n_classes, d) `vector`."""
    change = probabilities * (rows @ vector.T)
    change -= probabilities * change.sum(dim=1, keepdim=True)
    return (change.T @ rows).div_(len(rows)).add_(vector, alpha=mu)


def _step_along(problem: CrossEntropyProblem, point: Point, direction: Tensor) -> Point | None:
    """Take the longest of the steps 1, 1/2, 1/4 … that lowers the objective enough, or None."""
    slope = float((point.gradient * direction).sum())
    along = problem.rows @ direction.T
    step = 1.0
    while step >= _SMALLEST_STEP:
        weights, logits = point.weights + step * direction, point.logits + step * along
        if objective_along(problem, logits, weights) <= point.objective + _SUFFICIENT_DECREASE * step * slope:
            return evaluate_point(problem, weights, logits)
        step /= 2
    return None
