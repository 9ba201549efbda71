"""Simulate the regression gate and the intervals: count their errors on data whose true difference is known.

    python tests/exact/simulate_gate.py --out reports/exact/gate.md      # all samples, takes minutes
    python tests/exact/simulate_gate.py --share 0.05                     # a twentieth of the samples

Seeds are fixed. The simulation draws, for each image, the difference of its score between two checkpoints. It tests the code that
`check` and `compare` call: `judge_differences` with its exact tests and Holm's correction, and the intervals.
"""

import argparse
import bisect
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from msn_eval.results.gate import DEFAULT_MARGIN, LEVEL, Verdict, judge_differences
from msn_eval.results.statistics import (
    Integers,
    accuracy_interval,
    difference_interval,
    holm,
    minimal_detectable_difference,
    sign_flip_test,
    wilson_interval,
)

PROTOCOLS = 12
DISCORDANCES = (0.002, 0.02, 0.08)
SIZES = (1_000, 5_000, 10_000, 50_000)
# Of the two promised error rates: test images, fractions that differ, and a distribution of sizes with three draws.
PROMISED_SIZES = (2_500, 10_000)
PROMISED_DISCORDANCES = (0.02, 0.04, 0.08)
# With three draws: among the images that differ, the fractions that differ in 1, 2 and 3 draws.
_SIZES_OF_THREE = {1: 0.5, 2: 0.2, 3: 0.3}


@dataclass(frozen=True)
class World:
    """Distribution of the score differences of images.

    Attributes:
        draws: Number of draws.
        share: Fraction of images that differ, in [0, 1].
        tilt: (lost - gained) / differing, in [-1, 1].
    """

    draws: int
    share: float
    tilt: float

    @property
    def values(self) -> Integers:
        return np.arange(-self.draws, self.draws + 1)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        sizes = _SIZES_OF_THREE if self.draws == 3 else {1: 1.0}
        probabilities = np.zeros(2 * self.draws + 1)
        for size, weight in sizes.items():
            probabilities[self.draws - size] = self.share * weight * (1 + self.tilt) / 2
            probabilities[self.draws + size] = self.share * weight * (1 - self.tilt) / 2
        probabilities[self.draws] = 1 - self.share
        return probabilities

    @classmethod
    def of(cls, draws: int, share: float, drop: float) -> "World":
        """Return the world with a true drop. Where fewer images differ than the drop needs, all of them lose."""
        largest = -cls(draws, share, 1.0).difference
        return cls(draws, share * max(1.0, drop / largest), min(1.0, drop / largest))

    @property
    def difference(self) -> float:
        return float(self.values @ self.probabilities) / self.draws

    def samples(self, n: int, count: int, generator: np.random.Generator) -> Iterator[Integers]:
        """Yield `count` samples, each the differences of n images."""
        for counts in generator.multinomial(n, self.probabilities, count):
            yield np.repeat(self.values, counts)


def families_called(world: World, n: int, families: int, *, margin: float, seed: int) -> tuple[int, int]:
    """Count the families of 12 protocols with a reported regression: by the test only, and with the margin."""
    generator = np.random.default_rng(seed)
    draws = [world.draws] * PROTOCOLS
    bare = called = 0
    for _ in range(families):
        family = [*world.samples(n, PROTOCOLS, generator)]
        if min(holm([sign_flip_test(one).lower for one in family])) <= LEVEL:  # no regression without it
            bare += any(one.verdict == "regression" for one in judge_differences(family, draws, margin=0.0))
            called += any(one.verdict == "regression" for one in judge_differences(family, draws, margin=margin))
    return bare, called


def regressions_found(world: World, n: int, samples: int, *, margin: float, seed: int) -> int:
    """Count the samples in which the changed protocol is a regression, beside eleven protocols without a change."""
    generator = np.random.default_rng(seed)
    unchanged = World(world.draws, world.share, 0.0)
    regressions = 0
    for changed in world.samples(n, samples, generator):
        family = [changed, *unchanged.samples(n, PROTOCOLS - 1, generator)]
        regressions += judge_differences(family, [world.draws] * PROTOCOLS, margin=margin)[0].verdict == "regression"
    return regressions


