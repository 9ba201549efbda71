"""Collapse: numbers that tell whether representations still differ from image to image."""

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def spread(features: Tensor) -> float:
    """Give how much L2-normalised rows differ: 0 where all are equal, near 1 where their directions are random.

    features: (n, d)
    The standard deviation over rows, averaged over columns, times the square root of d.
    Source: arXiv:2011.10566, section 4.1.
    """
    rows = functional.normalize(features.float(), dim=1)
    return float(rows.std(dim=0, correction=0).mean() * rows.shape[1] ** 0.5)


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Give how many directions rows fill: the exponential of the entropy of the singular values, 1 to min(n, d).

    features: (n, d)
    Source: Garrido et al. 2023, arXiv:2210.02885 (RankMe).
    """
    rows = features.double()
    # Their squares are the eigenvalues of the smaller product, which takes half the time of a decomposition.
    squares = torch.linalg.eigvalsh(rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T)
    rounding = squares[-1] * len(squares) * torch.finfo(squares.dtype).eps
    values = torch.where(squares > rounding, squares, 0.0).sqrt()
    if not bool(values.sum() > 0):
        return 1.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def prototypes_in_use(targets: Tensor) -> int:
    """Give how many prototypes are the largest of some row. targets: (n, k)."""
    return len(set(targets.argmax(dim=1).tolist()))


@torch.no_grad()
def mean_entropy(targets: Tensor) -> float:
    """Give the mean entropy of rows that sum to 1, in nats. targets: (n, k)."""
    return float(torch.special.entr(targets.double()).sum(dim=1).mean())
