"""Intervals, tests and rankings against enumeration, closed forms, SciPy and simulation."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, log_loss

from msn_eval.probes.base import rank_labels
from msn_eval.results.statistics import (
    Integers,
    accuracy_interval,
    compare_scores,
    compute_metrics,
    difference_interval,
    draw_spread,
    holm,
    minimal_detectable_difference,
    rank_with_ties,
    sign_flip_test,
    wilson_interval,
)

_FEW_DIFFERENCES = st.lists(st.integers(-3, 3), min_size=1, max_size=9)


def _differences(n: int, *, lost: int, gained: int, size: int = 1) -> Integers:
    differences = np.zeros(n, dtype=np.int64)
    differences[:lost], differences[lost : lost + gained] = -size, size
    return differences


def _scores(n: int, right: int, *, first: int = 0) -> Integers:
    scores = np.zeros(n, dtype=np.int64)
    scores[first : first + right] = 1
    return scores


def test_one_draw_has_no_spread_and_three_have_the_sample_deviation() -> None:
    assert draw_spread([0.5]) is None
    assert draw_spread([0.1, 0.2, 0.6]) == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))


@settings(max_examples=60, deadline=None)
@given(_FEW_DIFFERENCES)
def test_sign_flip_test_is_the_count_of_all_flips(differences: list[int]) -> None:
    observed = sum(differences)
    sums = [np.dot(signs, np.abs(differences)) for signs in product((-1, 1), repeat=len(differences))]

    test = sign_flip_test(np.array(differences))

    extreme = [(value <= observed, value >= observed, abs(value) >= abs(observed)) for value in sums]
    expected = np.mean(extreme, axis=0)
    assert [test.lower, test.upper, test.two_sided] == pytest.approx(expected, rel=1e-12)


def test_with_one_draw_it_is_the_binomial_test_of_mcnemar() -> None:
    test = sign_flip_test(_differences(10_000, lost=61, gained=40))

    assert test.two_sided == pytest.approx(stats.binomtest(40, 101).pvalue, rel=1e-10)
    assert test.lower == pytest.approx(stats.binomtest(40, 101, alternative="less").pvalue, rel=1e-10)
    assert sign_flip_test(_differences(10_000, lost=61, gained=40, size=3)) == test


def test_far_tail_keeps_its_digits() -> None:
    differences = np.concatenate([_differences(500, lost=400, gained=0), _differences(300, lost=200, gained=0, size=2)])

    assert sign_flip_test(differences).lower == pytest.approx(0.5**600, rel=1e-9)


def test_paired_result_counts_what_was_lost_and_gained() -> None:
    paired = compare_scores(_scores(100, 40), _scores(100, 30, first=20), draws=1)

    assert (paired.lost, paired.gained, paired.differing, paired.difference) == (20, 10, 30, pytest.approx(-0.1))


def test_exchanging_the_checkpoints_mirrors_everything() -> None:
    first, second = _scores(200, 90), _scores(200, 80, first=30)
    there, back = compare_scores(first, second, draws=1), compare_scores(second, first, draws=1)

    assert (there.difference, there.worse, there.lost) == (-back.difference, back.better, back.gained)
    assert there.interval.low == pytest.approx(-back.interval.high, abs=1e-12)


def test_paired_interval_of_many_differences_is_that_of_resampling_the_images() -> None:
    differences = np.random.default_rng(4).choice([-3, -1, 0, 1, 2], 2000, p=[0.05, 0.1, 0.7, 0.1, 0.05])
    resamples = np.random.default_rng(5).choice(differences, (4000, 2000)).mean(axis=1) / 3

    interval = difference_interval(differences, draws=3)

    assert [interval.low, interval.high] == pytest.approx(np.percentile(resamples, [2.5, 97.5]), abs=6e-4)


@pytest.mark.parametrize("lost", [0, 1, 5, 40, 200])
def test_interval_of_losses_only_reaches_the_exact_limit_of_a_proportion(lost: int) -> None:
    exact = stats.binomtest(lost, 1000).proportion_ci(0.95, method="exact").high

    low = difference_interval(_differences(1000, lost=lost, gained=0), draws=1).low

    assert exact <= -low < exact + 0.0005


@pytest.mark.parametrize("lost", [0, 1, 1000])
def test_interval_stays_within_what_a_difference_can_be(lost: int) -> None:
    interval = difference_interval(_differences(1000, lost=lost, gained=0), draws=1)

    assert -1 <= interval.low < -lost / 1000 + 1e-9 <= interval.high + 1e-9 <= 1


def test_interval_of_one_draw_is_wilsons() -> None:
    interval = accuracy_interval(_scores(300, 200), draws=1)

    assert (interval.low, interval.high) == wilson_interval(200, 300)


def test_draws_that_agree_do_not_count_as_more_images() -> None:
    one, three = accuracy_interval(_scores(300, 200), draws=1), accuracy_interval(3 * _scores(300, 200), draws=3)

    assert (three.low, three.high) == (pytest.approx(one.low), pytest.approx(one.high))


def test_draws_that_differ_narrow_the_interval() -> None:
    scores = np.random.default_rng(0).binomial(3, 0.6, 900)
    three, one = accuracy_interval(scores, draws=3), wilson_interval(int(scores.sum()) / 3, 900)

    assert three.high - three.low < 0.7 * (one[1] - one[0])


@pytest.mark.parametrize(
    ("n", "share", "points", "points_of_twelve"),
    [(1_000, 0.02, 1.11, 1.56), (5_000, 0.02, 0.50, 0.70), (10_000, 0.08, 0.70, 0.98), (50_000, 0.08, 0.31, 0.44)],
)
def test_detectable_drop_is_that_of_the_normal_form(
    n: int, share: float, points: float, points_of_twelve: float
) -> None:
    """The expected numbers come from an independent simulation at level 5 % and 80 % power."""
    half = round(n * share / 2)
    differences = _differences(n, lost=half, gained=half)

    for level, expected in ((0.05, points), (0.05 / 12, points_of_twelve)):
        detectable = minimal_detectable_difference(differences, draws=1, level=level)
        assert 100 * detectable == pytest.approx(expected, abs=0.012)


def test_detectable_drop_without_differing_images_is_that_of_the_exact_test() -> None:
    n, level = 10_000, 0.01
    detectable = minimal_detectable_difference(np.zeros(n, dtype=np.int64), draws=1, level=level)

    needed = next(k for k in range(99) if 0.5**k <= level)  # losses alone that the exact test calls a drop
    assert 0.75 < stats.binom.sf(needed - 1, n, detectable) < 0.95


def test_few_images_can_show_nothing() -> None:
    assert minimal_detectable_difference(np.zeros(5, dtype=np.int64), draws=1, level=0.01) == 1.0


def test_detectable_drop_is_found_with_about_80_percent_power() -> None:
    generator = np.random.default_rng(9)
    n, level, draws = 5_000, 0.01, 3
    null = np.repeat([-2, -1, 0, 1, 2], [25, 50, 4850, 50, 25])
    drop = minimal_detectable_difference(null, draws=draws, level=level)
    tilt = drop * draws / 1.5  # moves this much probability from gains to losses, in images of mean size 1.5
    shares = [0.005 + tilt / 4, 0.01 + tilt / 4, 0.97, 0.01 - tilt / 4, 0.005 - tilt / 4]

    detected = [sign_flip_test(generator.choice([-2, -1, 0, 1, 2], n, p=shares)).lower <= level for _ in range(400)]

    assert 0.72 < np.mean(detected) < 0.88


def test_holm_rejects_as_the_step_down_does() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.5, 0.01, 0.7]) == pytest.approx((1.0, 0.03, 1.0))
    assert holm([]) == ()


def test_checkpoints_that_are_not_separable_share_a_rank() -> None:
    good, alike, worse = _scores(1000, 700), _scores(1000, 699), _scores(1000, 500)

    assert rank_with_ties([worse, alike, good]) == (3, 1, 1)


def test_separable_checkpoints_share_a_rank_where_others_link_them() -> None:
    best, middle, last = (_scores(1000, right) for right in (700, 694, 688))

    assert rank_with_ties([best, middle, last]) == rank_with_ties([last, middle, best]) == (1, 1, 1)
    assert rank_with_ties([best, last]) == (1, 2)


@pytest.mark.parametrize("level", [1e-9, 0.05])
def test_not_separable_means_the_same_rank(level: float) -> None:
    generator = np.random.default_rng(2)
    scores = [generator.binomial(3, share, 400) for share in (0.5, 0.52, 0.55, 0.7, 0.71, 0.9)]
    ranks = rank_with_ties(scores, level=level)

    pairs = [(a, b) for a in range(6) for b in range(a)]
    adjusted = holm([sign_flip_test(scores[a] - scores[b]).two_sided for a, b in pairs])
    tied = [(a, b) for (a, b), p in zip(pairs, adjusted, strict=True) if p > level]
    assert tied
    assert all(ranks[a] == ranks[b] for a, b in tied)


@pytest.mark.parametrize(
    ("right", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (1, 797), (700, 797), (32_750, 50_000), (49_999, 50_000)]
)
def test_wilson_interval_is_that_of_scipy(right: int, n: int) -> None:
    theirs = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")

    assert wilson_interval(right, n) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)


def test_top1_and_top5_are_shares_of_ranks() -> None:
    metrics = compute_metrics(np.array([1, 1, 2, 5, 6, 1, 9, 3]))

    assert (metrics.top1, metrics.top5, metrics.n) == (3 / 8, 6 / 8, 8)
    assert metrics.top1_ci95 == wilson_interval(3, 8)


def _summary(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    summary = {
        "confidence": probabilities.max(axis=1),
        "probability_of_label": probabilities[np.arange(len(labels)), labels],
        "sum_of_squares": (probabilities**2).sum(axis=1),
    }
    return {name: values.astype(np.float32) for name, values in summary.items()}


@pytest.mark.parametrize("n_classes", [2, 10, 1000])
def test_likelihood_and_brier_score_are_those_of_scikit_learn(n_classes: int) -> None:
    generator = np.random.default_rng(n_classes)
    probabilities = generator.dirichlet(np.full(n_classes, 0.5), size=300)
    labels = generator.integers(n_classes, size=300)
    classes = np.arange(n_classes)

    metrics = compute_metrics(np.ones(300, dtype=np.int64), **_summary(probabilities, labels))

    assert metrics.nll == pytest.approx(log_loss(labels, probabilities, labels=classes), abs=1e-6)
    expected = brier_score_loss(labels, probabilities if n_classes > 2 else probabilities[:, 1], labels=classes)
    assert metrics.brier == pytest.approx(expected * (1 if n_classes > 2 else 2), abs=1e-6)


def test_calibration_error_is_the_weighted_gap_of_bins_of_equal_width() -> None:
    generator = np.random.default_rng(0)
    confidence = np.append(generator.random(500), [1.0, 1.0, 1.0]).astype(np.float32)
    right = generator.random(503) < confidence**2
    gap = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & ((confidence < low + 1 / 15) | ((confidence == 1) & (low > 0.9)))
        gap += inside.mean() * abs(right[inside].mean() - confidence[inside].mean(dtype=float)) if inside.any() else 0

    metrics = compute_metrics(
        np.where(right, 1, 2), confidence=confidence, probability_of_label=confidence, sum_of_squares=confidence
    )

    assert metrics.ece == pytest.approx(gap, abs=1e-9)


def test_a_label_of_probability_zero_has_no_likelihood() -> None:
    summary = _summary(np.array([[0.0, 1.0], [0.5, 0.5]]), np.array([0, 1]))

    metrics = compute_metrics(np.array([2, 2]), **summary)

    assert (metrics.nll, metrics.brier) == (None, 1.25)


@pytest.mark.parametrize("n_classes", [2, 4, 5])
def test_top5_is_one_where_there_are_five_classes_or_fewer(n_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, n_classes, generator=generator)
    _, rank = rank_labels(scores, torch.randint(n_classes, (40,), generator=generator))

    assert compute_metrics(rank.numpy()).top5 == 1.0
