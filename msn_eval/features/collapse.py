"""Statistics of features without labels: of their spectrum, and of collapse, where all images have nearly the same features."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LEAST_SPREAD = 0.01  # random directions have 1, equal rows 0
LEAST_RANK = 1.05
COLLAPSED_LINES = 10  # consecutive journal lines before an alarm
SPECTRUM_ROWS = 25_600  # of the features that a spectrum is computed from; as many as in arXiv:2210.02885
SPECTRUM_VERSION = 1  # raised whenever the same features would give different numbers
_FIRST_RANK, _LAST_RANK, _LEAST_RANKS = 4, 100, 10  # of the eigenvalues that the exponent is fitted to
_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Statistics of the singular values of features.

    Attributes:
        images: Number of rows that were used.
        rankme: Exponential of the entropy of the normalised singular values. None for one row, or if all are zero.
        alpha: Exponent of the decay of the eigenvalues of the covariance. None with fewer than 13 of them.
    """

    images: int
    rankme: float | None
    alpha: float | None


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
    """Compute RankMe: the exponential of the entropy of the normalised singular values, in [1, min(n, d)]; NaN of NaN.

    Args:
        features: (n, d).

    Source: Garrido et al. 2023, arXiv:2210.02885.
    """
    if not bool(features.isfinite().all()):
        return math.nan  # LAPACK would raise
    return _rankme(_squared_singular_values(features)) or 1.0


@torch.no_grad()
def measure_spectrum(features: Tensor) -> Spectrum:
    """Measure the spectrum of features, of `SPECTRUM_ROWS` of them at most, at equal distances.

    The exponent is minus the slope of log eigenvalue over log rank, by least squares with weight 1 / rank, over the ranks 4 to
    100 or as many as there are.

    Args:
        features: (n, d).

    Source: Garrido et al. 2023, arXiv:2210.02885; Agrawal et al. 2022, arXiv:2202.05808, with the weights and the ranks of
    its released code.
    """
    n = len(features)
    if n > SPECTRUM_ROWS:
        features = features[torch.arange(SPECTRUM_ROWS, device=features.device) * n // SPECTRUM_ROWS]
    squares = _squared_singular_values(features)
    # What is left of equal rows minus their mean is rounding too.
    centred = _squared_singular_values(features, features.mean(dim=0, dtype=torch.float64))
    eigenvalues = centred[centred > _rounding_error(squares)].flip(0).cpu().numpy()
    ranks = np.arange(_FIRST_RANK, min(_LAST_RANK, len(eigenvalues)) + 1)
    alpha = None
    if len(ranks) >= _LEAST_RANKS:
        # polyfit squares its weights.
        slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues[ranks - 1]), 1, w=ranks**-0.5)
        alpha = round(-float(slope), 4)
    rankme = _rankme(squares) if n > 1 else None
    return Spectrum(images=len(features), rankme=None if rankme is None else round(rankme, 4), alpha=alpha)


def _squared_singular_values(features: Tensor, centre: Tensor | float = 0.0) -> Tensor:
    """Return the squared singular values of (n, d) features minus a centre, ascending in float64."""
    # They are the eigenvalues of the smaller Gram matrix: half the time of an SVD.
    if features.shape[0] <= features.shape[1]:
        rows = features.double() - centre
        gram = rows @ rows.T
    else:
        gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
        for block in torch.split(features, _BLOCK_ROWS):
            rows = block.double() - centre
            gram += rows.T @ rows
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares


def _rounding_error(squares: Tensor) -> Tensor:
    return squares[-1] * len(squares) * torch.finfo(squares.dtype).eps


def _rankme(squares: Tensor) -> float | None:
    """Return RankMe of squared singular values, ascending; None if all are zero."""
    values = torch.where(squares > _rounding_error(squares), squares, 0.0).sqrt()
    if not bool(values.sum() > 0):
        return None
    return float(torch.special.entr(values / values.sum()).sum().exp())
