"""Limited-memory BFGS for the regularised cross-entropy, with a line search that costs no matrix product."""

from collections import deque

import torch
from torch import Tensor

from msn_eval.protocols.cross_entropy import CrossEntropyProblem, Point, evaluate_point

_MEMORY = 20
_MOST_STEPS = 2000
_MOST_TRIALS = 25
_SLOPE_SHARE = 0.3  # the line search ends where the slope is this share of the first one
_LONGEST_GROWTH = 10.0


def minimise_by_lbfgs(problem: CrossEntropyProblem, *, target: float) -> tuple[Point, int]:
    """Minimise until the relative duality gap is at most `target`; give the point reached and the steps taken.

    Two-loop recursion of Nocedal (1980), float64. Along a direction D the logits move by t (X D'), so the line
    search (Newton on the slope, safeguarded by bisection) needs the product X D' once and none after.
    """
    point = evaluate_point(problem, problem.rows.new_zeros(problem.n_classes, problem.rows.shape[1]))
    history: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)
    for step in range(_MOST_STEPS):
        if point.gap <= target:
            return point, step
        direction = -_inverse_curvature_product(point.gradient, history, problem.mu)
        length, along = _search_line(problem, point, direction)
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


def _search_line(problem: CrossEntropyProblem, point: Point, direction: Tensor) -> tuple[float, Tensor]:
    """Give the step length at which the slope has all but vanished, and the logits' change for a unit step."""
    along = problem.rows @ direction.T
    own = along.gather(1, problem.labels[:, None])[:, 0]
    first_slope = float((point.gradient * direction).sum())
    inner = float((point.weights * direction).sum())
    squared = float(direction.square().sum())
    length, shortest, longest = 1.0, 0.0, torch.inf
    for _ in range(_MOST_TRIALS):
        probabilities = (point.logits + length * along).softmax(dim=1)
        mean = (probabilities * along).sum(dim=1)
        slope = float((mean - own).mean()) + problem.mu * (inner + length * squared)
        if abs(slope) <= _SLOPE_SHARE * abs(first_slope):
            break
        spread = (probabilities * along.square()).sum(dim=1) - mean.square()
        curvature = float(spread.mean()) + problem.mu * squared
        shortest, longest = (length, longest) if slope < 0 else (shortest, length)
        newton = length - slope / curvature
        if longest == torch.inf:
            length = min(max(newton, 1.5 * length), _LONGEST_GROWTH * length)
        else:
            length = newton if shortest < newton < longest else (shortest + longest) / 2
    return length, along
