"""Statistics: what the images and draws of a result say about it, and about two checkpoints on the same images.

Everything here is a pure function of integers: no seed, no Monte Carlo, equal input gives equal bits.

The score of an image is the number of draws in which it is right, 0 to `draws`. Draws share their test images, so they are
never pooled as if they were images of their own: an image is one observation, whatever the number of draws. Two kinds of
doubt are kept apart: how much the labelled images of a draw move the number (`draw_spread`), and how much other test
images of the same kind would (`accuracy_interval`, `difference_interval`).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

CONFIDENCE = 0.95
POWER = 0.8
TIE_LEVEL = 0.05
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Bounds of an accuracy, or of a difference of two, as fractions."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SignFlip:
    """Exact p-values of the sign-flip test: that the sum is as low, as high, or as far from zero as seen."""

    lower: float
    upper: float
    two_sided: float


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A second checkpoint against a first on the same images and draws; differences are second minus first.

    difference:       of the accuracies, a fraction
    interval:         of the difference, over test images
    images, draws:    how many
    differing, lost, gained: images whose score differs, is lower, is higher in the second
    worse, better, two_sided: p-values of the sign-flip test
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


def draw_spread(accuracies: Sequence[float]) -> float | None:
    """Give the sample standard deviation (n − 1) of a checkpoint's accuracies over draws, None for a single draw."""
    return statistics.stdev(accuracies) if len(accuracies) > 1 else None


def count_right(right: NDArray[np.bool_]) -> Integers:
    """Give each image's score from (draws, n) booleans: the number of draws in which it is right; (n,) int64."""
    scores: Integers = right.sum(axis=0, dtype=np.int64)
    return scores


def accuracy_interval(scores: Integers, *, draws: int) -> Interval:
    """Give the 95 % interval of the accuracy of these fits, averaged over draws, on test images of the same kind.

    scores: (n,) int64 in [0, draws], n >= 1
    With one draw this is Wilson's interval. With several, Wilson's at the effective number of images: that number of
    yes-or-no outcomes whose share varies as much as the mean of these scores does.
    Sources: Wilson 1927; Kish 1965 (effective sample size), as Korn and Graubard 1998 use it for proportions.
    """
    n = len(scores)
    share = int(scores.sum()) / (n * draws)
    variance = float(np.var(scores / draws))
    effective = n * share * (1 - share) / variance if variance > 0 and draws > 1 else float(n)
    low, high = wilson_interval(share * effective, effective)
    return Interval(low=low, high=high)


def compare_scores(first: Integers, second: Integers, *, draws: int) -> Paired:
    """Compare a second checkpoint with a first, image by image.

    first, second: (n,) int64 in [0, draws], of the same images in the same order, n >= 1
    """
    differences = second - first
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


def difference_interval(differences: Integers, *, draws: int, confidence: float = CONFIDENCE) -> Interval:
    """Give the paired bootstrap interval of a difference of accuracies, over test images.

    differences: (n,) int64 in [-draws, draws], each image's score in the second checkpoint minus that in the first
    The percentile interval of infinitely many resamples of the images: a resampled sum is one of n independent draws from
    the differences seen, and its distribution is computed, not simulated. Two corrections matter where few images differ:
    one more differing image of unknown sign, and of a size as those seen, is taken to have been seen, since a handful (or
    none) says little about the next; and the sum's steps are halved at the ends (mid-quantiles), where whole steps would
    cover too much.
    Sources: Efron 1979; the added observation after Agresti and Min 2005, doi:10.1002/sim.1781, for matched pairs.
    """
    n = len(differences)
    sizes = np.arange(-draws, draws + 1)
    seen = np.bincount(differences + draws, minlength=2 * draws + 1).astype(float)
    both = np.where(sizes == 0, 0.0, seen + seen[::-1])
    if not both.any():
        both[[0, -1]] = 1.0
    share = (seen + both / both.sum()) / (n + 1)
    sums, probability = _sum_of_draws(sizes, share, n)
    middle = np.cumsum(probability) - probability / 2
    tail = (1 - confidence) / 2
    low, high = np.interp([tail, 1 - tail], middle, sums) / (n * draws)
    return Interval(low=max(-1.0, float(low)), high=min(1.0, float(high)))


