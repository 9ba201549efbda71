"""Newton's method with conjugate gradients for the regularised cross-entropy, over rows that are prepared once or in chunks.

Few rows are prepared once in float64 and float32, and the logits are kept, so that a line search needs no product. Of more
rows than that, on any number of ranks, nothing is kept but the features as the encoder returned them: each pass prepares them
again, a chunk at a time, and sums over chunks and ranks are float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from msn_eval.probes.base import centre_rows, choose_float64_device
from msn_eval.probes.logistic_solvers.objective import (
    BLOCK_VALUES,
    CrossEntropyProblem,
    Solution,
    add_block,
    dot,
    inner,
    read_scalars,
    relative_gap,
)
from msn_eval.process import available_bytes

_WHOLE_BYTES = 1 << 30  # that all rows and their logits may take; fixed, so that machines do not differ
_CHUNK_VALUES, _CHUNK_VALUES_CUDA = 1 << 20, 1 << 27  # of rows and logits
_TEMPORARIES = 64  # bytes per value of a chunk, all temporaries of a float64 pass together
_MOST_STEPS = 100
_MOST_PRODUCTS = 250  # curvature products per step
_CHECKED_PRODUCTS = frozenset(
    accumulate(range(1, 25))
)  # 1, 3, 6, 10, …: after them the host waits for a GPU's residual
_LOOSEST_FORCING = 0.5
_NEGLIGIBLE = 1e-20  # probability
_SLOPE_SHARE = 0.2  # a line search ends where the slope is this share of the first one

_Slope = Callable[[float], tuple[float, float]]  # from a step length to slope and curvature


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """The labelled rows of one rank."""

    values: Tensor  # (m, d) float32 as the encoder returned them, on the device that computes; never copied all at once
    labels: Tensor  # (m,) int64 in [0, n_classes), on the same device
    n_classes: int
    n: int  # number of rows of all ranks
    total: Callable[[Tensor], None] | None = (
        None  # adds up over all ranks in place, same bits on each; None for one rank
    )

    @property
    def width(self) -> int:
        return self.values.shape[1]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of a share as the passes read them."""

    share: RowShare  # for rows prepared once, its values are the prepared float64 ones
    rough: Tensor | None = None  # the same in float32, or None for rows in chunks
    shift: Tensor | None = None  # (m, 1) float32, subtracted from the values of a chunk
    scale: Tensor | None = None  # (m, 1) float32, then multiplies them
    axes: Tensor | None = None  # for rows in chunks, eigenvectors (d, d) of the second moment X'X / n
    strengths: Tensor | None = None  # its eigenvalues, (d,)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield prepared rows: of rows prepared once, so few that a block of logits stays in a core's cache."""
        share = self.share
        if self.rough is None:
            size = chunk_rows(share)
        else:
            size = share.n if share.values.is_cuda else max(1, BLOCK_VALUES // share.n_classes)
        for block in (slice(first, first + size) for first in range(0, len(share.labels), size)):
            if self.rough is not None:
                yield block, (share.values if dtype == torch.float64 else self.rough)[block]
            elif dtype == torch.float64:
                yield block, centre_rows(share.values[block])
            else:
                assert self.shift is not None
                assert self.scale is not None
                yield block, (share.values[block] - self.shift[block]).mul_(self.scale[block])

    def to(self, device: torch.device) -> "_Rows":
        """Return rows prepared once on a different device."""
        if self.rough is None or device == self.rough.device:
            return self
        share = replace(self.share, values=self.share.values.to(device), labels=self.share.labels.to(device))
        return replace(self, share=share, rough=self.rough.to(device))

    def sums(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.rough is None else dtype

    def add_up(self, sums: Tensor) -> None:
        if self.share.total is not None:
            self.share.total(sums)


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A trial solution for `mu`, and for rows prepared once its (n, n_classes) logits and probabilities.

    `weights` and `gradient` are (n_classes, d), `spread` is (n_classes,), the mean of p (1 - p).
    """

    mu: float
    weights: Tensor
    objective: float
    gap: float  # relative duality gap
    gradient: Tensor
    spread: Tensor
    logits: Tensor | None = None
    probabilities: Tensor | None = None

    def with_mu(self, mu: float) -> "_Point":
        """Return the same weights for another mu, without a pass over the rows."""
        more = mu - self.mu
        gradient = torch.add(self.gradient, self.weights, alpha=more)
        squared, slope = read_scalars(dot(self.weights, self.weights), dot(gradient, gradient))
        objective = self.objective + more / 2 * squared
        return replace(self, mu=mu, objective=objective, gap=relative_gap(objective, slope, mu), gradient=gradient)


def is_large(n: int, width: int, n_classes: int) -> bool:
    """Whether rows in float64 and float32, and the four matrices of their logits, exceed 1 GiB."""
    return n * (12 * width + 16 * n_classes) > _WHOLE_BYTES


def minimise_by_newton(problem: CrossEntropyProblem, *, target: float) -> tuple[Solution, int]:
    """Minimise until the relative duality gap is at most `target`; return the solution and the number of steps."""
    ((solution, steps),) = minimise_path(problem, [problem.mu], target=target)
    return solution, steps


def minimise_path(
    problem: CrossEntropyProblem, mus: Sequence[float], *, target: float
) -> Iterator[tuple[Solution, int]]:
    """Minimise for several mus in turn, best from large to small, each from the solution before it.

    Yields solutions and numbers of steps. The rows of the problem are float64; its own mu is not used.
    """
    share = RowShare(values=problem.rows, labels=problem.labels, n_classes=problem.n_classes, n=len(problem.rows))
    yield from _minimise(_Rows(share=share, rough=problem.rows.float()), mus, target)


def minimise_in_chunks(share: RowShare, mus: Sequence[float], *, target: float) -> Iterator[tuple[Solution, int]]:
    """Minimise as `minimise_path` does, over rows that are centred and normalised a chunk at a time; every rank calls it."""
    yield from _minimise(_measure(share), mus, target)


def _minimise(rows: _Rows, mus: Sequence[float], target: float) -> Iterator[tuple[Solution, int]]:
    """Step in float32 until that improves nothing, certify in float64, and where the gap is above the target step further:
    gradients and objectives in float64, and curvature products in float32, which change the direction and never the answer.
    Where rows are nearly certain, p (1 - p) is below the rounding of float32, and the last steps have these in float64 too."""
    rough, exact = torch.float32, torch.float64
    share, whole = rows.share, rows.rough is not None
    wide_rows = rows.to(choose_float64_device(share.values.device)) if whole else rows
    zeros = share.values.new_zeros(share.n_classes, share.width, dtype=rough)
    logits = share.values.new_zeros(share.n, share.n_classes, dtype=rough) if whole else None
    point = _evaluate(rows, zeros, mus[0], rough, logits)
    for mu in mus:
        point = point.with_mu(mu)
        if point.logits is not None and inner(point.gradient, point.weights) < 0:  # longer weights: no product
            point = _move(rows, point, point.weights, point.logits, rough)
        point, steps = _take_steps(rows, point, target, rough, rough)
        proven = _evaluate(wide_rows, point.weights.to(wide_rows.share.values.device), mu, exact)
        for products in (rough, exact) if proven.gap > target else ():
            if proven.logits is None and whole:
                proven = _evaluate(wide_rows, proven.weights, mu, exact, wide_rows.share.values @ proven.weights.T)
            proven, more = _take_steps(wide_rows, proven, target, exact, products)
            steps += more
        weights = proven.weights.to(share.values.device)
        yield Solution(weights=weights, objective=proven.objective, gap=proven.gap), steps


def _take_steps(
    rows: _Rows, point: _Point, target: float, dtype: torch.dtype, products: torch.dtype
) -> tuple[_Point, int]:
    """Step, with curvature products in `products`, until the gap meets the target or nothing improves; count the steps."""
    for step in range(_MOST_STEPS):
        if point.gap <= target:
            return point, step
        direction, along = _newton_direction(rows, point, target, products)
        if products != dtype:
            direction, along = direction.to(dtype), None
        moved = _move(rows, point, direction, along, dtype)
        if not moved.gap < point.gap and not moved.objective < point.objective:
            return point, step
        point = moved
    return point, _MOST_STEPS


def _move(rows: _Rows, point: _Point, direction: Tensor, along: Tensor | None, dtype: torch.dtype) -> _Point:
    """Go downhill along a line to where its slope has nearly vanished.

    With kept logits a trial takes no product. In chunks it is a pass, so a step roughly as long as the best is enough.
    """
    share, mu, logits = rows.share, point.mu, point.logits
    if logits is None:
        moved, first = point, inner(point.gradient, direction)

        def evaluate_slope(length: float) -> tuple[float, float]:
            nonlocal moved
            moved = _evaluate(rows, point.weights + length * direction, mu, dtype)
            slope = inner(moved.gradient, direction)
            return slope, (slope - first) / length  # of the secant

        search_line(evaluate_slope, first, share=0.5)
        return moved
    change = share.values @ direction.T if along is None else along
    first, offset, squared = read_scalars(
        *(dot(each, direction) for each in (point.gradient, point.weights, direction))
    )

    def evaluate_logits(length: float) -> tuple[float, float]:
        sums = list[Tensor]()
        for block, _ in rows.blocks(dtype):
            part = change[block]
            weighted = torch.add(logits[block], part, alpha=length).softmax(dim=1).mul_(part)
            mean = weighted.sum(dim=1)
            sums.append((mean - part.gather(1, share.labels[block, None])[:, 0]).sum(dtype=torch.float64))
            sums.append((weighted.mul_(part).sum(dim=1) - mean.square()).sum(dtype=torch.float64))
        values = read_scalars(*sums)
        slope, curvature = sum(values[::2]) / share.n, sum(values[1::2]) / share.n
        return slope + mu * (offset + length * squared), curvature + mu * squared

    length = search_line(evaluate_logits, first, share=_SLOPE_SHARE)
    weights = torch.add(point.weights, direction, alpha=length)
    return _evaluate(rows, weights, mu, dtype, torch.add(logits, change, alpha=length))


def search_line(slope_at: _Slope, first: float, *, share: float) -> float:
    """Return a step length at which the slope is at most `share` of the first one, which is negative.

    The objective is convex along the line, so Newton's method on the slope, safeguarded by bisection, finds the minimum.
    """
    length, shortest, longest, last = 1.0, 0.0, math.inf, math.inf
    for _ in range(25):
        slope, curvature = slope_at(length)
        if abs(slope) <= share * abs(first):
            break
        shortest, longest = (length, longest) if slope < 0 else (shortest, length)
        newton = length - slope / curvature if curvature > 0 else math.inf
        if longest == math.inf:
            length = min(max(newton, 1.5 * length), 10.0 * length)
        else:  # steps that hardly shrink may swing between both ends for long
            closer = shortest < newton < longest and abs(newton - length) <= 0.9 * last
            trial = newton if closer else (shortest + longest) / 2
            length, last = trial, abs(trial - length)
    return length


def _newton_direction(rows: _Rows, point: _Point, target: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Solve H D = -gradient roughly by conjugate gradients; return D and, where probabilities are kept, its logits.

    The relative residual is smaller near the solution (Eisenstat and Walker 1996), so that the last steps converge
    superlinearly, but no smaller than the target needs: the gap goes with the squared gradient.
    """
    enough = _LOOSEST_FORCING * math.sqrt(target / point.gap)
    forcing = min(_LOOSEST_FORCING, max(point.gap**0.35, enough))
    scale = point.gradient.norm()  # to length 1, so that float32 holds gradients of any size
    residual = (-point.gradient / scale).to(rows.sums(dtype))
    probabilities = point.probabilities.to(dtype) if point.probabilities is not None else None
    direction = torch.zeros_like(residual)
    along = torch.zeros_like(probabilities) if probabilities is not None else None
    change = torch.empty_like(probabilities) if probabilities is not None else None
    conditioned = _precondition(rows, point, residual)
    multiply: Callable[[Tensor, Tensor], float | Tensor] = dot if residual.is_cuda else inner
    search, squared = conditioned.clone(), multiply(residual, conditioned)
    goal, unsolved = forcing**2 * squared, cast("bool | Tensor", True)
    # In chunks a product takes much more time than a wait, and none is computed in vain.
    checked = _CHECKED_PRODUCTS if residual.is_cuda and along is not None else range(_MOST_PRODUCTS + 1)
    for number in range(1, _MOST_PRODUCTS + 1):
        product = _curvature_product(rows, point, search, dtype, probabilities, change)
        curvature = multiply(search, product)
        unsolved = unsolved & (curvature > 0)  # else rounding; the Hessian is positive definite
        if isinstance(unsolved, Tensor):  # after the last product that is needed, lengths are zero
            length: float | Tensor = torch.where(unsolved, squared / curvature, 0.0)
        else:
            length = squared / curvature if unsolved else 0.0
        _add_scaled(direction, search, length)
        if along is not None and change is not None:
            _add_scaled(along, change, length)
        _add_scaled(residual, product, -length)
        conditioned = _precondition(rows, point, residual)
        previous, squared = squared, multiply(residual, conditioned)
        unsolved = unsolved & (squared > goal)
        if number in checked and not unsolved:
            break
        search.mul_(squared / previous).add_(conditioned)
    return direction * scale, along * scale if along is not None else None


def _add_scaled(total: Tensor, term: Tensor, factor: float | Tensor) -> None:
    """Add a multiple in place; for a factor on a GPU the host does not wait."""
    if isinstance(factor, Tensor):
        total.addcmul_(term, factor)
    else:
        total.add_(term, alpha=factor)


def _precondition(rows: _Rows, point: _Point, vector: Tensor) -> Tensor:
    """For rows in chunks, whose products are passes, divide by a curvature that takes probabilities and rows for independent
    and classes for unrelated: (mean p (1 - p)) X'X / n + mu, which is diagonal in the axes of the second moment."""
    if rows.axes is None or rows.strengths is None:
        return vector
    return ((vector @ rows.axes) / (point.spread[:, None] * rows.strengths + point.mu)) @ rows.axes.T


def _curvature_product(
    rows: _Rows, point: _Point, vector: Tensor, dtype: torch.dtype, probabilities: Tensor | None, change: Tensor | None
) -> Tensor:
    """Return H V for an (n_classes, d) matrix V. A row adds (diag(p) - p p') V x x'; `change` becomes X V'."""
    total = torch.zeros_like(vector)
    weights, narrow = point.weights.to(dtype), vector.to(dtype)
    for block, some in rows.blocks(dtype):
        chances = _softmax(some @ weights.T) if probabilities is None else probabilities[block]
        logits = torch.mm(some, narrow.T, out=None if change is None else change[block])
        bent = chances * logits
        bent.addcmul_(chances, bent.sum(dim=1, keepdim=True), value=-1)
        add_block(total, bent, some)
    rows.add_up(total)
    return total.div_(rows.share.n).add_(vector, alpha=point.mu)


def _evaluate(rows: _Rows, weights: Tensor, mu: float, dtype: torch.dtype, logits: Tensor | None = None) -> _Point:
    """Evaluate objective and gradient over the rows of all ranks; `logits`, where known, are kept with their probabilities."""
    share, sums = rows.share, rows.sums(dtype)
    weights, gradient = weights.to(sums), torch.zeros_like(weights, dtype=sums)
    spread = weights.new_zeros(share.n_classes + 1, dtype=torch.float64)  # and the loss
    narrow, probabilities = weights.to(dtype), torch.empty_like(logits) if logits is not None else None
    for block, some in rows.blocks(dtype):
        label = share.labels[block, None]
        part = some @ narrow.T if logits is None else logits[block]
        chances = _softmax(part, out=None if probabilities is None else probabilities[block])
        # log-sum-exp = largest logit - log of the largest probability, which is at least 1 / n_classes.
        normaliser = part.amax(dim=1) - chances.amax(dim=1).log()
        spread[-1] += (normaliser - part.gather(1, label)[:, 0]).sum(dtype=torch.float64)
        if rows.axes is not None:
            spread[:-1] += chances.sum(dim=0, dtype=torch.float64) - chances.square().sum(dim=0, dtype=torch.float64)
        own = chances.gather(1, label)
        chances.scatter_(1, label, own - 1)  # the residual P - Y, without a copy of P
        add_block(gradient, chances, some)
        chances.scatter_(1, label, own)
    rows.add_up(gradient)
    rows.add_up(spread)
    gradient.div_(share.n).add_(weights, alpha=mu)
    loss, squared, slope = read_scalars(spread[-1], dot(weights, weights), dot(gradient, gradient))
    objective = loss / share.n + mu / 2 * squared
    return _Point(
        mu=mu,
        weights=weights,
        objective=objective,
        gap=relative_gap(objective, slope, mu),
        gradient=gradient,
        spread=spread[:-1] / share.n,
        logits=logits,
        probabilities=probabilities,
    )


def _softmax(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute probabilities of rows. In float32 negligible ones are zero, because products with subnormal numbers are slow."""
    chances = torch.softmax(logits, dim=1, out=out)
    return chances if logits.dtype == torch.float64 else torch.threshold_(chances, _NEGLIGIBLE, 0.0)


def _measure(share: RowShare) -> _Rows:
    """Measure each row's mean and the length of what is left of it, in float64 as `centre_rows` does, and the moment."""
    shift, scale = (share.values.new_zeros(len(share.values), 1, dtype=torch.float32) for _ in range(2))
    size = chunk_rows(share)
    for block in (slice(first, first + size) for first in range(0, len(share.values), size)):
        values = share.values[block].double()
        mean = values.mean(dim=1, keepdim=True)
        constant = (centre_rows(values) == 0).all(dim=1, keepdim=True)
        shift[block] = mean
        scale[block] = torch.where(constant, 0.0, 1 / (values - mean).norm(dim=1, keepdim=True))
    rows = _Rows(share=share, shift=shift, scale=scale)
    moment = share.values.new_zeros(share.width, share.width, dtype=torch.float64)
    for _, some in rows.blocks(torch.float32):
        moment += some.T @ some
    rows.add_up(moment)
    strengths, axes = torch.linalg.eigh(moment / share.n)
    return replace(rows, axes=axes, strengths=strengths.clamp_min(0))


def chunk_rows(share: RowShare) -> int:
    """Return the rows of a chunk: small beside the features, and fewer where memory is short."""
    cuda = share.values.is_cuda
    most = _CHUNK_VALUES_CUDA if cuda else _CHUNK_VALUES
    free = torch.cuda.mem_get_info(share.values.device)[0] if cuda else available_bytes()
    if free is not None:
        most = min(most, free // (2 * _TEMPORARIES))
    return max(1, most // (share.width + share.n_classes))
