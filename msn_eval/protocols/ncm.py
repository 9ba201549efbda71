"""Nearest class mean: the probe without hyper-parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msn_eval.features import Features
from msn_eval.protocols.fitted import Fitted, Setting
from msn_eval.protocols.rows import normalised_rows


@dataclass(frozen=True, kw_only=True)
class NearestClassMean:
    """Cosine of normalised rows to the mean of each class's normalised rows.

    Source: Mensink et al. 2013, "Distance-based image classification"; with cosines, Snell et al. 2017.
    """

    name: ClassVar[str] = "ncm"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls-norm"


def fit_ncm(probe: NearestClassMean, train: Features, device: torch.device) -> Fitted:
    """Average each class. A class without images can never be chosen."""
    rows = normalised_rows(train.values.to(device))
    labels = train.labels.to(device)
    counts = torch.bincount(labels, minlength=train.n_classes)
    sums = rows.new_zeros(train.n_classes, rows.shape[1]).index_add_(0, labels, rows)
    directions = normalised_rows(sums)  # the mean's length cancels in the cosine

    def scores(values: Tensor) -> Iterator[Tensor]:
        cosines = normalised_rows(values.to(device)) @ directions.T
        yield cosines.masked_fill(counts == 0, -torch.inf)

    return Fitted(settings=(Setting(params={}),), scores=scores)
