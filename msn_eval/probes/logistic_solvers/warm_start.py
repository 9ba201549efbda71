"""Warm start: where the solutions of earlier problems lead one that differs from them in mu alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Point, evaluate_point

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