def exact_rates(share: float, drop: float, n: int, *, margin: float) -> tuple[float, float]:
    """Compute the probabilities that a checkpoint with a true drop passes and is a regression: one protocol, one draw.

    With one draw the numbers of images lost and gained decide. For each number gained, the verdict goes from `pass` over
    `inconclusive` to `regression` as more are lost, so that two limits and binomial distributions give the probabilities.
    """
    world = World.of(1, share, drop)
    loses, _, gains = world.probabilities

    @cache
    def judge(lost: int, gained: int) -> Verdict:
        return judge_differences([np.repeat([-1, 0, 1], [lost, n - lost - gained, gained])], [1], margin=margin)[
            0
        ].verdict

    passes = regressions = 0.0
    first_failing = first_regression = 0  # neither falls as more are gained
    for gained in range(n):
        weight = float(stats.binom.pmf(gained, n, gains))
        if weight < 1e-8:
            if gained > n * gains:
                break
            continue
        possible = range(n - gained + 1)
        if not first_regression:
            first_failing = bisect.bisect_left(possible, True, key=lambda lost: judge(lost, gained) != "pass")
            first_regression = bisect.bisect_left(possible, True, key=lambda lost: judge(lost, gained) == "regression")
        while judge(first_failing, gained) == "pass":
            first_failing += 1
        while judge(first_regression, gained) != "regression":
            first_regression += 1
        below = stats.binom.cdf([first_failing - 1, first_regression - 1], n - gained, loses / (1 - gains))
        passes += weight * float(below[0])
        regressions += weight * (1 - float(below[1]))
    return passes, regressions


def verdict_counts(world: World, n: int, samples: int, *, margin: float, seed: int) -> Counter[Verdict]:
    """Count the verdicts on samples of one protocol."""
    generator = np.random.default_rng(seed)
    draws = [world.draws]
    return Counter(
        judge_differences([one], draws, margin=margin)[0].verdict for one in world.samples(n, samples, generator)
    )


def coverage(world: World, n: int, samples: int, *, seed: int) -> float:
    """Return the fraction of samples whose paired interval contains the true difference."""
    generator = np.random.default_rng(seed)
    intervals = (difference_interval(one, draws=world.draws) for one in world.samples(n, samples, generator))
    return sum(one.low <= world.difference <= one.high for one in intervals) / samples


def accuracy_coverage(share: float, agreement: float, draws: int, n: int, samples: int, *, seed: int) -> float:
    """Return the fraction of samples whose interval of one accuracy contains the true accuracy.

    Args:
        share: True accuracy, in [0, 1].
        agreement: Probability that all draws of an image have the outcome of the first; otherwise they are independent.
        draws: Number of draws.
        n: Number of images.
        samples: Number of samples.
        seed: Seed of the generator.
    """
    generator = np.random.default_rng(seed)
    held = 0
    for _ in range(samples):
        own = generator.random((draws, n)) < share
        right = np.where(generator.random(n) < agreement, own[:1], own)
        interval = accuracy_interval(right.sum(axis=0), draws=draws)
        held += interval.low <= share <= interval.high
    return held / samples


def power_at_detectable(world: World, n: int, samples: int, *, level: float, seed: int) -> float:
    """Return the fraction of samples in which the test finds the minimal detectable drop (80 % power)."""
    typical = np.repeat(world.values, np.rint(n * world.probabilities).astype(int))
    drop = minimal_detectable_difference(typical, draws=world.draws, level=level)
    size = -World(world.draws, world.share, 1.0).difference  # the drop if all differing images are lost
    tilted = World(world.draws, max(world.share, drop / size * world.share), min(1.0, drop / size))
    generator = np.random.default_rng(seed)
    return sum(sign_flip_test(one).lower <= level for one in tilted.samples(n, samples, generator)) / samples


def _promises(share: float) -> Iterator[str]:
    samples = max(50, round(2_000 * share))
    yield "## One protocol: how often a drop of exactly the margin passes, and the same checkpoint is a regression\n"
    yield "At most 2.5 % and 0.5 % are promised. With one draw the rates are computed exactly, with three draws simulated"
    yield f"({samples:,} samples; a 95 % interval in brackets). The margin is one point.\n"
    yield "| draws | images | differing | drop of the margin: pass | regression | same checkpoint: pass | regression |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for n in (797, *PROMISED_SIZES):
        for discordance in PROMISED_DISCORDANCES:
            rates = [exact_rates(discordance, drop, n, margin=DEFAULT_MARGIN) for drop in (DEFAULT_MARGIN, 0.0)]
            texts = " | ".join(f"{one:.2%}" for pair in rates for one in pair)
            yield f"| 1 | {n:,} | {discordance:.1%} | {texts} |"
    for n in (797, *PROMISED_SIZES):
        for discordance in PROMISED_DISCORDANCES:
            texts = ""
            for drop in (DEFAULT_MARGIN, 0.0):
                counts = verdict_counts(World.of(3, discordance, drop), n, samples, margin=DEFAULT_MARGIN, seed=6)
                for verdict in ("pass", "regression"):
                    low, high = wilson_interval(counts[verdict], samples)
                    texts += f" {counts[verdict] / samples:.2%} ({low:.2%} to {high:.2%}) |"
            yield f"| 3 | {n:,} | {discordance:.1%} |{texts}"
    yield ""


