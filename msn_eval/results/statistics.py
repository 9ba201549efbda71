"""Statistics over the images and draws of a result, and of two checkpoints on the same images.

Everything here is a pure function of integers, without seeds or Monte Carlo: equal input gives equal bits. Calibration alone
is computed from probabilities.

The score of an image is the number of draws in which it is right, 0 to `draws`. Draws share their test images, so they are
never pooled as if they were independent images: an image is one observation, whatever the number of draws. Two kinds of
uncertainty are kept apart: the effect of the labelled images of a draw (`draw_spread`), and the effect of different test
images of the same kind (`accuracy_interval`, `difference_interval`).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

POWER = 0.8
TIE_LEVEL = 0.05
_TAIL = (1 - 0.95) / 2  # on each side of a 95 % interval
_TOP = 5
_CALIBRATION_BINS = 15
_Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Bounds of an accuracy, or of a difference of two, as fractions."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SignFlip:
    """Exact p-values of the sign-flip test: of a sum as low, as high, or as far from zero as the observed one."""

    lower: float
    upper: float
    two_sided: float


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A second checkpoint compared with a first on the same images and draws. Differences are second minus first.

    Attributes:
        difference: Difference of the accuracies, a fraction.
        interval: Interval of the difference over test images.
        images: Number of test images.
        draws: Number of draws.
        differing: Number of images whose score differs.
        lost: Number of images whose score is lower in the second.
        gained: Number of images whose score is higher in the second.
        worse: One-sided p-value of the sign-flip test that the second is worse.
        better: One-sided p-value that it is better.
        two_sided: Two-sided p-value.
    """

    difference: float
    interval: Interval
    images: int
    draws: int
    differing: int
    lost: int
    gained: int
    worse: float
    better: float
    two_sided: float


@dataclass(frozen=True, kw_only=True)
class RankTest:
    """Ranks of k checkpoints on several data sets, compared.

    Attributes:
        p_value: Of Friedman's test that all are equally good.
        pairs: (k, k) p-values that two are equally good, with Holm's correction over all pairs.
    """

    p_value: float
    pairs: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Accuracies of a result, and how well its probabilities fit.

    Attributes:
        top1: Fraction of images whose label ranks first.
        top5: Fraction of images whose label is among the first five.
        top1_ci95: Wilson interval of top1.
        n: Number of images.
        nll: Mean negative logarithm of the label's probability, in nats. None where a label has probability 0.
        brier: Mean squared error of the probabilities, summed over classes, in [0, 2].
        ece: Expected calibration error, in [0, 1].

    The last three are None, and not written, where there are no probabilities.
    """

    top1: float
    top5: float
    top1_ci95: tuple[float, float]
    n: int
    nll: float | None = None
    brier: float | None = None
    ece: float | None = None


def compute_metrics(
    rank_of_label: NDArray[np.int64],
    *,
    confidence: NDArray[np.float32] | None = None,
    probability_of_label: NDArray[np.float32] | None = None,
    sum_of_squares: NDArray[np.float32] | None = None,
) -> Metrics:
    """Compute the metrics of n images.

    Args:
        rank_of_label: (n,) 1-based. `top5` is 1.0 where no rank can exceed five.
        confidence: (n,) largest probability of each image; None, as the next two, without probabilities.
        probability_of_label: (n,).
        sum_of_squares: (n,) squared probabilities of each image, summed.

    Source: the multi-class Brier score as Brier 1950 and scikit-learn define it.
    """
    n = len(rank_of_label)
    right = int((rank_of_label == 1).sum())
    in_top = int((rank_of_label <= _TOP).sum())
    metrics = Metrics(top1=right / n, top5=in_top / n, top1_ci95=wilson_interval(right, n), n=n)
    if confidence is None or probability_of_label is None or sum_of_squares is None:
        return metrics
    of_label = probability_of_label.astype(np.float64)
    _, confident, accurate = bin_confidences(confidence, rank_of_label == 1)
    # fsum: the same float in any order of adding, so that another machine verifies it.
    return replace(
        metrics,
        nll=math.fsum(-np.log(of_label)) / n if (of_label > 0).all() else None,
        brier=math.fsum(sum_of_squares.astype(np.float64) - 2 * of_label + 1) / n,
        ece=math.fsum(abs(confident - accurate)) / n,
    )


def bin_confidences(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Count images by confidence in 15 bins of equal width, [0, 1/15) to [14/15, 1].

    The expected calibration error is the sum over bins of |row 1 - row 2|, divided by the number of images.

    Returns:
        (3, 15): number of images, their summed confidences, and the number of right ones.

    Source: Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    exact = confidence.astype(np.float64)
    bins = np.minimum((exact * _CALIBRATION_BINS).astype(np.int64), _CALIBRATION_BINS - 1)
    return np.stack([np.bincount(bins, weights=values, minlength=_CALIBRATION_BINS) for values in (None, exact, right)])


def wilson_interval(right: float, n: float) -> tuple[float, float]:
    """Compute the 95 % interval of a proportion, `right` of `n` images, over test images of this kind.

    Unlike the normal interval it stays within [0, 1] and does not vanish at 0 and 1.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    share = right / n
    centre = share + _Z95**2 / (2 * n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n))
    scale = 1 + _Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def draw_spread(accuracies: Sequence[float]) -> float | None:
    """Compute the sample standard deviation (n − 1) of accuracies over draws. None for a single draw."""
    return statistics.stdev(accuracies) if len(accuracies) > 1 else None


