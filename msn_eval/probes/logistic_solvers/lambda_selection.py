"""The choice of lambda from labelled rows alone: by leaving images out where every class can spare one, and by the spread of
the rows where that says nothing.

With one image a class a left-out image belongs to a class that the rest do not have, so no lambda predicts it better than
another. What is left to go by is how far the rows are from each other: the spectrum of their scatter.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RULE = 1  # raised whenever the same labelled rows would choose otherwise
GRID = tuple(10.0 ** (step / 2) for step in range(-10, 3))
_SHARE_OF_MEDIAN = 0.3
_EPSILON = 1e-10  # of the largest eigenvalue: what is smaller is rounding
_BLOCK_ROWS = 4096
_ERRORS_APART = 2.0  # standard errors above the smallest left-out error, beyond which another is told from it


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Rows that are looked at, never all of them at once.

    labels:   (n,) int64, every class from 0 up present
    prepared: from (b,) row numbers to (b, width) rows as the protocol has them, float32 or float64
    """

    labels: Tensor
    width: int
    prepared: Callable[[Tensor], Tensor]

    @property
    def n(self) -> int:
        return len(self.labels)

    def blocks(self, numbers: Tensor) -> Iterator[Tensor]:
        """Give the rows of some numbers in float64, a block at a time."""
        return (self.prepared(some).to(torch.float64) for some in torch.split(numbers, _BLOCK_ROWS))

    def by_class(self) -> list[Tensor]:
        """Give the numbers of each class's rows."""
        return list(torch.split(self.labels.argsort(stable=True), torch.bincount(self.labels).tolist()))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A strength of GRID, and how it was come by.

    rule:     `leave-one-out` or `spectrum`
    typical:  what the spectrum alone suggests, before it is rounded to the grid
    left_out: share of left-out rows that the fit at the chosen strength gets wrong; None where none can be left out
    """

    strength: float
    rule: str
    typical: float
    left_out: float | None = None

    def as_chosen(self) -> dict[str, float | str]:
        """Give the choice as it stands in a record."""
        told: dict[str, float | str] = {"lambda": self.strength, "rule": self.rule, "typical": self.typical}
        return told if self.left_out is None else {**told, "left_out_error": self.left_out}


def auto_settings() -> tuple[dict[str, int | float], ...]:
    """Give the one protocol, which rule and grid are part of: the grid's ends and its number of strengths, equal steps in log."""
    return ({"auto": RULE, "lambda_first": GRID[0], "lambda_last": GRID[-1], "lambdas": len(GRID)},)


def can_be_left_out(labels: Tensor) -> bool:
    """Tell whether every class that is there has a second row."""
    return int(torch.unique(labels, return_counts=True)[1].min()) > 1


def typical_strength(labelled: LabelledRows) -> float:
    """Give 0.3 times the median of what is not zero of the spectrum of the rows' scatter about their mean.

    Lambda is what the penalty adds to the curvature along an axis of the rows, and the eigenvalue is what the rows
    give it: where a typical axis has less than lambda, the fit ignores most of what tells the rows apart.
    """
    device = labelled.labels.device
    scatter = torch.zeros(labelled.width, labelled.width, dtype=torch.float64, device=device)
    total = scatter.new_zeros(labelled.width)
    for rows in labelled.blocks(torch.arange(labelled.n, device=device)):
        scatter += rows.T @ rows
        total += rows.sum(dim=0)
    spectrum = torch.linalg.eigvalsh(torch.addr(scatter, total, total, alpha=-1 / labelled.n))
    there = spectrum[spectrum > _EPSILON * spectrum.max().clamp_min(_EPSILON)]
    return _SHARE_OF_MEDIAN * float(there.median()) if len(there) else GRID[0]


def left_out_error(labelled: LabelledRows, weights: Tensor, strength: float) -> float:
    """Give the share of rows that a fit to all others would get wrong, estimated from the fit to all.

    weights: (n_classes, d), the minimum for `strength` over all rows
    Without a row, its logit of class c moves by h (p_c - y_c) / (1 - w_c h) with h = x' H_c^-1 x: one Newton step from the
    fit to all. H_c is the Hessian's block of class c. In it the rows of c have their own curvature and all others the mean of
    theirs over classes not their own, which is the same for every c; for the classes that a row is not of, its class's own
    part is left out of H_c too. Curvatures p (1 - p) are enlarged by n_classes / (n_classes - 1) in place of what links
    classes. With two classes this is the Newton step, nothing cut.
    Source of the step: arXiv:1801.10243; how the Hessian is cut is ours.
    """
    classes = labelled.by_class()
    shared = strength * torch.eye(labelled.width, dtype=torch.float64, device=weights.device)
    for own, numbers in enumerate(classes):
        for rows in labelled.blocks(numbers):
            shared += _weighted(rows, _elsewhere(_curvatures(rows, weights), own))
    abroad = torch.linalg.inv(shared)
    wrong = 0
    for own, numbers in enumerate(classes):
        bent = shared.clone()
        for rows in labelled.blocks(numbers):
            curvatures = _curvatures(rows, weights)
            bent += _weighted(rows, curvatures[:, own] - _elsewhere(curvatures, own))
        at_home = torch.linalg.inv(bent)
        wrong += sum(_wrong(rows, weights, own, at_home, abroad) for rows in labelled.blocks(numbers))
    return wrong / labelled.n


def _wrong(rows: Tensor, weights: Tensor, own: int, at_home: Tensor, abroad: Tensor) -> int:
    """Count the rows of a class that are wrong once they are left out; inverse Hessians for their class and the others."""
    logits = rows @ weights.T
    chances = logits.softmax(dim=1)
    curvatures = _curvatures(rows, weights)
    pull = ((rows @ abroad) * rows).sum(dim=1, keepdim=True).repeat(1, len(weights))
    pull[:, own] = ((rows @ at_home) * rows).sum(dim=1)
    chances[:, own] -= 1
    logits += pull * chances / (1 - curvatures * pull).clamp_min(_EPSILON)
    return int((logits.argmax(dim=1) != own).sum())


def _curvatures(rows: Tensor, weights: Tensor) -> Tensor:
    chances = (rows @ weights.T).softmax(dim=1)
    return chances * (1 - chances) * (len(weights) / (len(weights) - 1))


def _elsewhere(curvatures: Tensor, own: int) -> Tensor:
    return (curvatures.sum(dim=1) - curvatures[:, own]) / (curvatures.shape[1] - 1)


def _weighted(rows: Tensor, factors: Tensor) -> Tensor:
    return (rows * factors[:, None]).T @ rows


def choose_strength(errors: Sequence[float], *, n: int, typical: float) -> int:
    """Give the place on GRID: of the strengths whose left-out error cannot be told from the smallest, the one nearest to
    what the spectrum suggests, of two the larger.

    errors: a strength each; n: rows
    The error of a few images hardly tells strengths apart, and to follow it is worse than not to look. An error that is
    zero has the standard error of one image.
    """
    smallest = min(errors)
    allowed = smallest + _ERRORS_APART * math.sqrt(max(smallest * (1 - smallest), 1 / n) / n)
    close = [place for place, error in enumerate(errors) if error <= allowed]
    return max(close, key=lambda place: (-abs(math.log(GRID[place] / typical)), place))


def choose_by_spectrum(typical: float) -> int:
    """Give the place on GRID nearest to what the spectrum suggests."""
    return choose_strength([0.0] * len(GRID), n=1, typical=typical)