def _null(share: float) -> Iterator[str]:
    yield f"## No true change: families of {PROTOCOLS} protocols with a reported regression, at most 1 % allowed\n"
    yield "With margin 0 only the test decides. The margin of one point is the default of the gate.\n"
    yield "| draws | images | differing | families | margin 0: regression | margin 0.01: regression |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    totals = [0, 0, 0]
    for draws, most in ((1, 1_500), (3, 500)):
        families = max(20, round(most * share))
        for n in SIZES:
            for discordance in DISCORDANCES:
                bare, called = families_called(World(draws, discordance, 0.0), n, families, margin=0.01, seed=1)
                totals = [totals[0] + families, totals[1] + bare, totals[2] + called]
                rates = f"{bare} ({bare / families:.2%}) | {called} ({called / families:.2%})"
                yield f"| {draws} | {n:,} | {discordance:.1%} | {families:,} | {rates} |"
    low, high = wilson_interval(totals[1], totals[0])
    yield f"\nThe level per family is {LEVEL:g}, so that the rate is clearly below 1 %."
    yield f"In total, margin 0: {totals[1]} of {totals[0]:,} families, {totals[1] / totals[0]:.2%}"
    yield f"(95 % interval {low:.2%} to {high:.2%}). Margin 0.01: {totals[2]} of {totals[0]:,}."


def _power(share: float) -> Iterator[str]:
    samples = max(20, round(400 * share))
    yield "\n## A true drop in one of 12 protocols: how often it is reported as a regression, at least 95 % required\n"
    yield "| drop, points | margin | draws | images | differing | found |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    for drop, margin, draws in ((0.02, 0.01, 1), (0.01, 0.002, 1), (0.02, 0.01, 3), (0.01, 0.002, 3)):
        # With three draws, an image that differs in one draw counts a third, so more images must differ.
        world = World.of(draws, 0.02, drop)
        regressions = regressions_found(world, 10_000, samples, margin=margin, seed=2)
        rate = f"{regressions / samples:.1%} of {samples:,}"
        yield f"| {-100 * world.difference:.2f} | {margin:g} | {draws} | 10,000 | {world.share:.1%} | {rate} |"
    yield "\n## The minimal detectable drop: found in about 80 % of the samples\n"
    yield "| draws | images | differing | level | found |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for draws in (1, 3):
        for n in (1_000, 10_000):
            for discordance in DISCORDANCES:
                for level in (LEVEL, LEVEL / PROTOCOLS):
                    found_share = power_at_detectable(World(draws, discordance, 0.0), n, samples, level=level, seed=3)
                    yield f"| {draws} | {n:,} | {discordance:.1%} | {level:.2g} | {found_share:.1%} |"


def _coverage(share: float) -> Iterator[str]:
    samples = max(50, round(500 * share))
    yield f"\n## 95 % intervals of a paired difference: coverage in {samples:,} samples each, with a standard error of 1 %\n"
    yield "Tilt: (lost − gained) / differing. Expected: mean number of images that differ. If it is small, there are few"
    yield "possible outcomes, and by design the interval contains the true difference more often than 95 %.\n"
    yield "| draws | images | differing | expected | tilt 0 | tilt 0.5 | tilt 1 |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for draws in (1, 3):
        for n in (1_000, 10_000, 50_000):
            for discordance in (*DISCORDANCES, 0.3):
                held = [coverage(World(draws, discordance, tilt), n, samples, seed=4) for tilt in (0.0, 0.5, 1.0)]
                texts = " | ".join(f"{one:.1%}" for one in held)
                yield f"| {draws} | {n:,} | {discordance:.1%} | {n * discordance:g} | {texts} |"
    yield "\n## 95 % intervals of one accuracy: coverage\n"
    yield "| draws | agreement of draws | images | accuracy 5 % | 50 % | 76 % | 97 % |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for draws, agreement in ((1, 1.0), (3, 0.0), (3, 0.7)):
        for n in (1_000, 5_000):
            held = [accuracy_coverage(p, agreement, draws, n, samples, seed=5) for p in (0.05, 0.5, 0.76, 0.97)]
            texts = " | ".join(f"{one:.1%}" for one in held)
            yield f"| {draws} | {agreement:g} | {n:,} | {texts} |"


def _part(name: str, share: float) -> list[str]:
    return [*{"promises": _promises, "null": _null, "power": _power, "coverage": _coverage}[name](share)]


def report(share: float) -> Iterator[str]:
    """Yield the lines of the log."""
    yield "# The regression gate on simulated data\n"
    yield "Written by `make exact`. The seeds are fixed: a second run gives the same bytes.\n"
    with ProcessPoolExecutor(2) as pool:
        for lines in pool.map(_part, ("promises", "null", "power", "coverage"), [share] * 4):
            yield from lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the samples, in (0, 1]")
    parser.add_argument("--out", type=Path, default=Path(os.devnull))
    options = parser.parse_args()
    with options.out.open("w", encoding="utf-8") as file:
        for line in report(options.share):
            print(line, flush=True)
            print(line, file=file)
