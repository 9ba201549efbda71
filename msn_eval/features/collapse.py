"""Statistics that detect collapse, where a network maps all images to nearly the same features."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

LEAST_SPREAD = 0.01  # random directions have 1, equal rows 0
LEAST_RANK = 1.05
COLLAPSED_LINES = 10  # consecutive journal lines before an alarm


def is_collapsed(statistics: Mapping[str, float | None]) -> bool:
    """Whether `feature_spread`, `output_spread` or `feature_rank` is below its limit. Missing values and NaN are ignored."""
    limits = {"feature_spread": LEAST_SPREAD, "output_spread": LEAST_SPREAD, "feature_rank": LEAST_RANK}
    return any((value := statistics.get(name)) is not None and value < limit for name, limit in limits.items())


@torch.no_grad()
def spread(features: Tensor) -> float:
    """Compute how much the directions of rows differ: 0 if all are equal, near 1 if they are random.

    This is the standard deviation of the L2-normalised rows, averaged over columns, times the square root of d.

    Args:
        features: (n, d).

    Source: Chen and He 2021, arXiv:2011.10566, section 4.1.
    """
    rows = functional.normalize(features.float(), dim=1)
    return float(rows.std(dim=0, correction=0).mean() * rows.shape[1] ** 0.5)


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Compute RankMe: the exponential of the entropy of the normalised singular values, in [1, min(n, d)].

    Args:
        features: (n, d).

    Source: Garrido et al. 2023, arXiv:2210.02885.
    """
    rows = features.double()
    # Squared singular values are the eigenvalues of the smaller Gram matrix: half the time of an SVD.
    squares = torch.linalg.eigvalsh(rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T)
    rounding_error = squares[-1] * len(squares) * torch.finfo(squares.dtype).eps
    values = torch.where(squares > rounding_error, squares, 0.0).sqrt()
    if not bool(values.sum() > 0):
        return 1.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
