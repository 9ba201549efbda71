"""Canary: an evaluation with random labels, in which only a leak can do better than chance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from msn_eval.errors import NumericalError
from msn_eval.evaluation.plan import Plan
from msn_eval.features.extraction import Features
from msn_eval.results.record import Result

FALSE_ALARMS = 1e-3  # probability that a run without a leak is said to leak
_SHOWN = ("lambda", "auto", "k", "temperature")  # hyper-parameters of which a run can have several values


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One result against chance.

    Attributes:
        name: Checkpoint, configuration and draw.
        right: Validation images whose random label was predicted.
        images: Validation images.
        chance: Expected value of `right`: images / classes.
        largest: Largest value of `right` that is still attributed to chance.
    """

    name: str
    right: int
    images: int
    chance: float
    largest: int

    @property
    def leaks(self) -> bool:
        return self.right > self.largest


def choose_labels(plan: Plan, labelled: Features, test: Features) -> tuple[Features, Features]:
    """Return labelled and validation images with their own labels, or with random ones for a canary.

    For a canary the labelled images keep their labels in a different order; those of the validation images are drawn
    uniformly. An image that is in both splits, byte for byte, has one label, so that the leak is detected. Without a leak
    every other validation image is right with probability 1 / n_classes, independently of all others.

    Args:
        plan: Says whether this is a canary, its seed, and the hashes of the images.
        labelled: The labelled images.
        test: The validation images.
    """
    if not plan.config.canary:
        return labelled, test
    generator = torch.Generator().manual_seed(plan.config.seed)
    train_labels = labelled.labels[torch.randperm(len(labelled.labels), generator=generator)]
    val_labels = torch.randint(test.n_classes, (len(test.labels),), generator=generator)
    contents = [plan.train_hashes[image_id] for image_id in labelled.image_ids]
    by_content = dict(zip(contents, train_labels.tolist(), strict=True))
    for row, image_id in enumerate(test.image_ids):
        val_labels[row] = by_content.get(plan.val_hashes[image_id], int(val_labels[row]))
    return replace(labelled, labels=train_labels), replace(test, labels=val_labels)


def judge_canary(results: Sequence[Result]) -> tuple[Canary, ...]:
    """Compare the results of an evaluation with random labels with the exact binomial distribution of chance.

    The bound is such that a run without a leak exceeds it in any of its results with probability FALSE_ALARMS at most.

    Raises:
        NumericalError: So few images are scored that even all of them right would not exceed it.
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
    params = [f"{name}={value:g}" for name, value in result.probe.params.items() if name in _SHOWN]
    config = " ".join([result.probe.name, *params])
    return Canary(
        name=f"{result.checkpoint.name}: {config} {result.split.subset}@{result.split.draw}",
        right=round(result.metrics.top1 * n),
        images=n,
        chance=n / n_classes,
        largest=largest,
    )


def describe_canary(canaries: Sequence[Canary]) -> str:
    """Return a line per result that compares it with chance."""
    return "\n".join(
        f"canary     {canary.name}: {canary.right:,} of {canary.images:,} right, {canary.chance:,.1f} by chance, "
        f"at most {canary.largest:,} attributed to it{': LEAKS' if canary.leaks else ''}"
        for canary in canaries
    )


def refuse_leaks(canaries: Sequence[Canary]) -> None:
    """Raise NumericalError if a result is better than chance allows."""
    leaking = [canary for canary in canaries if canary.leaks]
    if leaking:
        worst = max(leaking, key=lambda canary: canary.right / max(canary.largest, 1))
        raise NumericalError(
            f"--canary: something leaks: with random labels {len(leaking)} of {len(canaries)} results are better than "
            f"chance, worst {worst.name} with {worst.right:,} of {worst.images:,} right where {worst.chance:,.1f} are "
            "expected",
            hint="Look for validation images among the labelled ones, and for code that sees the labels of what it scores.",
            kept="Nothing was written. Do not trust earlier results without --canary.",
        )