def _sum_of_draws(values: Integers, share: NDArray[np.float64], n: int) -> tuple[Integers, NDArray[np.float64]]:
    """Give the distribution of the sum of n independent draws of `values`: sums, rising, and their probabilities.

    The n-th power of the characteristic function, on a ring that holds all sums of any weight: 15 standard deviations to
    each side, and some room for distributions of few steps.
    """
    mean = float(values @ share)
    deviation = math.sqrt(n * max(0.0, float(values**2 @ share) - mean**2))
    half = math.ceil(15 * deviation) + 40 * int(values.max())
    ring = 1 << (2 * half + 1).bit_length()
    steps = np.zeros(ring)
    steps[values % ring] = share
    probability = np.fft.ifft(np.fft.fft(steps) ** n).real.clip(min=0)
    sums = np.arange(round(n * mean) - ring // 2, round(n * mean) + ring - ring // 2)
    ordered = probability[sums % ring]
    return sums, ordered / ordered.sum()


def sign_flip_test(differences: Integers) -> SignFlip:
    """Test exactly whether differences are as likely to be of either sign.

    differences: (n,) int64
    If two checkpoints are equally good, each image's difference could as well have had the other sign. Given the sizes,
    the sum is 2 T − (all sizes), where T adds up the sizes with a plus: a sum of one multiplied binomial for each size,
    whose distributions are convolved. With one draw this is the exact form of McNemar's test.
    Source: Fisher 1935, The Design of Experiments, section 21; McNemar 1947.
    """
    seen = np.bincount(np.abs(differences))
    sizes = 1 + np.flatnonzero(seen[1:])
    counts = seen[sizes]
    total = int(sizes @ counts)
    if total == 0:
        return SignFlip(lower=1.0, upper=1.0, two_sided=1.0)
    positive = (int(differences.sum()) + total) // 2
    if len(sizes) == 1:
        k = int(counts[0])
        pluses = positive // int(sizes[0])
        lower, upper = (float(special.bdtr(most, k, 0.5)) for most in (pluses, k - pluses))
    else:
        first, probability = _positive_sums(sizes, counts)
        lower = float(probability[: max(0, positive - first + 1)].sum())
        upper = float(probability[max(0, positive - first) :].sum())
    lower, upper = min(1.0, lower), min(1.0, upper)
    return SignFlip(lower=lower, upper=upper, two_sided=min(1.0, 2 * min(lower, upper)))


def _positive_sums(sizes: Integers, counts: Integers) -> tuple[int, NDArray[np.float64]]:
    """Give the distribution of the sum of those sizes that come out with a plus: the first sum, and the probabilities.

    Only sums of positive numbers are formed, so that tails keep their leading digits however small they are. What a
    float64 cannot tell from zero is left out.
    """
    first, whole = 0, np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        one = np.exp(_log_binomial(count))
        held = np.flatnonzero(one)
        spread = np.zeros(size * (int(held[-1]) - int(held[0])) + 1)
        spread[::size] = one[held[0] : held[-1] + 1]
        first += size * int(held[0])
        whole = np.convolve(whole, spread)
    return first, whole


def _log_binomial(count: int) -> NDArray[np.float64]:
    """Give the logarithms of the probabilities of 0 to `count` heads in so many tosses."""
    heads = np.arange(count + 1.0)
    logs: NDArray[np.float64] = -special.betaln(heads + 1, count - heads + 1) - math.log1p(count) - count * math.log(2)
    return logs


def minimal_detectable_difference(differences: Integers, *, draws: int, level: float, power: float = POWER) -> float:
    """Give the smallest true drop (or gain) of accuracy that the one-sided test finds with the stated power.

    differences: (n,) int64 as for difference_interval: they say how many images differ for no reason, and by how much
    level:       of the one-sided test; for the strictest of m tests under Holm, the family's level over m
    returns:     a fraction; 1.0 where n images can show nothing
    A drop comes on top of the differences seen only as far as it must: where it needs more differing images than were
    seen, all of them lose. The normal form of McNemar's power: d √n = z(level) √v + z(power) √(v − d²), v the mean squared
    difference under the drop d.
    Source: Connor 1987, doi:10.2307/2531961; Miettinen 1968.
    """
    n = len(differences)
    magnitudes = np.abs(differences)
    squares, total = int((magnitudes**2).sum()), int(magnitudes.sum())
    seen = squares / (n * draws**2)
    size = squares / (draws * total) if total else 1.0  # of a differing image
    z_level, z_power = float(special.ndtri(1 - level)), float(special.ndtri(power))

    def shortfall(drop: float) -> float:
        variance = max(seen, drop * size)
        return drop * math.sqrt(n) - z_level * math.sqrt(variance) - z_power * math.sqrt(max(0.0, variance - drop**2))

    if shortfall(1.0) <= 0:
        return 1.0
    from scipy import optimize  # half a second that no table has to wait for

    # Below the root the shortfall is negative: at zero it is so or, where nothing differs, on the way there.
    return float(optimize.brentq(shortfall, 1e-12, 1.0, xtol=1e-12))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Give p-values adjusted for their number, in the order given: reject those at most the family's level.

    Whatever is true, the chance of any false rejection is at most that level. Source: Holm 1979.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for passed, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - passed) * p_values[place]))
        adjusted[place] = highest
    return tuple(adjusted)


