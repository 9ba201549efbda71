import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from msn_eval.probes.ranking import rank_labels
from msn_eval.results.metrics import measure, wilson_interval


@pytest.mark.parametrize(
    ("right", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (1, 797), (700, 797), (32_750, 50_000), (49_999, 50_000)]
)
def test_wilson_interval_is_that_of_scipy(right: int, n: int) -> None:
    theirs = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")

    assert wilson_interval(right, n) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n", [1, 7, 50_000])
def test_wilson_interval_stays_within_zero_and_one(n: int) -> None:
    assert wilson_interval(0, n)[0] >= 0
    assert wilson_interval(n, n)[1] <= 1


def test_top1_and_top5_are_shares_of_ranks() -> None:
    metrics = measure(np.array([1, 1, 2, 5, 6, 1, 9, 3]))

    assert (metrics.top1, metrics.top5, metrics.n) == (3 / 8, 6 / 8, 8)


def test_interval_belongs_to_top1() -> None:
    metrics = measure(np.array([1, 4, 1, 9]))

    assert metrics.top1_ci95 == wilson_interval(2, 4)


@pytest.mark.parametrize("n_classes", [2, 4, 5])
def test_top5_is_one_where_there_are_five_classes_or_fewer(n_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, n_classes, generator=generator)
    _, rank = rank_labels(scores, torch.randint(n_classes, (40,), generator=generator))

    assert measure(rank.numpy()).top5 == 1.0


def test_accuracies_are_plain_python_numbers() -> None:
    metrics = measure(np.array([1, 2]))

    assert [type(value) for value in (metrics.top1, metrics.top5, *metrics.top1_ci95, metrics.n)] == [float] * 4 + [int]
