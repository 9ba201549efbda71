"""Full data: the logistic objective over more rows than there is room for their logits, in chunks, on any number of ranks.

Features stay as the encoder gave them, in float32. What a pass over them makes of a chunk is forgotten with it; sums over
chunks and ranks are float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msn_eval.probes.base import centred_rows
from msn_eval.probes.logistic_solvers.objective import Solution
from msn_eval.process import available_bytes

_ROUGH, _FINE = torch.float32, torch.float64
_WHOLE_BYTES = 1 << 30  # that all rows and their logits may take; a fixed number, so that machines do not differ
_CHUNK_VALUES = 1 << 20  # of rows and logits: small beside such features, and enough for a fast product
_CUDA_CHUNK_VALUES = 1 << 27
_TEMPORARIES = 64  # bytes a value of a chunk, all temporaries of the float64 pass together
_MOST_STEPS = 100
_MOST_PRODUCTS = 100  # curvature products a step
_MOST_TRIALS = 20  # of a line search
_LOOSEST_FORCING = 0.25
_SLOPE_SHARE = 0.5
_AMPLE = 0.25  # share of the target to which a step is solved, so that rounding does not cost another


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """The labelled rows of one rank, and how sums over those of all ranks are made.

    values: (m, d) float32 as the encoder gave them, on the device that computes; never copied whole
    labels: (m,) int64 in [0, n_classes), on the same device
    n:      rows of all ranks
    total:  adds up a tensor over all ranks, in place, and leaves every rank the same bits; None where there is one
    """

    values: Tensor
    labels: Tensor
    n_classes: int
    n: int
    total: Callable[[Tensor], None] | None = None

    @property
    def width(self) -> int:
        return self.values.shape[1]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of a share, ready to be prepared quickly: value less `shift`, times `scale`, both (m, 1) float32."""

    share: RowShare
    shift: Tensor
    scale: Tensor


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A trial solution: float64 throughout, of all ranks. spread: (n_classes,), the mean of p (1 - p) over rows."""

    weights: Tensor
    objective: float
    gradient: Tensor
    gap: float
    spread: Tensor


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """The rows' second moment, X'X / n: its axes (d, d) and their strengths (d,), in float64."""

    axes: Tensor
    strengths: Tensor


def is_large(n: int, width: int, n_classes: int) -> bool:
    """Tell whether rows in float64 and float32, and the four matrices of logits that Newton's method keeps, are too much."""
    return n * (12 * width + 16 * n_classes) > _WHOLE_BYTES


def minimise_in_chunks(share: RowShare, mus: Sequence[float], *, target: float) -> Iterator[tuple[Solution, int]]:
    """Minimise mean cross-entropy + (mu / 2) ||W||^2 for several mus in turn, best from large to small; every rank calls it.

    Rows are centred and normalised a chunk at a time. Newton's method with conjugate gradients, in the axes of the rows'
    second moment, where the curvature of every class is all but diagonal. Products are float32 as far as that leads; what
    is returned is evaluated in float64 over all rows, and where that does not meet the target, the rest of the way has its
    gradients in float64 and, where rows are all but certain, the last of it the products inside a step as well.
    """
    rows = _measured(share)
    axes = _moment(rows)
    weights = share.values.new_zeros(share.n_classes, share.width, dtype=torch.float64)
    for mu in mus:
        point, steps = _walk(rows, axes, _evaluate(rows, weights, mu, _ROUGH), mu, target, _ROUGH, _ROUGH)
        point = _evaluate(rows, point.weights, mu, _FINE)
        for products in (_ROUGH, _FINE):
            point, more = _walk(rows, axes, point, mu, target, _FINE, products)
            steps += more
        weights = point.weights
        yield Solution(weights=weights, objective=point.objective, gap=point.gap), steps


def _walk(
    rows: _Rows, axes: _Axes, point: _Point, mu: float, target: float, dtype: torch.dtype, products: torch.dtype
) -> tuple[_Point, int]:
    """Walk until the gap meets the target or `dtype`, and `products` for the curvature, have no better answer."""
    for step in range(_MOST_STEPS):
        if point.gap <= target:
            return point, step
        moved = _moved(rows, point, _direction(rows, axes, point, mu, target, products), mu, dtype)
        if not moved.gap < point.gap and not moved.objective < point.objective:
            return point, step
        point = moved
    return point, _MOST_STEPS


def _moved(rows: _Rows, point: _Point, direction: Tensor, mu: float, dtype: torch.dtype) -> _Point:
    """Go along a line to where its slope has all but vanished; a full step, as a rule, and then one pass."""
    first = _inner(point.gradient, direction)
    length, shortest, longest = 1.0, 0.0, math.inf
    moved = point
    for trial in range(_MOST_TRIALS):
        moved = _evaluate(rows, point.weights + length * direction, mu, dtype)
        slope = _inner(moved.gradient, direction)
        if abs(slope) <= _SLOPE_SHARE * abs(first):
            break
        shortest, longest = (length, longest) if slope < 0 else (shortest, length)
        secant = length * first / (first - slope) if slope != first else longest
        if longest == math.inf:
            length *= 2
        elif trial % 2 == 0 and shortest < secant < longest:
            length = secant
        else:  # a slope that is steep on one side alone keeps secants close to the other
            length = (shortest + longest) / 2
    return moved


