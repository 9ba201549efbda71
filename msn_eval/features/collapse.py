"""Collapse: numbers that tell whether representations still differ from image to image, and from where on they do not."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

LEAST_SPREAD = 0.01  # random directions have 1, equal rows 0
LEAST_RANK = 1.05
COLLAPSED_LINES = 10  # of a journal, one after the other


def is_collapsed(statistics: Mapping[str, float | None]) -> bool:
    """Tell whether all images look alike to the network, by `feature_spread`, `output_spread` and `feature_rank`; what is
    missing or no number tells nothing."""
    least = {"feature_spread": LEAST_SPREAD, "output_spread": LEAST_SPREAD, "feature_rank": LEAST_RANK}
    found = {name: statistics.get(name) for name in least}
    return any(value is not None and value < least[name] for name, value in found.items())


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
