"""Weighted nearest neighbours."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup
from msn_eval.probes.distributed import search_together
from msn_eval.probes.knn_search.index import index_bank
from msn_eval.probes.knn_search.search import Found, search_nearest

DEFAULT_KS = (10, 20, 100, 200)
DEFAULT_TEMPERATURE = 0.07
# Of a bank: in smaller ones what every rank does in full, for its own k, outlasts the products.
_SHARED_VALUES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class NearestNeighbours(FeatureProbe):
    """The k nearest labelled rows by cosine vote for their classes with weight exp(cosine / temperature).

    ks, temperatures: every pair is a protocol of its own; all come from one search
    asked:            the ks were asked for, so one above the number of images is an error and not left out
    Source: Wu et al. 2018, arXiv:1805.01978; k and temperature as in DINO, arXiv:2104.14294.
    """

    name: ClassVar[str] = "knn"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls-norm"

    ks: tuple[int, ...] = DEFAULT_KS
    temperatures: tuple[float, ...] = (DEFAULT_TEMPERATURE,)
    asked: bool = False

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,)

    def configs(self, n: int) -> tuple[Params, ...]:
        return knn_settings(self, n)

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        return fit_knn(self, train, device, team=workers)


def knn_settings(probe: NearestNeighbours, n: int) -> tuple[dict[str, int | float], ...]:
    """Give the hyper-parameters of every protocol, n being the labelled images.

    Raises NumericalError where a k that was asked for is above n.
    """
    if probe.asked and max(probe.ks) > n:
        raise NumericalError(
            f"k = {max(probe.ks)} neighbours among {n} labelled images",
            hint=f"Ask for --k of at most {n}, or for a larger subset.",
        )
    return tuple({"k": k, "temperature": t} for k in probe.ks if k <= n for t in probe.temperatures)


def fit_knn(
    probe: NearestNeighbours, train: Features, device: torch.device, *, team: WorkerGroup | None = None
) -> FittedProbe:
    """Make the labelled rows ready for the one search that all settings share.

    team: ranks that share the search where the bank is large
    Raises NumericalError where a row is not finite.
    """
    params = knn_settings(probe, len(train.labels))
    labels = train.labels.to(device)
    search = _search_among(train.values, device, team)

    def scores(values: Tensor) -> Iterator[Tensor]:
        if not params:  # every k of the default list is above the number of labelled images
            return
        cosines, nearest = search(values, max(int(one["k"]) for one in params))
        for one in params:
            k = int(one["k"])  # the k nearest are a prefix of the most that any setting wants
            yield neighbour_vote(
                cosines[:, :k], labels[nearest[:, :k]], n_classes=train.n_classes, temperature=float(one["temperature"])
            )

    return FittedProbe(settings=tuple(ProbeConfig(params=one) for one in params), scores=scores)


def _search_among(rows: Tensor, device: torch.device, team: WorkerGroup | None) -> Callable[[Tensor, int], Found]:
    """Give the function from queries and k to neighbours: the same whether ranks share the search or not."""
    if team is not None and rows.numel() >= _SHARED_VALUES:
        return lambda values, k: search_together(team, values, rows, k)
    bank = index_bank(rows.to(device))
    return lambda values, k: search_nearest(values.to(device), bank, k)


def neighbour_vote(cosines: Tensor, classes: Tensor, *, n_classes: int, temperature: float) -> Tensor:
    """Give the logarithm of each class's votes, the weight of a neighbour being exp(cosine / temperature).

    cosines: (m, k) float64, largest first
    classes: (m, k) int64 in [0, n_classes)
    returns: (m, n_classes) float64, -inf for a class without a vote
    """
    # Against the class's own largest vote: exp(1 / 0.001) overflows float64, and a far class's votes underflow.
    logits = cosines / temperature
    largest = logits.new_full((len(logits), n_classes), -torch.inf).scatter_reduce_(1, classes, logits, "amax")
    votes = logits.new_zeros(len(logits), n_classes)
    weights = (logits - largest.gather(1, classes)).exp()
    # One neighbour after the other: a GPU adds what meets in one place in any order, and equal votes must stay equal.
    for place in range(classes.shape[1]):
        votes.scatter_add_(1, classes[:, place : place + 1], weights[:, place : place + 1])
    return votes.log() + largest


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[NearestNeighbours]:
    """Yield the probe with the k and temperatures of the options."""
    yield NearestNeighbours(
        ks=tuple(dict.fromkeys(config.k)) or DEFAULT_KS,
        temperatures=tuple(dict.fromkeys(config.temperature)) or (DEFAULT_TEMPERATURE,),
        asked=bool(config.k),
    )
