"""Ridge regression onto one-hot targets, its penalty chosen by the exact leave-one-out error."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup, centre_rows

# alpha = 10^-4, 10^-3.5, … 10^4: rows have length 1, so the eigenvalues of the Gram matrix lie between 0 and n.
GRID = tuple(float(10 ** (step / 2)) for step in range(-8, 9))
_SMALLEST_REST = 1e-10  # of 1 - H_ii; below it the leave-one-out residual is rounding


@dataclass(frozen=True, kw_only=True)
class Ridge(FeatureProbe):
    """One-hot targets minus the class prior, squared error + alpha ||W||^2, an unpenalised bias.

    alpha is the value of GRID with the smallest leave-one-out squared error, of equal ones the largest. The labelled images
    choose it, so the grid and the rule are part of the protocol, alpha is not.
    Source: Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", sections 4.2 and 7.10.
    """

    name: ClassVar[str] = "ridge"
    version: ClassVar[int] = 1

    @property
    def taps(self) -> tuple[str, ...]:
        return ("cls",)

    def configs(self, n: int) -> tuple[Params, ...]:
        """Return the one protocol: the ends of the grid, whose steps are equal in log, and its size."""
        return ({"alpha_first": GRID[0], "alpha_last": GRID[-1], "alphas": len(GRID)},)

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        """Fit every alpha from one eigendecomposition and keep the best. A class without images is never chosen."""
        present, labels = torch.unique(train.labels.to(device), return_inverse=True)
        fit = solve_ridge(centre_rows(train.values.to(device)), labels, n_classes=len(present))
        chosen = {"alpha": fit.alpha, "left_out_error": float(fit.errors.min())}

        def scores(values: Tensor) -> Iterator[Tensor]:
            queries = centre_rows(values.to(device))
            result = queries.new_full((len(queries), train.n_classes), -torch.inf)
            result[:, present] = (queries - fit.centre) @ fit.weights + fit.bias
            yield result

        (params,) = self.configs(len(labels))
        return FittedProbe(settings=(ProbeConfig(params=params, chosen=chosen),), scores=scores)


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[Ridge]:
    """Yield the one probe."""
    yield Ridge()


@dataclass(frozen=True, kw_only=True)
class RidgeFit:
    """A fit at the chosen alpha: scores are (x - centre) @ weights + bias.

    Attributes:
        weights: (d, n_classes) float64.
        centre: (d,) float64.
        bias: (n_classes,) float64.
        alpha: The chosen penalty.
        errors: (len(GRID),) mean squared leave-one-out errors over rows and classes, one per alpha.
    """

    weights: Tensor
    centre: Tensor
    bias: Tensor
    alpha: float
    errors: Tensor


def solve_ridge(rows: Tensor, labels: Tensor, *, n_classes: int) -> RidgeFit:
    """Fit ridge regression at the alpha of GRID with the smallest leave-one-out error.

    With an unpenalised bias the fit is that of centred rows onto centred targets. Leaving row i out changes its residual to
    r_i / (1 - H_ii), where H is the hat matrix including the bias (Allen 1974); H and every fit follow from the
    eigendecomposition of the smaller of X'X and XX'.

    Args:
        rows: (n, d) float64.
        labels: (n,) int64 in [0, n_classes), every class present.
        n_classes: Number of classes.
    """
    n = len(rows)
    centre = rows.mean(dim=0)
    centred = rows - centre
    prior = torch.bincount(labels, minlength=n_classes).to(rows.dtype) / n
    targets = -prior.repeat(n, 1)
    targets[torch.arange(n, device=rows.device), labels] += 1
    basis, variances = _principal_axes(centred, scale=float(rows.square().sum()))
    left = (centred @ basis) / variances.sqrt()  # (n, r) left singular vectors
    projected = left.T @ targets
    errors = torch.stack(
        [_left_out_error(left, variances, projected, targets, alpha) for alpha in rows.new_tensor(GRID)]
    )
    # The choice must not depend on rounding: of errors that agree to ten digits, the largest alpha.
    tied = errors <= errors.min() * (1 + 1e-10)
    alpha = GRID[int(tied.nonzero().max())]
    weights = basis @ ((variances.sqrt() / (variances + alpha))[:, None] * projected)
    return RidgeFit(weights=weights, centre=centre, bias=prior, alpha=alpha, errors=errors)


def _principal_axes(centred: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Return orthonormal axes (d, r) and squared singular values (r,) of centred rows, without those that are rounding.

    `scale` is the squared norm of the rows before they were centred: it shows whether they are equal.
    """
    n, d = centred.shape
    variances, vectors = torch.linalg.eigh(centred.T @ centred if d <= n else centred @ centred.T)
    eps = torch.finfo(centred.dtype).eps
    kept = variances > eps * max(n, d) * variances.max().clamp_min(eps * scale)
    variances, vectors = variances[kept], vectors[:, kept]
    return (vectors if d <= n else centred.T @ vectors / variances.sqrt()), variances


def _left_out_error(left: Tensor, variances: Tensor, projected: Tensor, targets: Tensor, alpha: Tensor) -> Tensor:
    """Return the mean squared error of predicting every row from all others."""
    shrinkage = variances / (variances + alpha)
    leverage = left.square() @ shrinkage + 1 / len(left)  # H_ii; 1 / n is that of the bias
    residual = targets - left @ (shrinkage[:, None] * projected)
    return (residual / (1 - leverage).clamp_min(_SMALLEST_REST)[:, None]).square().mean()
