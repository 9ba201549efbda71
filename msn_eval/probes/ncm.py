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
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup, normalised_rows


@dataclass(frozen=True, kw_only=True)
class NearestClassMean(FeatureProbe):
    """Cosine of normalised rows to the mean of each class's normalised rows.

    Source: Mensink et al. 2013, "Distance-based image classification"; with cosines, Snell et al. 2017.
    """

    name: ClassVar[str] = "ncm"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls-norm"

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,)

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
        return fit_ncm(self, train, device)


def fit_ncm(probe: NearestClassMean, train: Features, device: torch.device) -> FittedProbe:
    """Average each class. A class without images can never be chosen."""
    rows = normalised_rows(train.values.to(device))
    labels = train.labels.to(device)
    counts = torch.bincount(labels, minlength=train.n_classes)
    directions = class_directions(rows, labels, n_classes=train.n_classes)

    def scores(values: Tensor) -> Iterator[Tensor]:
        cosines = normalised_rows(values.to(device)) @ directions.T
        yield cosines.masked_fill(counts == 0, -torch.inf)

    return FittedProbe(settings=(ProbeConfig(params={}),), scores=scores)


def class_directions(rows: Tensor, labels: Tensor, *, n_classes: int) -> Tensor:
    """Give the unit vector that each class's mean points along, zero where it points nowhere.

    rows:    (n, d) float64, of unit length or zero
    labels:  (n,) int64 in [0, n_classes)
    returns: (n_classes, d) float64; the mean's length cancels in the cosine
    """
    sums = rows.new_zeros(n_classes, rows.shape[1]).index_add_(0, labels, rows)
    # What is left of rows that cancel is rounding, and must not be blown up to unit length.
    rounding = torch.finfo(rows.dtype).eps * torch.bincount(labels, minlength=n_classes)[:, None]
    return normalised_rows(torch.where(sums.abs().amax(dim=1, keepdim=True) <= rounding, torch.zeros_like(sums), sums))


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[NearestClassMean]:
    """Yield the probe, which has no options."""
    yield NearestClassMean()
