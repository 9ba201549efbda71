"""Selection of lambda from the labelled rows alone: by leave-one-out error if every class has two images, else by spectrum.

With one image per class, the class of a left-out image is missing from the rest, so no lambda predicts it better than
another. The spectrum of the rows' scatter, how far they are from each other, then decides.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RULE = 1  # version: increases whenever the same labelled rows would choose differently
GRID = tuple(10.0 ** (step / 2) for step in range(-10, 3))
_SHARE_OF_MEDIAN = 0.3
_EPSILON = 1e-10  # of the largest eigenvalue: smaller ones are rounding
_BLOCK_ROWS = 4096
_STANDARD_ERRORS = 2.0  # above the smallest left-out error, within which another is indistinguishable


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Rows that are read in blocks."""

    labels: Tensor  # (n,) int64, every class from 0 up present
    width: int  # number of features
    prepared: Callable[[Tensor], Tensor]  # from (b,) row indices to (b, width) rows of the protocol, float32 or float64

    @property
    def n(self) -> int:
        return len(self.labels)

    def blocks(self, indices: Tensor) -> Iterator[Tensor]:
        """Yield rows by index in float64, a block at a time."""
        return (self.prepared(some).to(torch.float64) for some in torch.split(indices, _BLOCK_ROWS))

    @cached_property
    def by_class(self) -> list[Tensor]:
        """The indices of each class's rows."""
        return list(torch.split(self.labels.argsort(stable=True), torch.bincount(self.labels).tolist()))


def auto_settings() -> tuple[dict[str, int | float], ...]:
    """Return the one protocol: the rule, the ends of the grid, whose steps are equal in log, and its size."""
    return ({"auto": RULE, "lambda_first": GRID[0], "lambda_last": GRID[-1], "lambdas": len(GRID)},)


def can_be_left_out(labels: Tensor) -> bool:
    """Whether every class has a second row."""
    return int(torch.unique(labels, return_counts=True)[1].min()) > 1


def typical_strength(labelled: LabelledRows) -> float:
    """Return 0.3 times the median nonzero eigenvalue of the rows' scatter about their mean.

    Lambda is what the penalty adds to the curvature along an axis of the rows, the eigenvalue what the rows add: if a
    typical axis has less than lambda, the fit ignores most of what distinguishes the rows.
    """
    device = labelled.labels.device
    scatter = torch.zeros(labelled.width, labelled.width, dtype=torch.float64, device=device)
    total = scatter.new_zeros(labelled.width)
    for rows in labelled.blocks(torch.arange(labelled.n, device=device)):
        scatter += rows.T @ rows
        total += rows.sum(dim=0)
    spectrum = torch.linalg.eigvalsh(torch.addr(scatter, total, total, alpha=-1 / labelled.n))
    nonzero = spectrum[spectrum > _EPSILON * spectrum.max().clamp_min(_EPSILON)]
    return _SHARE_OF_MEDIAN * float(nonzero.median()) if len(nonzero) else GRID[0]


def left_out_error(labelled: LabelledRows, weights: Tensor, strength: float) -> float:
    """Return the share of rows that a fit to all others would get wrong, estimated from the fit to all.

    `weights`, (n_classes, d), are the minimum over all rows for the lambda `strength`. Without a row, its logit of class c moves
    by h (p_c - y_c) / (1 - w_c h) with h = x' H_c^-1 x: one Newton step from the fit to all. H_c is the Hessian's block of class
    c. In it the rows of c have their own curvature and all others the mean of theirs over classes not their own, which is the
    same for every c; for the classes that a row is not of, its class's own part is left out of H_c too. Curvatures p (1 - p) are
    enlarged by n_classes / (n_classes - 1) in place of the blocks that link classes. With two classes this is the exact step.
    Source of the step: arXiv:1801.10243; the approximation of the Hessian is ours.
    """
    classes = labelled.by_class
    shared = strength * torch.eye(labelled.width, dtype=torch.float64, device=weights.device)
    for own, indices in enumerate(classes):
        for rows in labelled.blocks(indices):
            shared += _weighted(rows, _mean_of_others(_curvatures(rows, weights), own))
    other_inverse = _invert(shared)
    wrong = labelled.labels.new_zeros(())  # for each class the host would wait
    for own, indices in enumerate(classes):
        hessian = shared.clone()
        for rows in labelled.blocks(indices):
            curvatures = _curvatures(rows, weights)
            hessian += _weighted(rows, curvatures[:, own] - _mean_of_others(curvatures, own))
        own_inverse = _invert(hessian)
        for rows in labelled.blocks(indices):
            wrong += _wrong(rows, weights, own, own_inverse, other_inverse)
    return int(wrong) / labelled.n


def _invert(hessian: Tensor) -> Tensor:
    """Invert a matrix that is positive definite by at least lambda, without the check for which the host waits."""
    inverse: Tensor = torch.linalg.inv_ex(hessian).inverse
    return inverse


def _wrong(rows: Tensor, weights: Tensor, own: int, own_inverse: Tensor, other_inverse: Tensor) -> Tensor:
    """Count the rows of class `own` that are wrong once left out, by the inverse Hessians for it and for the other classes."""
    logits = rows @ weights.T
    probabilities = logits.softmax(dim=1)
    curvatures = _curvatures(rows, weights)
    pull = ((rows @ other_inverse) * rows).sum(dim=1, keepdim=True).repeat(1, len(weights))
    pull[:, own] = ((rows @ own_inverse) * rows).sum(dim=1)
    probabilities[:, own] -= 1
    logits += pull * probabilities / (1 - curvatures * pull).clamp_min(_EPSILON)
    return (logits.argmax(dim=1) != own).sum()


def _curvatures(rows: Tensor, weights: Tensor) -> Tensor:
    probabilities = (rows @ weights.T).softmax(dim=1)
    return probabilities * (1 - probabilities) * (len(weights) / (len(weights) - 1))


def _mean_of_others(curvatures: Tensor, own: int) -> Tensor:
    return (curvatures.sum(dim=1) - curvatures[:, own]) / (curvatures.shape[1] - 1)


def _weighted(rows: Tensor, factors: Tensor) -> Tensor:
    return (rows * factors[:, None]).T @ rows


def choose_strength(errors: Sequence[float], *, n: int, typical: float) -> int:
    """Return the index on GRID: of the lambdas whose left-out error is within two standard errors of the smallest, the one
    nearest to what the spectrum suggests, of two the larger.

    The error of a few images hardly distinguishes lambdas, and following it is worse than ignoring it. An error of zero has
    the standard error of one image. `errors` has one per lambda of GRID; `typical` is what the spectrum of the n rows suggests.
    """
    smallest = min(errors)
    allowed = smallest + _STANDARD_ERRORS * math.sqrt(max(smallest * (1 - smallest), 1 / n) / n)
    close = [index for index, error in enumerate(errors) if error <= allowed]
    return max(close, key=lambda index: (-abs(math.log(GRID[index] / typical)), index))


def choose_by_spectrum(typical: float) -> int:
    """Return the index on GRID nearest to what the spectrum suggests."""
    return choose_strength([0.0] * len(GRID), n=1, typical=typical)