def count_right(right: NDArray[np.bool_]) -> Integers:
    """Compute each image's score, (n,) int64, from (draws, n) booleans: the number of draws in which it is right."""
    return np.asarray(right.sum(axis=0, dtype=np.int64))


def accuracy_interval(scores: Integers, *, draws: int) -> Interval:
    """Compute the 95 % interval of an accuracy, averaged over draws, on test images of the same kind.

    With one draw this is Wilson's interval. With several it is Wilson's at the effective number of images: the number of
    binary outcomes whose proportion has the same variance as the mean of these scores.

    Args:
        scores: (n,) int64 in [0, draws], n >= 1.
        draws: Number of draws.

    Source: Wilson 1927; Kish 1965 (effective sample size), as Korn and Graubard 1998 use it for proportions.
    """
    n = len(scores)
    share = int(scores.sum()) / (n * draws)
    variance = float(np.var(scores / draws))
    effective = n * share * (1 - share) / variance if variance > 0 and draws > 1 else float(n)
    low, high = wilson_interval(share * effective, effective)
    return Interval(low=low, high=high)


def compare_scores(first: Integers, second: Integers, *, draws: int) -> Paired:
    """Compare a second checkpoint with a first, image by image.

    Args:
        first: (n,) int64 in [0, draws], n >= 1.
        second: Scores of the same images in the same order.
        draws: Number of draws.
    """
    return compare_differences(second - first, draws=draws)


def compare_differences(differences: Integers, *, draws: int) -> Paired:
    """Compare two checkpoints by (n,) int64, each image's score in the second minus that in the first."""
    test = sign_flip_test(differences)
    return Paired(
        difference=int(differences.sum()) / (len(differences) * draws),
        interval=difference_interval(differences, draws=draws),
        images=len(differences),
        draws=draws,
        differing=int(np.count_nonzero(differences)),
        lost=int(np.count_nonzero(differences < 0)),
        gained=int(np.count_nonzero(differences > 0)),
        worse=test.lower,
        better=test.upper,
        two_sided=test.two_sided,
    )


def difference_interval(differences: Integers, *, draws: int) -> Interval:
    """Compute the 95 % interval of a difference of accuracies over test images, paired by image.

    Of all exponential tilts of the observed differences, each with another mean, the limits are the means of those under
    which a sum as high (or as low) as the observed one has a probability of 2.5 %. The distribution of the sum of n images is
    computed, not simulated. Two choices keep the error on either side at 2.5 % or less where few images differ:

    - One more image, right in all draws of either checkpoint and in none of the other's, is added with half a count for
      either sign, since a handful of differing images (or none) says little about sizes not yet seen.
    - The probability of the observed sum itself counts in full.

    Args:
        differences: (n,) int64 in [-draws, draws], each image's score in the second checkpoint minus that in the first.
        draws: Number of draws.

    Source: nonparametric tilting of Efron 1981, Canadian Journal of Statistics 9, section 11; DiCiccio and Romano 1990. The
    added observation after Agresti and Min 2005, doi:10.1002/sim.1781, for matched pairs.
    """
    n, total = len(differences), int(differences.sum())
    counts = np.bincount(differences + draws, minlength=2 * draws + 1).astype(float)
    counts[[0, -1]] += 0.5
    share = counts / (n + 1)
    low, high = _find_lowest_mean(share, n, total), -_find_lowest_mean(share[::-1], n, -total)
    return Interval(low=low / draws, high=high / draws)


