"""Several data sets: mean accuracy and mean rank of the checkpoints that were measured on all of them by one rule."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np

from msn_eval.results.statistics import Integers, RankTest, compare_ranks, rank_with_ties

LEAST_TESTED = 3  # data sets, and checkpoints, for a test
LEVEL = 0.05
Network = tuple[str, str | None]  # weights_sha256 and key


@dataclass(frozen=True, kw_only=True)
class DataSetScores:
    """One protocol of a rule: what is known of the checkpoints on one data set.

    Attributes:
        data: Name of the data set.
        names: Of every checkpoint with a record.
        accuracies: Mean over draws of the checkpoints with all draws and their predictions.
        scores: Of these, the number of right draws of each image, (n,).
    """

    data: str
    names: Mapping[Network, str]
    accuracies: Mapping[Network, float]
    scores: Mapping[Network, Integers]


@dataclass(frozen=True, kw_only=True)
class AverageRow:
    """One checkpoint on all data sets.

    Attributes:
        accuracy: Mean accuracy over data sets, a fraction.
        rank: Mean rank over data sets. Checkpoints that the paired test does not separate share the mean of their ranks.
        groups: Letters; two checkpoints without a common one differ significantly. Empty without a test.
    """

    name: str
    weights_sha256: str
    key: str | None
    accuracy: float
    rank: float
    groups: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSetAverages:
    """The checkpoints that were measured on all data sets by one rule.

    Attributes:
        title: Of the rule: probe, settings and subset.
        data: Names of the data sets.
        rows: By mean rank, best first.
        left_out: Names of the checkpoints without a complete result on every data set.
        p_value: Of Friedman's test that all are equally good. None with fewer than three data sets or checkpoints.
        ties: First and last row of each group of which no two rows differ significantly, none inside of another.
    """

    title: str
    data: tuple[str, ...]
    rows: tuple[AverageRow, ...]
    left_out: tuple[str, ...]
    p_value: float | None = None
    ties: tuple[tuple[int, int], ...] = ()


def average_data_sets(title: str, columns: Sequence[DataSetScores]) -> DataSetAverages:
    """Average accuracies and ranks over at least two data sets.

    Source: Demsar 2006, Statistical comparisons of classifiers over multiple data sets, JMLR 7, with Holm's correction over
    all pairs in place of Nemenyi's critical difference.
    """
    names = {network: name for column in columns for network, name in column.names.items()}
    shared = [network for network in names if all(network in column.scores for column in columns)]
    ranks = np.array([_rank(column, shared) for column in columns])
    order = sorted(range(len(shared)), key=lambda index: (ranks[:, index].sum(), names[shared[index]]))
    is_tested = min(len(columns), len(shared)) >= LEAST_TESTED
    test = compare_ranks(ranks[:, order]) if is_tested else None
    ties = () if test is None else _find_ties(test, len(shared))
    rows = []
    for position, index in enumerate(order):
        weights_sha256, key = shared[index]
        inside = [first <= position <= last for first, last in ties]
        rows.append(
            AverageRow(
                name=names[shared[index]],
                weights_sha256=weights_sha256,
                key=key,
                accuracy=statistics.fmean(column.accuracies[shared[index]] for column in columns),
                rank=float(ranks[:, index].mean()),
                groups=" ".join(
                    name for name, is_inside in zip(_name_groups(len(ties)), inside, strict=True) if is_inside
                ),
            )
        )
    return DataSetAverages(
        title=title,
        data=tuple(column.data for column in columns),
        rows=tuple(rows),
        left_out=tuple(name for network, name in names.items() if network not in shared),
        p_value=None if test is None else test.p_value,
        ties=ties,
    )


def _rank(column: DataSetScores, networks: Sequence[Network]) -> list[float]:
    """Return the ranks on one data set. Those that share rank 1 of three have 2."""
    ranks = rank_with_ties([column.scores[network] for network in networks])
    return [rank + (ranks.count(rank) - 1) / 2 for rank in ranks]


def _find_ties(test: RankTest, count: int) -> tuple[tuple[int, int], ...]:
    """Return the largest runs of positions of which no two are separable. One run of all if Friedman's test is not rejected."""
    if test.p_value > LEVEL:
        return ((0, count - 1),)
    runs: list[tuple[int, int]] = []
    for first in range(count):
        last = first
        while last + 1 < count and all(test.pairs[row, last + 1] > LEVEL for row in range(first, last + 1)):
            last += 1
        if not runs or last > runs[-1][1]:
            runs.append((first, last))
    return tuple(runs)


def _name_groups(count: int) -> list[str]:
    return [ascii_lowercase[index] if count <= len(ascii_lowercase) else str(index + 1) for index in range(count)]
