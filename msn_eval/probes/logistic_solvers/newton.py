"""Newton's method with conjugate gradients for the regularised cross-entropy."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from msn_eval.probes.logistic_solvers.line_search import search_line
from msn_eval.probes.logistic_solvers.objective import (
    CrossEntropyProblem,
    Point,
    Solution,
    certify,
    evaluate_point,
    row_blocks,
    zero_point,
)
from msn_eval.probes.logistic_solvers.warm_start import combined_point

_MOST_STEPS = 100
_MOST_PRODUCTS = 250  # curvature products a step
_LOOSEST_FORCING = 0.5
_REMEMBERED = 2  # solutions that the next start is combined of
_NEGLIGIBLE = 10  # times the target: so little a start is not improved for, since a step follows
_FAR_GAP, _FAR_STEPS = 0.4, 2  # so far away, and so early, no more than the steepest descent is worth its products


def minimise_by_newton(problem: CrossEntropyProblem, *, target: float) -> tuple[Solution, int]:
    """Minimise until the relative duality gap is at most `target`; give the solution and the steps taken.

    problem: with float64 rows
    """
    ((solution, steps),) = minimise_path(problem, [problem.mu], target=target)
    return solution, steps


def minimise_path(
    problem: CrossEntropyProblem, mus: Sequence[float], *, target: float
) -> Iterator[tuple[Solution, int]]:
    """Minimise for several mus in their order, each from what the two solutions before it foretell; best from large to small.

    problem: with float64 rows; its own mu is not looked at
    The way is walked in float32, as far as that leads. What is returned is evaluated anew in float64; where its gap
    does not meet the target, the rest of the way has gradients, objectives and steps in float64, and only the
    curvature products inside a step in float32, which bends the direction a little and never the answer. Where rows are
    all but certain, their p (1 - p) is below the rounding of float32, and the last of the way has those in float64 too.
    """
    rough = replace(problem, rows=problem.rows.to(torch.float32))
    walked: deque[Point] = deque(maxlen=_REMEMBERED)
    for mu in mus:
        exact, rough = replace(problem, mu=mu), replace(rough, mu=mu)
        if walked:
            start, taken = combined_point(rough, walked, enough=_NEGLIGIBLE * target), 0
        else:
            start, taken = _minimise(rough, rough, zero_point(rough), target, range(1))
            walked.append(start)  # the gradient at zero is the direction of the solution for an infinite mu
        point, rough_steps = _minimise(rough, rough, start, target, range(taken, _MOST_STEPS))
        walked.append(point)
        solution = certify(exact, point.weights)
        if solution.gap <= target:
            yield solution, rough_steps
        else:
            yield _finish(exact, rough, solution.weights, rough_steps, target)


def _finish(
    problem: CrossEntropyProblem, rough: CrossEntropyProblem, weights: Tensor, steps: int, target: float
) -> tuple[Solution, int]:
    """Walk the rest of the way, where float32 leads no further, in float64: the curvature products last."""
    point = evaluate_point(problem, weights)
    for products in (rough, problem):
        point, more = _minimise(problem, products, point, target, range(_MOST_STEPS))
        steps += more
    return Solution(weights=point.weights, objective=point.objective, gap=point.gap), steps


def _moved(problem: CrossEntropyProblem, point: Point, direction: Tensor, along: Tensor) -> Point:
    length = search_line(problem, point, direction, along)
    weights, logits = (
        torch.add(old, new, alpha=length) for old, new in ((point.weights, direction), (point.logits, along))
    )
    return evaluate_point(problem, weights, logits)


def _minimise(
    problem: CrossEntropyProblem,
    rough: CrossEntropyProblem,
    point: Point,
    target: float,
    steps: range,
) -> tuple[Point, int]:
    """Walk from `point` in the precision of `problem`; `rough` is the same in that of the curvature products. Gives the number
    of the step after."""
    for step in steps:
        if point.gap <= target:
            return point, step
        direction, along = _newton_direction(rough, point, target, early=step < _FAR_STEPS)
        if problem is not rough:
            direction = direction.to(problem.rows.dtype)
            along = problem.rows @ direction.T
        moved = _moved(problem, point, direction, along)
        if not moved.gap < point.gap and not moved.objective < point.objective:
            return point, step  # this precision has no better answer
        point = moved
    return point, steps.stop


def _forcing(gap: float, target: float) -> float:
    """Give the relative residual to which a step is solved: smaller near the solution (Eisenstat and Walker 1996), so
    that the last steps converge superlinearly, but never finer than the target needs. The gap goes with the squared
    gradient."""
    superlinear, enough = math.sqrt(math.sqrt(gap)), _LOOSEST_FORCING * math.sqrt(target / gap)
    return min(_LOOSEST_FORCING, max(superlinear, enough))


def _newton_direction(
    problem: CrossEntropyProblem, point: Point, target: float, *, early: bool
) -> tuple[Tensor, Tensor]:
    """Solve H D = -gradient by conjugate gradients, roughly, in the precision of the problem's rows; give D and what it
    adds to the logits, rows @ D.T.
    """
    dtype = problem.rows.dtype
    probabilities = point.probabilities.to(dtype)
    scale = float(point.gradient.norm())  # to unit length, so that float32 holds gradients of any size
    residual = (-point.gradient / scale).to(dtype)
    direction = torch.zeros_like(residual)
    search = residual.clone()
    change, along = torch.empty_like(probabilities), torch.zeros_like(probabilities)
    squared = float(residual.square().sum())
    goal = _forcing(point.gap, target) ** 2 * squared
    only_one = early and point.gap > _FAR_GAP
    for _ in range(_MOST_PRODUCTS):
        product, curvature = _curvature_product(problem, probabilities, search, change, wanted=not only_one)
        if not curvature > 0:  # rounding; the Hessian is positive definite
            break
        length = squared / curvature
        direction.add_(search, alpha=length)
        along.add_(change, alpha=length)
        if product is None:
            break
        residual.sub_(product, alpha=length)
        previous, squared = squared, float(residual.square().sum())
        if squared <= goal:
            break
        search.mul_(squared / previous).add_(residual)
    return direction * scale, along * scale


def _curvature_product(
    problem: CrossEntropyProblem, probabilities: Tensor, vector: Tensor, change: Tensor, *, wanted: bool
) -> tuple[Tensor | None, float]:
    """Give the Hessian times (n_classes, d) `vector`, where it is wanted, and the product of that with `vector`.

    change: (n, n_classes), is filled with rows @ vector.T
    """
    n = len(problem.rows)
    product = problem.mu * vector
    curvature = float((vector * product).sum(dtype=torch.float64))
    for block in row_blocks(problem):
        here, chances = change[block], probabilities[block]
        torch.mm(problem.rows[block], vector.T, out=here)
        bent = chances * here
        bent.addcmul_(chances, bent.sum(dim=1, keepdim=True), value=-1)
        curvature += float((bent * here).sum(dtype=torch.float64)) / n
        if wanted:
            product.addmm_(bent.T, problem.rows[block], alpha=1 / n)
    return product if wanted else None, curvature
