"""Nearest class mean: the probe without hyper-parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup, normalise_rows


@dataclass(frozen=True, kw_only=True)
class NearestClassMean(FeatureProbe):
    """Cosine of normalised rows to the mean of each class's normalised rows.

    Source: Mensink et al. 2013, "Distance-based image classification"; with cosines, Snell et al. 2017.
    """

    name: ClassVar[str] = "ncm"
    version: ClassVar[int] = 1

    @property
    def taps(self) -> tuple[str, ...]:
        return ("cls-norm",)

    def configs(self, n: int) -> tuple[Params, ...]:
        return ({},)

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        """Average the rows of each class. A class without images is never chosen."""
        rows = normalise_rows(train.values.to(device))
        labels = train.labels.to(device)
        counts = torch.bincount(labels, minlength=train.n_classes)
        directions = class_directions(rows, labels, n_classes=train.n_classes)

        def scores(values: Tensor) -> Iterator[Tensor]:
            cosines = normalise_rows(values.to(device)) @ directions.T
            yield cosines.masked_fill(counts == 0, -torch.inf)

        return FittedProbe(settings=(ProbeConfig(params={}),), scores=scores)


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[NearestClassMean]:
    """Yield the one probe."""
    yield NearestClassMean()


def class_directions(rows: Tensor, labels: Tensor, *, n_classes: int) -> Tensor:
    """Compute the direction of each class's mean.

    Args:
        rows: (n, d) float64, of length 1 or 0.
        labels: (n,) int64 in [0, n_classes).
        n_classes: Number of classes.

    Returns:
        (n_classes, d) float64 rows of length 1, zero where the rows of a class cancel or there are none.
    """
    sums = rows.new_zeros(n_classes, rows.shape[1]).index_add_(0, labels, rows)  # the length cancels in the cosine
    # What remains of rows that cancel is rounding, and must not be scaled up to length 1.
    rounding = torch.finfo(rows.dtype).eps * torch.bincount(labels, minlength=n_classes)[:, None]
    return normalise_rows(sums.masked_fill(sums.abs().amax(dim=1, keepdim=True) <= rounding, 0.0))