def _direction(rows: _Rows, axes: _Axes, point: _Point, mu: float, target: float, products: torch.dtype) -> Tensor:
    """Solve H D = -gradient by preconditioned conjugate gradients, as finely as the target needs."""
    residual = -point.gradient
    direction = torch.zeros_like(residual)
    scaled = _unbent(axes, point, mu, residual)
    search = scaled.clone()
    squared = _inner(residual, scaled)
    forcing = min(_LOOSEST_FORCING, 0.5 * math.sqrt(point.gap))
    goal = forcing**2 * squared
    ample = _AMPLE * target * 2 * mu * point.objective  # of the squared gradient that the residual will be
    for _ in range(_MOST_PRODUCTS):
        product = _curvature_product(rows, point, mu, search, products)
        curvature = _inner(search, product)
        if not curvature > 0:  # rounding; the Hessian is positive definite
            break
        length = squared / curvature
        direction.add_(search, alpha=length)
        residual.sub_(product, alpha=length)
        scaled = _unbent(axes, point, mu, residual)
        previous, squared = squared, _inner(residual, scaled)
        if squared <= goal or _inner(residual, residual) <= ample:
            break
        search.mul_(squared / previous).add_(scaled)
    return direction


def _unbent(axes: _Axes, point: _Point, mu: float, vector: Tensor) -> Tensor:
    """Divide by a curvature that takes probabilities and rows for independent, and classes for unrelated."""
    bend = point.spread[:, None] * axes.strengths + mu
    return ((vector @ axes.axes) / bend) @ axes.axes.T


def _evaluate(rows: _Rows, weights: Tensor, mu: float, dtype: torch.dtype) -> _Point:
    """Evaluate objective, gradient and relative duality gap, as `cross_entropy.certify` does, over the rows of all ranks."""
    classes, width = weights.shape
    sums = weights.new_zeros(classes * width + classes + 1)
    gradient, spread = sums[: classes * width].view(classes, width), sums[classes * width : -1]
    narrow = weights.to(dtype)
    for some, labels in _chunks(rows, dtype):
        logits, label = some @ narrow.T, labels[:, None]
        own_logit = logits.gather(1, label)[:, 0]
        normaliser = logits.logsumexp(dim=1)
        sums[-1] += (normaliser - own_logit).sum(dtype=torch.float64)
        chances = logits.sub_(normaliser[:, None]).exp_()
        spread += chances.sum(dim=0, dtype=torch.float64) - chances.square().sum(dim=0, dtype=torch.float64)
        gradient += _residual(chances, label).T @ some
    _add_up(rows.share, sums)
    gradient = torch.add(mu * weights, gradient, alpha=1 / rows.share.n)
    objective = float(sums[-1]) / rows.share.n + mu / 2 * _inner(weights, weights)
    gap = _inner(gradient, gradient) / (2 * mu * objective)
    return _Point(weights=weights, objective=objective, gradient=gradient, gap=gap, spread=spread / rows.share.n)


def _residual(chances: Tensor, label: Tensor) -> Tensor:
    return chances.scatter_add_(1, label, chances.new_full(label.shape, -1.0))


def _curvature_product(rows: _Rows, point: _Point, mu: float, vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the Hessian times (n_classes, d) `vector`, in `dtype` within a chunk."""
    total = torch.zeros_like(vector)
    weights, narrow = point.weights.to(dtype), vector.to(dtype)
    for some, _ in _chunks(rows, dtype):
        chances = (some @ weights.T).softmax(dim=1)
        bent = (some @ narrow.T).mul_(chances)
        total += bent.sub_(chances.mul_(bent.sum(dim=1, keepdim=True))).T @ some
    _add_up(rows.share, total)
    return torch.add(mu * vector, total, alpha=1 / rows.share.n)


def _moment(rows: _Rows) -> _Axes:
    width = rows.share.width
    total = rows.share.values.new_zeros(width, width, dtype=torch.float64)
    for some, _ in _chunks(rows, torch.float32):
        total += some.T @ some
    _add_up(rows.share, total)
    strengths, axes = torch.linalg.eigh(total / rows.share.n)
    return _Axes(axes=axes, strengths=strengths.clamp_min(0))


def _measured(share: RowShare) -> _Rows:
    """Measure every row once, in float64: its mean, and the length of what is left of it, as `centred_rows` does."""
    size = chunk_rows(share)
    shift, scale = (share.values.new_zeros(len(share.values), 1, dtype=torch.float32) for _ in range(2))
    for first in range(0, len(share.values), size):
        some = slice(first, first + size)
        prepared = centred_rows(share.values[some])
        values = share.values[some].to(torch.float64)
        mean = values.mean(dim=1, keepdim=True)
        length = (values - mean).norm(dim=1, keepdim=True)
        shift[some] = mean.to(torch.float32)
        constant = (prepared == 0).all(dim=1, keepdim=True)
        scale[some] = torch.where(constant, 0.0, 1 / length).to(torch.float32)
    return _Rows(share=share, shift=shift, scale=scale)


def _chunks(rows: _Rows, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the rows as the protocol prepares them, with their labels, a chunk at a time: exactly in float64, and in float32
    to its rounding."""
    share = rows.share
    size = chunk_rows(share)
    for first in range(0, len(share.values), size):
        some = slice(first, first + size)
        if dtype == torch.float64:
            prepared = centred_rows(share.values[some])
        else:
            prepared = (share.values[some] - rows.shift[some]).mul_(rows.scale[some])
        yield prepared, share.labels[some]


def chunk_rows(share: RowShare) -> int:
    """Give the rows of a chunk: what is cheap beside the features, and less where memory is short."""
    values = share.width + share.n_classes
    cuda = share.values.device.type == "cuda"
    most = _CUDA_CHUNK_VALUES if cuda else _CHUNK_VALUES
    free = torch.cuda.mem_get_info(share.values.device)[0] if cuda else available_bytes()
    if free is not None:
        most = min(most, free // (2 * _TEMPORARIES))
    return max(1, most // values)


def _add_up(share: RowShare, sums: Tensor) -> None:
    if share.total is not None:
        share.total(sums)


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())
