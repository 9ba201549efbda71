"""Weighted nearest neighbours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup
from msn_eval.probes.distributed import search_on_workers
from msn_eval.probes.knn_search import Search, check_faiss, index_rows, search_nearest

_SHARED_VALUES = 1 << 26  # of a bank that ranks share: for fewer, the work of each rank costs more than the products


@dataclass(frozen=True, kw_only=True)
class NearestNeighbours(FeatureProbe):
    """The k nearest labelled rows by cosine vote for their classes with weight exp(cosine / temperature).

    Source: Wu et al. 2018, arXiv:1805.01978; k and temperature as in DINO, arXiv:2104.14294.
    """

    name: ClassVar[str] = "knn"
    version: ClassVar[int] = 1
    has_probabilities: ClassVar[bool] = True

    ks: tuple[int, ...] = (10, 20, 100, 200)  # every pair with a temperature is a protocol, and all share one search
    temperatures: tuple[float, ...] = (0.07,)  # positive
    search: Search = "auto"  # who proposes candidates, as `search_nearest` takes it
    asked: bool = False  # whether the user named the ks: one above the number of images is then an error

    @property
    def taps(self) -> tuple[str, ...]:
        return ("cls-norm",)

    def configs(self, n: int) -> tuple[Params, ...]:
        """Return the params of every protocol with n images. Raises NumericalError for a k above n that was asked for."""
        if self.asked and max(self.ks) > n:
            what = f"k = {max(self.ks)} neighbours among {n} labelled images"
            raise NumericalError(what, hint=f"Ask for --k of at most {n}, or for a larger subset.")
        return tuple({"k": k, "temperature": t} for k in self.ks if k <= n for t in self.temperatures)

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        """Index the labelled rows. Ranks in `workers` share the search of a large bank."""
        params, labels = self.configs(len(train.labels)), train.labels.to(device)
        if workers is not None and train.values.numel() >= _SHARED_VALUES:
            search = partial(search_on_workers, workers, bank=train.values, by=self.search)
        else:
            search = partial(search_nearest, bank=index_rows(train.values.to(device)), by=self.search)

        def scores(values: Tensor) -> Iterator[Tensor]:
            if not params:  # every k of the default list is above the number of labelled images
                return
            cosines, nearest = search(queries=values.to(device), k=max(int(config["k"]) for config in params))
            for config in params:
                k = int(config["k"])  # the k nearest are a prefix of the neighbours of the largest k
                classes, temperature = labels[nearest[:, :k]], float(config["temperature"])
                yield neighbour_vote(cosines[:, :k], classes, n_classes=train.n_classes, temperature=temperature)

        return FittedProbe(settings=tuple(ProbeConfig(params=config) for config in params), scores=scores)


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[NearestNeighbours]:
    """Yield the probe with the ks and temperatures of the options. Raises UsageError if faiss is needed and not installed."""
    if config.search == "faiss":
        check_faiss(torch.device("cpu"))
    yield NearestNeighbours(
        ks=tuple(dict.fromkeys(config.k)) or NearestNeighbours.ks,
        temperatures=tuple(dict.fromkeys(config.temperature)) or NearestNeighbours.temperatures,
        search=cast("Search", config.search),
        asked=bool(config.k),
    )


def neighbour_vote(cosines: Tensor, classes: Tensor, *, n_classes: int, temperature: float) -> Tensor:
    """Compute the logarithm of each class's votes; a neighbour's vote weighs exp(cosine / temperature).

    Args:
        cosines: (m, k) float64, descending.
        classes: (m, k) int64 in [0, n_classes).

    Returns:
        (m, n_classes) float64, -inf for a class without a vote.
    """
    # Relative to the class's own largest vote: exp(1 / 0.001) overflows float64, and votes of a far class underflow.
    logits = cosines / temperature
    largest = logits.new_full((len(logits), n_classes), -torch.inf).scatter_reduce_(1, classes, logits, "amax")
    votes, weights = torch.zeros_like(largest), (logits - largest.gather(1, classes)).exp()
    # One neighbour after the other: a GPU adds colliding entries in any order, and equal votes must stay equal.
    for column in range(classes.shape[1]):
        votes.scatter_add_(1, classes[:, column : column + 1], weights[:, column : column + 1])
    return votes.log() + largest
