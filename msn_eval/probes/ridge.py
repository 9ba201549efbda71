"""Ridge regression onto one-hot targets, its strength chosen by the exact leave-one-out error."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup, centred_rows

# alpha = 10^-4, 10^-3.5, … 10^4: rows have unit length, so the Gram matrix's eigenvalues lie between 0 and n.
GRID = tuple(float(10 ** (step / 2)) for step in range(-8, 9))
_FEWEST_LEFT = 1e-10  # of a row's own weight in its prediction; below it leave-one-out is rounding


@dataclass(frozen=True, kw_only=True)
class Ridge(FeatureProbe):
    """One-hot targets less the class prior, squared error + alpha ||W||^2, an unpenalised bias.

    alpha is the one of GRID with the smallest leave-one-out squared error, of equal ones the largest: chosen from the
    labelled images alone, and so no part of the protocol; the grid and the rule are.
    Source: Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", sections 4.2 and 7.10.
    """

    name: ClassVar[str] = "ridge"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls"

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,)

    def configs(self, n: int) -> tuple[Params, ...]:
        return ridge_settings()

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        return fit_ridge(self, train, device)


@dataclass(frozen=True, kw_only=True)
class RidgeFit:
    """A fit at the chosen strength: scores are (x - centre) @ weights + bias.

    weights: (d, n_classes) float64; centre: (d,); bias: (n_classes,)
    errors:  (len(GRID),) mean squared leave-one-out error over rows and classes, a strength each
    """

    weights: Tensor
    centre: Tensor
    bias: Tensor
    alpha: float
    errors: Tensor


def ridge_settings() -> tuple[dict[str, int | float], ...]:
    """Give the one protocol, which the grid is part of: its ends and its number of strengths, equal steps in log."""
    return ({"alpha_first": GRID[0], "alpha_last": GRID[-1], "alphas": len(GRID)},)


def fit_ridge(probe: Ridge, train: Features, device: torch.device) -> FittedProbe:
    """Fit every strength from one eigendecomposition and keep the best. A class without images is never chosen.

    Raises NumericalError for labelled images of a single class.
    """
    present, labels = torch.unique(train.labels.to(device), return_inverse=True)
    if len(present) < 2:
        raise NumericalError("ridge regression on a single class", hint="Label images of at least two classes.")
    fit = solve_ridge(centred_rows(train.values.to(device)), labels, n_classes=len(present))
    chosen = {"alpha": fit.alpha, "left_out_error": float(fit.errors.min())}
    setting = ProbeConfig(params=ridge_settings()[0], chosen=chosen)

    def scores(values: Tensor) -> Iterator[Tensor]:
        queries = centred_rows(values.to(device))
        whole = queries.new_full((len(queries), train.n_classes), -torch.inf)
        whole[:, present] = (queries - fit.centre) @ fit.weights + fit.bias
        yield whole

    return FittedProbe(settings=(setting,), scores=scores)


def solve_ridge(rows: Tensor, labels: Tensor, *, n_classes: int) -> RidgeFit:
    """Fit ridge regression at the strength of GRID whose leave-one-out error is smallest.

    rows:   (n, d) float64
    labels: (n,) int64 in [0, n_classes), every class present
    With an unpenalised bias the fit is that of centred rows onto centred targets, which one-hot targets less their
    class's share are. Leaving row i out changes its residual to r_i / (1 - H_ii), H being the hat matrix with the bias
    in it (Allen 1974); H and every fit come from the eigendecomposition of the smaller of X'X and XX'.
    """
    n = len(rows)
    centre = rows.mean(dim=0)
    centred = rows - centre
    prior = torch.bincount(labels, minlength=n_classes).to(rows.dtype) / n
    targets = -prior.repeat(n, 1)
    targets[torch.arange(n, device=rows.device), labels] += 1
    basis, variances = _principal_axes(centred, scale=float(rows.square().sum()))
    left = (centred @ basis) / variances.sqrt()  # (n, r) left singular vectors
    pulled = left.T @ targets
    alphas = rows.new_tensor(GRID)
    errors = torch.stack([_left_out_error(left, variances, pulled, targets, alpha) for alpha in alphas])
    # Flat as it may be, the choice must not hang on rounding: of errors that are equal to ten digits, the smoothest fit.
    tied = errors <= errors.min() * (1 + 1e-10)
    chosen = int(tied.nonzero().max())
    alpha = GRID[chosen]
    weights = basis @ ((variances.sqrt() / (variances + alpha))[:, None] * pulled)
    return RidgeFit(weights=weights, centre=centre, bias=prior, alpha=alpha, errors=errors)


def _principal_axes(centred: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Give orthonormal axes (d, r) and the squared singular values (r,) of centred rows, those of rounding left out.

    scale: squared norm of the rows before they were centred, by which equal rows are known
    """
    n, d = centred.shape
    variances, vectors = torch.linalg.eigh(centred.T @ centred if d <= n else centred @ centred.T)
    eps = torch.finfo(centred.dtype).eps
    there = variances > eps * max(n, d) * variances.max().clamp_min(eps * scale)
    variances, vectors = variances[there], vectors[:, there]
    return (vectors if d <= n else centred.T @ vectors / variances.sqrt()), variances


def _left_out_error(left: Tensor, variances: Tensor, pulled: Tensor, targets: Tensor, alpha: Tensor) -> Tensor:
    """Give the mean squared error of predicting every row from all others, at one strength."""
    kept = variances / (variances + alpha)
    own_weight = left.square() @ kept + 1 / len(left)
    residual = targets - left @ (kept[:, None] * pulled)
    # Targets less the class prior: leaving a row out moves the prior too, which the bias absorbs.
    return (residual / (1 - own_weight).clamp_min(_FEWEST_LEFT)[:, None]).square().mean()


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[Ridge]:
    """Yield the probe, which has no options."""
    yield Ridge()
