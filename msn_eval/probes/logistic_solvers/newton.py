"""Newton's method with conjugate gradients for the regularised cross-entropy."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msn_eval.probes.logistic_solvers.objective import (
    CrossEntropyProblem,
    Point,
    Solution,
    certify,
    evaluate_point,
    row_blocks,
    search_line,
    zero_point,
)

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


_SOME_ROWS = 512
_BLOCK_VALUES = 1 << 18  # logits that are worked on at once: what a core's cache holds
_MOST_LOOKS = 20
_SHORTER = 0.25  # of a step that led uphill


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Combinations of k points, seen by some of the rows.

    labels: (n,) int64
    logits: k tensors of (n, n_classes)
    inner:  (k, k) float64, inner products of the points' weights
    """

    labels: Tensor
    logits: tuple[Tensor, ...]
    inner: Tensor
    mu: float


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What a combination is worth, and where a better one lies: slope (k,) and curvature (k, k), float64."""

    objective: float
    slope: Tensor
    curvature: Tensor


def combined_point(problem: CrossEntropyProblem, points: Sequence[Point], *, enough: float) -> Point:
    """Give all but the best linear combination of points, the last of them being the solution for the mu before.

    points: of problems that differ from this one in mu alone
    enough: share of the objective that is not worth another look
    The logits of a combination are that of the logits, so that a look takes no product. The objective is convex in the
    coefficients: Newton's method leads from the last point to the best combination in the eyes of some of the rows, by
    shorter steps where one leads uphill; one step by all rows ends it, if it leads downhill. Solutions turn slowly as mu
    falls, so that two of them foretell the direction of the next.
    """
    inner = torch.tensor([[float((one.weights * other.weights).sum(dtype=torch.float64)) for other in points]
                          for one in points], dtype=torch.float64)  # fmt: skip
    whole = _Span(labels=problem.labels, logits=tuple(one.logits for one in points), inner=inner, mu=problem.mu)
    some = slice(None, None, -(-len(whole.labels) // _SOME_ROWS))
    few = _Span(labels=whole.labels[some], logits=tuple(one[some] for one in whole.logits), inner=inner, mu=problem.mu)
    shares = _best_shares(few, enough)
    if len(few.labels) == len(whole.labels):
        return _point_at(problem, points, shares)
    seen = _look_at(whole, shares)
    point = _point_at(problem, points, shares + _newton_step(seen))
    return point if point.objective <= seen.objective else _point_at(problem, points, shares)


def _point_at(problem: CrossEntropyProblem, points: Sequence[Point], shares: Tensor) -> Point:
    weights, logits = _mixed(shares, [one.weights for one in points]), _mixed(shares, [one.logits for one in points])
    return evaluate_point(problem, weights, logits)


def _best_shares(span: _Span, enough: float) -> Tensor:
    best = torch.zeros(len(span.logits), dtype=torch.float64)
    best[-1] = 1
    look = _look_at(span, best)
    step, length = _newton_step(look), 1.0
    for _ in range(_MOST_LOOKS):
        if -float(look.slope @ step) * length / 2 <= enough * look.objective:
            break
        seen = _look_at(span, best + length * step)
        if seen.objective < look.objective:
            best, look = best + length * step, seen
            step, length = _newton_step(look), 1.0
        else:
            length *= _SHORTER
    return best


def _mixed(shares: Tensor, parts: Sequence[Tensor]) -> Tensor:
    mixed = torch.zeros_like(parts[0])
    for share, part in zip(shares.tolist(), parts, strict=True):
        mixed.add_(part, alpha=share)
    return mixed


def _newton_step(look: _Look) -> Tensor:
    """Give the step to the minimum of the quadratic, in the directions that are curved: points may be parallel."""
    size = look.curvature.diagonal().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    inverse = torch.linalg.pinv(look.curvature / size / size[:, None], hermitian=True)
    step: Tensor = -(inverse @ (look.slope / size)) / size
    return step


def _look_at(span: _Span, shares: Tensor) -> _Look:
    """Evaluate a combination, block by block of the rows, in two buffers that stay in the cache."""
    k, n = len(shares), len(span.labels)
    loss, slope, curvature = 0.0, torch.zeros(k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    size = max(1, _BLOCK_VALUES // span.logits[0].shape[1])
    buffers = [torch.empty_like(span.logits[0][:size], memory_format=torch.contiguous_format) for _ in range(2)]
    for first in range(0, n, size):
        logits, label = [one[first : first + size] for one in span.logits], span.labels[first : first + size, None]
        mixed, weighted = (one[: len(label)] for one in buffers)
        torch.mul(logits[0], float(shares[0]), out=mixed)
        for share, part in zip(shares[1:].tolist(), logits[1:], strict=True):
            mixed.add_(part, alpha=share)
        own = torch.stack([part.gather(1, label)[:, 0] for part in logits])
        largest = mixed.amax(dim=1)
        chances = torch.softmax(mixed, dim=1, out=mixed)
        loss += float((largest - chances.amax(dim=1).log()).sum(dtype=torch.float64))
        loss -= float(shares @ own.sum(dim=1, dtype=torch.float64).cpu())
        means = torch.empty_like(own)
        for i in range(k):
            torch.mul(chances, logits[i], out=weighted)
            torch.sum(weighted, dim=1, out=means[i])
            for j in range(i + 1):
                curvature[i, j] += float((weighted * logits[j]).sum(dtype=torch.float64))
        slope += (means - own).sum(dim=1, dtype=torch.float64).cpu()
        curvature -= (means @ means.T).tril().double().cpu()
    curvature += curvature.tril(-1).T
    return _Look(
        objective=loss / n + span.mu / 2 * float(shares @ span.inner @ shares),
        slope=slope / n + span.mu * (span.inner @ shares),
        curvature=curvature / n + span.mu * span.inner,
    )
