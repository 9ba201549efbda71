"""Newton's method with conjugate gradients for the regularised cross-entropy."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from msn_eval.protocols.cross_entropy import CrossEntropyProblem, Point, evaluate_point
from msn_eval.protocols.line_search import search_line

_MOST_STEPS = 100
_MOST_PRODUCTS = 250  # curvature products a step
_LOOSEST_FORCING = 0.3
_ROUGH_GAP = 1e-3  # up to here float32 can be trusted with everything


def minimise_by_newton(problem: CrossEntropyProblem, *, target: float) -> tuple[Point, int]:
    """Minimise until the relative duality gap is at most `target`; give the point reached and the steps taken.

    The way to a gap of 1e-3 is walked in float32. From there gradients, objectives and steps are float64, and only
    the curvature products inside a step float32, which bends the direction a little and never the answer.
    """
    start = problem.rows.new_zeros(problem.n_classes, problem.rows.shape[1])
    rough_problem = replace(problem, rows=problem.rows.to(torch.float32))
    rough, rough_steps = _minimise(rough_problem, start.to(torch.float32), max(target, _ROUGH_GAP))
    point, steps = _minimise(problem, rough.weights.to(problem.rows.dtype), target)
    return point, rough_steps + steps


def _minimise(problem: CrossEntropyProblem, start: Tensor, target: float) -> tuple[Point, int]:
    point = evaluate_point(problem, start)
    rows = problem.rows.to(torch.float32)
    for step in range(_MOST_STEPS):
        if point.gap <= target:
            return point, step
        direction = _newton_direction(problem, point, rows, _forcing(point.gap, target))
        length, along = search_line(problem, point, direction)
        moved = evaluate_point(problem, point.weights + length * direction, point.logits + length * along)
        if moved.objective >= point.objective and moved.gap >= point.gap:
            return point, step  # this precision has no better answer
        point = moved
    return point, _MOST_STEPS


def _forcing(gap: float, target: float) -> float:
    """Give the relative residual to which a step is solved: smaller near the solution (Eisenstat and Walker 1996), so
    that the last steps converge superlinearly, but never finer than the target needs. The gap goes with the squared
    gradient."""
    superlinear, enough = math.sqrt(math.sqrt(gap)), _LOOSEST_FORCING * math.sqrt(target / gap)
    return min(_LOOSEST_FORCING, max(superlinear, enough))


def _newton_direction(problem: CrossEntropyProblem, point: Point, rows: Tensor, forcing: float) -> Tensor:
    """Solve H D = -gradient by conjugate gradients to a relative residual of `forcing`."""
    probabilities = point.probabilities.to(torch.float32)
    scale = float(point.gradient.norm())  # to unit length, so that float32 holds gradients of any size
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
    return direction.to(point.weights.dtype) * scale


def _curvature_product(vector: Tensor, probabilities: Tensor, rows: Tensor, mu: float) -> Tensor:
    """Give the Hessian times (n_classes, d) `vector`."""
    change = probabilities * (rows @ vector.T)
    change -= probabilities * change.sum(dim=1, keepdim=True)
    return (change.T @ rows).div_(len(rows)).add_(vector, alpha=mu)
