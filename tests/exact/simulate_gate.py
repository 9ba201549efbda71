"""Simulate the regression gate and the intervals: how often they are wrong where the truth is known.

    python tests/exact/simulate_gate.py --out reports/exact/gate.md      # all of it, minutes
    python tests/exact/simulate_gate.py --share 0.05                     # a twentieth of the samples

Fixed seeds. Images are drawn by how their score differs between two checkpoints. The code under test is that of `check` and
`compare`: `judge_differences` with its exact tests and Holm's correction, and the intervals.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_eval.results.gate import LEVEL, judge_differences
from msn_eval.results.statistics import (
    Integers,
    accuracy_interval,
    difference_interval,
    minimal_detectable_difference,
    sign_flip_test,
    wilson_interval,
)

PROTOCOLS = 12
DISCORDANCES = (0.002, 0.02, 0.08)
SIZES = (1_000, 5_000, 10_000, 50_000)
# Of the images that differ between checkpoints measured with three draws: in how many draws they do.
_SIZES_OF_THREE = {1: 0.5, 2: 0.2, 3: 0.3}


@dataclass(frozen=True)
class World:
    """How scores of images differ between two checkpoints.

    Attributes:
        draws: Number of draws.
        share: Fraction of images that differ.
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
        found = np.zeros(2 * self.draws + 1)
        for size, weight in sizes.items():
            found[self.draws - size] = self.share * weight * (1 + self.tilt) / 2
            found[self.draws + size] = self.share * weight * (1 - self.tilt) / 2
        found[self.draws] = 1 - self.share
        return found

    @property
    def difference(self) -> float:
        return float(self.values @ self.probabilities) / self.draws

    def samples(self, n: int, count: int, generator: np.random.Generator) -> Iterator[Integers]:
        """Yield `count` samples of the differences of n images."""
        for counts in generator.multinomial(n, self.probabilities, count):
            yield np.repeat(self.values, counts)


def families_called(world: World, n: int, families: int, *, margin: float, seed: int) -> tuple[int, int]:
    """Count the families of 12 protocols with any regression, by the test alone and with the margin too."""
    generator = np.random.default_rng(seed)
    draws = [world.draws] * PROTOCOLS
    bare = called = 0
    for _ in range(families):
        family = [*world.samples(n, PROTOCOLS, generator)]
        if any(one.verdict == "regression" for one in judge_differences(family, draws, margin=0.0)):
            bare += 1
            # Only such a family can be one: the margin is an additional condition.
            called += any(one.verdict == "regression" for one in judge_differences(family, draws, margin=margin))
    return bare, called


def regressions_found(world: World, n: int, samples: int, *, margin: float, seed: int) -> int:
    """Count how often the one protocol of this world is a regression while eleven others show no change."""
    generator = np.random.default_rng(seed)
    unchanged = World(world.draws, world.share, 0.0)
    regressions = 0
    for changed in world.samples(n, samples, generator):
        others = unchanged.samples(n, PROTOCOLS - 1, generator)
        regressions += (
            judge_differences([changed, *others], [world.draws] * PROTOCOLS, margin=margin)[0].verdict == "regression"
        )
    return regressions


def coverage(world: World, n: int, samples: int, *, seed: int) -> float:
    """Return how often the paired interval contains the true difference."""
    generator = np.random.default_rng(seed)
    intervals = (difference_interval(one, draws=world.draws) for one in world.samples(n, samples, generator))
    return sum(one.low <= world.difference <= one.high for one in intervals) / samples


