"""Canary: an evaluation whose labels say nothing, so that nothing but a leak can do better than chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.results.record import Result

FALSE_ALARMS = 1e-3  # probability that a sound run is told that it leaks
_TOLD = ("lambda", "auto", "k", "temperature")  # settings of which a run may have several


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One result against chance.

    right:   validation images whose random label was predicted
    chance:  how many are expected, images / classes
    largest: how many are still put down to chance
    """

    what: str
    right: int
    images: int
    chance: float
    largest: int

    @property
    def leaks(self) -> bool:
        return self.right > self.largest


def random_labels(
    labelled: Features, test: Features, *, seed: int, train_hashes: Mapping[str, str], val_hashes: Mapping[str, str]
) -> tuple[Features, Features]:
    """Give both splits with labels that say nothing: the labelled images' own in another order, uniform draws for the
    validation images.

    An image that is in both splits, byte for byte, keeps one label, so that it is found out. Whatever a sound probe
    predicts, every other validation image is right with probability 1 / n_classes, independently of all others.
    """
    own, drawn = draw_labels(
        labelled.labels,
        test.labels,
        n_classes=test.n_classes,
        seed=seed,
        train_contents=[train_hashes[image] for image in labelled.image_ids],
        val_contents=[val_hashes[image] for image in test.image_ids],
    )
    return replace(labelled, labels=own), replace(test, labels=drawn)


def draw_labels(
    labelled: Tensor,
    test: Tensor,
    *,
    n_classes: int,
    seed: int,
    train_contents: Sequence[str],
    val_contents: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Give what `random_labels` gives, of labels alone: (n,) and (m,) int64. contents: the hash of each image."""
    generator = torch.Generator().manual_seed(seed)
    own = labelled[torch.randperm(len(labelled), generator=generator)]
    drawn = torch.randint(n_classes, (len(test),), generator=generator)
    by_content = dict(zip(train_contents, own.tolist(), strict=True))
    for row, content in enumerate(val_contents):
        drawn[row] = by_content.get(content, int(drawn[row]))
    return own, drawn


def judge_canary(results: Sequence[Result]) -> tuple[Canary, ...]:
    """Hold the results of an evaluation with random labels against the exact binomial distribution of chance.

    The bound is such that a sound run, all its results together, exceeds it with a probability of at most
    FALSE_ALARMS. Raises NumericalError where so few images are scored that not even all of them right would exceed it.
    """
    scored = [result for result in results if result.metrics is not None]
    return tuple(_judge(result, FALSE_ALARMS / len(scored)) for result in scored)


def _judge(result: Result, level: float) -> Canary:
    from scipy.stats import binom

    assert result.metrics is not None
    n, n_classes = result.metrics.n, result.data.classes
    largest = int(binom.isf(level, n, 1 / n_classes))  # the smallest count exceeded with at most that probability
    if largest >= n:
        raise NumericalError(
            f"--canary: {n} validation images of {n_classes} classes are too few to tell a leak from chance",
            hint="Score more images: a larger --limit, or another data set.",
        )
    return Canary(
        what=f"{result.checkpoint.name}: {_setting(result)} {result.split.subset}@{result.split.draw}",
        right=round(result.metrics.top1 * n),
        images=n,
        chance=n / n_classes,
        largest=largest,
    )


def _setting(result: Result) -> str:
    told = (f"{name}={value:g}" for name, value in result.probe.params.items() if name in _TOLD)
    return " ".join([result.probe.name, *told])


def describe_canary(found: Sequence[Canary]) -> str:
    """Say of each result how it compares with chance, a line each."""
    return "\n".join(
        f"canary     {one.what}: {one.right:,} of {one.images:,} right, {one.chance:,.1f} by chance, "
        f"up to {one.largest:,} put down to it{': LEAKS' if one.leaks else ''}"
        for one in found
    )


def refuse_leaks(found: Sequence[Canary]) -> None:
    """Raise NumericalError where a result is better than chance allows."""
    leaking = [one for one in found if one.leaks]
    if leaking:
        first = max(leaking, key=lambda one: one.right / one.largest if one.largest else one.right)
        raise NumericalError(
            f"--canary: something leaks: with random labels {len(leaking)} of {len(found)} results are better than chance, "
            f"worst {first.what} with {first.right:,} of {first.images:,} right where {first.chance:,.1f} are expected",
            hint="Look for validation images among the labelled ones, and for code that sees the labels of what it scores.",
            kept="Nothing was written; results of runs without --canary are as they were, and not to be trusted.",
        )
