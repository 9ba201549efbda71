"""Canary: an evaluation with random labels, in which only a leak can do better than chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msn_eval.errors import NumericalError
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


def random_labels(
    labelled: Features, test: Features, *, seed: int, train_hashes: Mapping[str, str], val_hashes: Mapping[str, str]
) -> tuple[Features, Features]:
    """Return both splits with random labels.

    The labelled images keep their labels in a different order; those of the validation images are drawn uniformly. An image
    that is in both splits, byte for byte, has one label, so that it is found out. Without a leak every other validation
    image is right with probability 1 / n_classes, independently of all others.

    Args:
        labelled: The labelled images.
        test: The validation images.
        seed: Of the draws.
        train_hashes: SHA-256 of each labelled image's bytes, by id.
        val_hashes: The same of each validation image.
    """
    train_labels, val_labels = draw_labels(
        labelled.labels,
        test.labels,
        n_classes=test.n_classes,
        seed=seed,
        train_contents=[train_hashes[image_id] for image_id in labelled.image_ids],
        val_contents=[val_hashes[image_id] for image_id in test.image_ids],
    )
    return replace(labelled, labels=train_labels), replace(test, labels=val_labels)


def draw_labels(
    labelled: Tensor,
    test: Tensor,
    *,
    n_classes: int,
    seed: int,
    train_contents: Sequence[str],
    val_contents: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Return the labels of `random_labels`, (n,) and (m,) int64. The contents are the hash of each image."""
    generator = torch.Generator().manual_seed(seed)
    train_labels = labelled[torch.randperm(len(labelled), generator=generator)]
    val_labels = torch.randint(n_classes, (len(test),), generator=generator)
    by_content = dict(zip(train_contents, train_labels.tolist(), strict=True))
    for row, content in enumerate(val_contents):
        val_labels[row] = by_content.get(content, int(val_labels[row]))
    return train_labels, val_labels


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