def accuracy_coverage(share: float, agreement: float, draws: int, n: int, samples: int, *, seed: int) -> float:
    """Return how often the interval of one accuracy contains the true one.

    `agreement` is the probability that all draws of an image have the outcome of the first one.
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
    """Return how often the test finds the drop that should be found in 80 of 100 cases."""
    typical = np.repeat(world.values, np.rint(n * world.probabilities).astype(int))
    drop = minimal_detectable_difference(typical, draws=world.draws, level=level)
    size = -World(world.draws, world.share, 1.0).difference  # the drop if all that differ are lost
    tilted = World(world.draws, max(world.share, drop / size * world.share), min(1.0, drop / size))
    generator = np.random.default_rng(seed)
    return sum(sign_flip_test(one).lower <= level for one in tilted.samples(n, samples, generator)) / samples


def _null(share: float) -> Iterator[str]:
    yield f"## No change: families of {PROTOCOLS} protocols with any regression, at most 1 % wanted\n"
    yield "Margin 0 leaves the test alone to decide; the default margin of one point is the gate as it is used.\n"
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
    yield f"\nThe level of a family is {LEVEL:g}, so that the rate stays below 1 % with room to prove it."
    yield f"All together, margin 0: {totals[1]} of {totals[0]:,} families, {totals[1] / totals[0]:.2%}"
    yield f"(95 % interval {low:.2%} to {high:.2%}). Margin 0.01: {totals[2]} of {totals[0]:,}."


def _power(share: float) -> Iterator[str]:
    samples = max(20, round(400 * share))
    yield "\n## A true drop in one of 12 protocols: how often it is a regression, at least 95 % wanted\n"
    yield "| drop, points | margin | draws | images | differing | found |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    for drop, margin, draws in ((0.02, 0.01, 1), (0.01, 0.002, 1), (0.02, 0.01, 3), (0.01, 0.002, 3)):
        whole = -World(draws, 0.02, 1.0).difference
        # With three draws an image counts by the draws in which it differs: more of them must.
        world = World(draws, 0.02 * max(1.0, drop / whole), min(1.0, drop / whole))
        found = regressions_found(world, 10_000, samples, margin=margin, seed=2)
        rate = f"{found / samples:.1%} of {samples:,}"
        yield f"| {-100 * world.difference:.2f} | {margin:g} | {draws} | 10,000 | {world.share:.1%} | {rate} |"
    yield "\n## The minimal detectable drop: found about 80 times in 100\n"
    yield "| draws | images | differing | level | found |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for draws in (1, 3):
        for n in (1_000, 10_000):
            for discordance in DISCORDANCES:
                for level in (LEVEL, LEVEL / PROTOCOLS):
                    found_share = power_at_detectable(World(draws, discordance, 0.0), n, samples, level=level, seed=3)
                    yield f"| {draws} | {n:,} | {discordance:.1%} | {level:.2g} | {found_share:.1%} |"


def _coverage(share: float) -> Iterator[str]:
    samples = max(50, round(1_500 * share))
    yield f"\n## 95 % intervals of a paired difference: coverage in {samples:,} samples, 93 to 97 % wanted\n"
    yield "Tilt: (lost − gained) / differing. Expected: images that differ, on average. Where that is below 20 there are few"
    yield "possible outcomes, and the interval is meant to hold the truth more often rather than less.\n"
    yield "| draws | images | differing | expected | tilt 0 | tilt 0.5 | tilt 1 |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for draws in (1, 3):
        for n in (1_000, 10_000, 50_000):
            for discordance in (*DISCORDANCES, 0.3):
                held = [coverage(World(draws, discordance, tilt), n, samples, seed=4) for tilt in (0.0, 0.5, 1.0)]
                texts = " | ".join(f"{one:.1%}" for one in held)
                yield f"| {draws} | {n:,} | {discordance:.1%} | {n * discordance:g} | {texts} |"
    yield "\n## 95 % intervals of one accuracy\n"
    yield "| draws | agreement of draws | images | accuracy 5 % | 50 % | 76 % | 97 % |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for draws, agreement in ((1, 1.0), (3, 0.0), (3, 0.7)):
        for n in (1_000, 5_000):
            held = [accuracy_coverage(p, agreement, draws, n, samples, seed=5) for p in (0.05, 0.5, 0.76, 0.97)]
            texts = " | ".join(f"{one:.1%}" for one in held)
            yield f"| {draws} | {agreement:g} | {n:,} | {texts} |"


def _run_section(name: str, share: float) -> list[str]:
    return [*{"null": _null, "power": _power, "coverage": _coverage}[name](share)]


def report(share: float) -> Iterator[str]:
    """Yield the lines of the log."""
    yield "# The regression gate where the truth is known\n"
    yield "Written by `make exact`. Fixed seeds: a rerun gives the same bytes.\n"
    with ProcessPoolExecutor(2) as pool:
        for lines in pool.map(_run_section, ("null", "power", "coverage"), [share] * 3):
            yield from lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the log, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the samples")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    lines = []
    for line in report(options.share):
        print(line, flush=True)
        lines.append(line.rstrip())
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