def _find_lowest_mean(share: NDArray[np.float64], n: int, total: int) -> float:
    """Return the lowest mean of tilts of `share` under which n images sum to `total` or more with a probability of 2.5 %.

    Args:
        share: (2 draws + 1,) probabilities of the differences from -draws to draws.
        n: Number of images.
        total: The observed sum.
    """
    from scipy import optimize

    draws = len(share) // 2
    if total == -n * draws:  # nothing is lower
        return -float(draws)
    values = np.arange(-draws, draws + 1)

    def tilt(strength: float) -> NDArray[np.float64]:
        weights = share * np.exp(strength * (values + draws))
        return np.asarray(weights / weights.sum())

    def excess(strength: float) -> float:
        sums, probability = _distribute_sum(values, tilt(strength), n)
        # The logarithm of a tail is nearly a parabola, which needs few steps.
        return math.log(max(probability[sums >= total].sum(), 1e-300) / _TAIL)

    strongest = -3 / math.sqrt(n * float(values**2 @ share))  # about three standard deviations lower
    while excess(strongest) > 0:
        strongest *= 2
    return float(values @ tilt(optimize.brentq(excess, strongest, 0.0, xtol=1e-9)))


def _distribute_sum(values: Integers, share: NDArray[np.float64], n: int) -> tuple[Integers, NDArray[np.float64]]:
    """Return the distribution of the sum of n independent draws of `values`: rising sums, and their probabilities.

    It is the n-th power of the characteristic function, computed by FFT on a ring. The ring holds 15 standard deviations
    to each side, and some more for distributions of few steps, so that wrapped-around probability is negligible.
    """
    mean = float(values @ share)
    deviation = math.sqrt(n * max(0.0, float(values**2 @ share) - mean**2))
    half = math.ceil(15 * deviation) + 40 * int(values.max())
    ring = 1 << (2 * half + 1).bit_length()
    steps = np.zeros(ring)
    steps[values % ring] = share
    probability = np.fft.irfft(np.fft.rfft(steps) ** n, ring).clip(min=0)
    sums = np.arange(round(n * mean) - ring // 2, round(n * mean) + ring - ring // 2)
    ordered = probability[sums % ring]
    return sums, ordered / ordered.sum()


def sign_flip_test(differences: Integers) -> SignFlip:
    """Test exactly whether differences are as likely to be of either sign.

    If two checkpoints are equally good, each image's difference could as well have had the opposite sign. Given the sizes,
    the sum is 2 T − (sum of all sizes), where T adds the sizes with a plus: a sum of one scaled binomial per size, whose
    distributions are convolved. With one draw this is the exact form of McNemar's test.

    Args:
        differences: (n,) int64.

    Source: Fisher 1935, The Design of Experiments, section 21; McNemar 1947.
    """
    from scipy import special  # takes 0.2 seconds to import, and most tables do without

    counts_by_size = np.bincount(np.abs(differences))
    sizes = 1 + np.flatnonzero(counts_by_size[1:])
    counts = counts_by_size[sizes]
    total = int(sizes @ counts)
    if total == 0:
        return SignFlip(lower=1.0, upper=1.0, two_sided=1.0)
    positive = (int(differences.sum()) + total) // 2  # the observed T
    if len(sizes) == 1:
        n, pluses = int(counts[0]), positive // int(sizes[0])
        lower, upper = (float(special.bdtr(at_most, n, 0.5)) for at_most in (pluses, n - pluses))
    else:
        first, probability = _distribute_positive_sum(sizes, counts)
        lower = float(probability[: max(0, positive - first + 1)].sum())
        upper = float(probability[max(0, positive - first) :].sum())
    lower, upper = min(1.0, lower), min(1.0, upper)
    return SignFlip(lower=lower, upper=upper, two_sided=min(1.0, 2 * min(lower, upper)))


def _distribute_positive_sum(sizes: Integers, counts: Integers) -> tuple[int, NDArray[np.float64]]:
    """Return the distribution of the sum of the sizes with a plus: the first sum, and the probabilities from there on.

    Only positive numbers are added, so that tails keep their leading digits however small they are. Probabilities that
    underflow float64 are left out.
    """
    from scipy import special

    first, probability = 0, np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        pluses = np.arange(count + 1.0)
        logs = -special.betaln(pluses + 1, count - pluses + 1) - math.log1p(count) - count * math.log(2)
        binomial = np.exp(logs)
        nonzero = np.flatnonzero(binomial)
        spread = np.zeros(size * (int(nonzero[-1]) - int(nonzero[0])) + 1)
        spread[::size] = binomial[nonzero[0] : nonzero[-1] + 1]
        first += size * int(nonzero[0])
        probability = np.convolve(probability, spread)
    return first, probability


def minimal_detectable_difference(differences: Integers, *, draws: int, level: float) -> float:
    """Compute the smallest true drop (or gain) of accuracy that the one-sided test finds with 80 % power.

    A drop adds differing images only as far as it must: where it needs more of them than were observed, all of them lose.
    The normal form of McNemar's power is d √n = z(level) √v + z(power) √(v − d²), where v is the mean squared difference
    under the drop d.

    Args:
        differences: (n,) int64 as for `difference_interval`. They show how many images differ by chance, and by how much.
        draws: Number of draws.
        level: Level of the one-sided test. For the strictest of m tests under Holm, the family's level over m.

    Returns:
        A fraction. 1.0 where n images can show nothing.

    Source: Connor 1987, doi:10.2307/2531961; Miettinen 1968.
    """
    from scipy import optimize, special

    n = len(differences)
    squares, total = int((differences**2).sum()), int(np.abs(differences).sum())
    observed = squares / (n * draws**2)
    size = squares / (draws * total) if total else 1.0  # of a differing image
    z_level, z_power = float(special.ndtri(1 - level)), float(special.ndtri(POWER))

    def excess(drop: float) -> float:
        variance = max(observed, drop * size)
        return drop * math.sqrt(n) - z_level * math.sqrt(variance) - z_power * math.sqrt(max(0.0, variance - drop**2))

    if excess(1.0) <= 0:
        return 1.0
    # The excess is negative below the root: already at zero or, where nothing differs, shortly above.
    return float(optimize.brentq(excess, 1e-12, 1.0, xtol=1e-12))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust p-values for their number, in the given order. Reject those at most the family's level.

    The probability of any false rejection is at most that level, whichever hypotheses are true.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    p = np.array(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    # Step down: the smallest is multiplied by m, the next by m − 1, and none may fall below a smaller one.
    adjusted = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return tuple(adjusted[np.argsort(order)].tolist())


def rank_with_ties(scores: Sequence[Integers], *, level: float = TIE_LEVEL) -> tuple[int, ...]:
    """Rank checkpoints so that those that are not separable by their images share a rank.

    Every pair is tested two-sided, with Holm's correction over all pairs. In the order of accuracy, a new rank begins only
    where every checkpoint before is separable from every one after. So two that are not separable always share a rank,
    and a rank may hold two separable ones that are linked by others between them. A rank is one more than the number of
    checkpoints of better rank: 1, 1, 3.

    Args:
        scores: (n,) int64 per checkpoint, on the same images and the same draws.
        level: Family-wise level of the tests.

    Returns:
        The ranks, in the given order.
    """
    order = sorted(range(len(scores)), key=lambda index: -int(scores[index].sum()))
    pairs = list(combinations(range(len(order)), 2))
    adjusted = holm([sign_flip_test(scores[order[a]] - scores[order[b]]).two_sided for a, b in pairs])
    last_tied = list(range(len(order)))  # the last position that each one is not separable from
    for (above, below), p_value in zip(pairs, adjusted, strict=True):
        if p_value > level:
            last_tied[above] = max(last_tied[above], below)
    ranks = [0] * len(order)
    rank, linked = 1, -1
    for position, index in enumerate(order):
        if position > linked:
            rank = position + 1
        linked = max(linked, last_tied[position])
        ranks[index] = rank
    return tuple(ranks)


def compare_ranks(ranks: NDArray[np.float64]) -> RankTest:
    """Compare k checkpoints by their ranks on n data sets, by Friedman's test and by normal tests of all pairs.

    The standard error of a difference of two mean ranks is sqrt(k (k + 1) / (6 n)), which is too large where ranks are tied.

    Args:
        ranks: (n, k), n and k at least 3; tied ones share the mean of their ranks.

    Source: Friedman 1937; Demsar 2006, JMLR 7, section 3.2; Garcia and Herrera 2008, JMLR 9, for all pairs with Holm.
    """
    from scipy import special, stats

    n, k = ranks.shape
    all_tied = bool((ranks == ranks[:, :1]).all())  # scipy divides by zero
    p_value = 1.0 if all_tied else float(stats.friedmanchisquare(*ranks.T).pvalue)
    means = ranks.mean(axis=0)
    rows, columns = np.triu_indices(k, 1)
    z = np.abs(means[rows] - means[columns]) / math.sqrt(k * (k + 1) / (6 * n))
    pairs = np.ones((k, k))
    pairs[rows, columns] = pairs[columns, rows] = holm((2 * special.ndtr(-z)).tolist())
    return RankTest(p_value=p_value, pairs=pairs)