def rank_with_ties(scores: Sequence[Integers], *, level: float = TIE_LEVEL) -> tuple[int, ...]:
    """Rank checkpoints so that those that their images cannot tell apart share a rank; ranks in the order given.

    scores: for each checkpoint (n,) int64, on the same images and the same draws
    Every pair is tested two-sided, with Holm's correction over all pairs. In the order of accuracy a new rank begins only
    where every checkpoint before is separable from every one after; so two that are not separable always share a rank,
    and a rank may hold two that are separable but linked by others between them. A rank is one more than the number of
    checkpoints of better rank: 1, 1, 3.
    """
    order = sorted(range(len(scores)), key=lambda place: -int(scores[place].sum()))
    pairs = [(above, below) for above in range(len(order)) for below in range(above + 1, len(order))]
    adjusted = holm([sign_flip_test(scores[order[a]] - scores[order[b]]).two_sided for a, b in pairs])
    reaches = list(range(len(order)))  # the last one down the order that each is not separable from
    for (above, below), p_value in zip(pairs, adjusted, strict=True):
        if p_value > level:
            reaches[above] = max(reaches[above], below)
    ranks = [0] * len(order)
    rank, linked = 1, -1
    for position, place in enumerate(order):
        if position > linked:
            rank = position + 1
        linked = max(linked, reaches[position])
        ranks[place] = rank
    return tuple(ranks)


_TOP = 5
_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """top1, top5: share of images whose label ranks first, or among the first five; top1_ci95: Wilson interval."""

    top1: float
    top5: float
    top1_ci95: tuple[float, float]
    n: int


def measure(rank_of_label: NDArray[np.int64]) -> Metrics:
    """Compute the metrics from the 1-based ranks of the labels; top5 is 1.0 where no rank can exceed five."""
    n = len(rank_of_label)
    right = int((rank_of_label == 1).sum())
    return Metrics(
        top1=right / n, top5=int((rank_of_label <= _TOP).sum()) / n, top1_ci95=wilson_interval(right, n), n=n
    )


def wilson_interval(right: float, n: float) -> tuple[float, float]:
    """Give the 95 % interval of a share, `right` of `n` images, over test images of this kind.

    Source: Wilson 1927; unlike the normal interval it stays within [0, 1] and does not vanish at 0 and 1.
    """
    share = right / n
    centre = share + _Z95**2 / (2 * n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n))
    scale = 1 + _Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
