"""A probe: the class whose mean feature is nearest in Euclidean distance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup


@dataclass(frozen=True, kw_only=True)
class NearestMean(FeatureProbe):
    """Nearest class mean in Euclidean distance. It has no hyper-parameters."""

    name: ClassVar[str] = "toy-nearest-mean"
    version: ClassVar[int] = 1

    @property
    def taps(self) -> tuple[str, ...]:
        return ("cls",)

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
        rows, labels = train.values.to(device), train.labels.to(device)
        present = labels.unique()  # a class can have no labelled image, and must never be predicted then
        means = torch.stack([rows[labels == label].mean(dim=0) for label in present])

        def scores(values: Tensor) -> Iterator[Tensor]:
            result = torch.full((len(values), train.n_classes), -torch.inf, dtype=torch.float64, device=device)
            result[:, present] = -torch.cdist(values.to(device), means).double()
            yield result

        return FittedProbe(settings=(ProbeConfig(params={}),), scores=scores)


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[NearestMean]:
    """Yield the probe for one draw of a subset."""
    yield NearestMean()
