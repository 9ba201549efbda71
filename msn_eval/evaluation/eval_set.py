"""EvalSet: images to score, those of the validation split or of a test set, and the classes a prediction may be of."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from msn_eval.config.request import REAL_PREFIX, EvaluationConfig
from msn_eval.data import read_named_split
from msn_eval.data.class_match import match_classes, read_class_map, read_real_labels
from msn_eval.data.dataset import DataSet, class_map_sha256
from msn_eval.data.hashing import content_sha256
from msn_eval.data.images import ImageSet
from msn_eval.errors import DataError
from msn_eval.features.extraction import Features

REAL_NAME = "ReaL"


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalSet:
    """Images to score.

    Attributes:
        name: Name of the data set in records and reports.
        images: The images, after --limit and without the skipped ones; `classes` are those that a prediction may be of.
        extracted: The images whose features are extracted: `images`, or more where several sets share them.
        hashes: SHA-256 of the bytes of each image of `extracted`, by id.
        skipped: Unreadable images that are not scored.
        columns: The index of each class among the trained ones. None for all of them.
        answers: (n, most) int64, for each image the classes that are right where it may have several. The first is its label;
            rows with fewer repeat it. None where labels are single.
        terms: What a test set adds to the protocol. Empty for validation images.
        distribution: Name and version of the plug-in that read the test set, None for a built-in reader.
    """

    name: str
    images: ImageSet
    extracted: ImageSet
    hashes: dict[str, str]
    skipped: tuple[str, ...] = ()
    columns: tuple[int, ...] | None = None
    answers: Tensor | None = None
    terms: Mapping[str, str] = field(default_factory=dict)
    distribution: str | None = None

    @cached_property
    def sha256(self) -> str:
        return content_sha256(self.images.ids, self.hashes)

    @cached_property
    def extracted_sha256(self) -> str:
        """Sets with the same one share their features."""
        return content_sha256(self.extracted.ids, self.hashes)

    @cached_property
    def classes_sha256(self) -> str:
        return class_map_sha256(self.images.classes)

    def count_among(self, digests: Set[str]) -> int:
        """Return the number of images with the same bytes as one of some images."""
        return sum(self.hashes[image_id] in digests for image_id in self.images.ids)

    def without(self, image_ids: Sequence[str]) -> "EvalSet":
        """Return the set with some images skipped."""
        skipped = set(image_ids)
        kept = self.images.only([image_id for image_id in self.images.ids if image_id not in skipped])
        return replace(self, images=kept, extracted=kept, skipped=tuple(image_ids))

    def select(self, features: Features) -> Features:
        """Return those of the extracted features that are scored, with this set's labels."""
        labels = torch.tensor(self.images.labels, dtype=torch.int64)
        return replace(features.only(self.images.ids), labels=labels, n_classes=len(self.images.classes))

    def restrict(self, scores: Tensor) -> Tensor:
        """Return scores of this set's classes from those of all trained ones, (m, n_trained).

        Where none of these classes has a score above minus infinity (no neighbour votes for one), all are equal. Where
        several classes are right, the label has the score of the best of them, which has the label's.
        """
        if self.columns is not None:
            scores = scores[:, torch.tensor(self.columns, device=scores.device)]
            scores = scores.masked_fill((scores == -torch.inf).all(dim=1, keepdim=True), 0)
        if self.answers is None:
            return scores
        answers = self.answers.to(scores.device)
        first, best = answers[:, :1], answers.gather(1, scores.gather(1, answers).argmax(dim=1, keepdim=True))
        return scores.scatter(1, best, scores.gather(1, first)).scatter(1, first, scores.gather(1, best))


def read_test_sets(config: EvaluationConfig, data: DataSet, cache_dir: Path | None) -> list[EvalSet]:
    """Read the data sets of --test, without their hashes: nothing is decoded or hashed yet. ReaL is `make_real_set`'s.

    Raises:
        DataError: A test set is missing, or has a class that is not trained.
        NumericalError: It has a single class.
    """
    class_map = read_class_map(Path(config.class_map)) if config.class_map is not None else None
    tests = []
    for name in config.test:
        if name.startswith(REAL_PREFIX):
            continue
        split = read_named_split(name, "val", cache_dir=cache_dir)
        images, renamed = match_classes(split.images, data.classes, class_map, where=name)
        terms = {"trained_on": class_map_sha256(data.classes)}
        if renamed:
            terms["class_map"] = hash_lines(f"{test}\t{trained}" for test, trained in sorted(renamed.items()))
        position = {trained: column for column, trained in enumerate(data.classes)}
        images = images.first_of_each_class(config.limit) if config.limit else images
        tests.append(
            EvalSet(
                name=split.name,
                images=images,
                extracted=images,
                hashes={},
                columns=tuple(position[trained] for trained in images.classes),
                terms=terms,
                distribution=split.distribution,
            )
        )
    return tests


def make_real_set(path: Path, val: EvalSet) -> EvalSet:
    """Return the validation images with the labels of ImageNet ReaL, without those that it gives none.

    The label of an image is its ImageNet label where this is one of them, else the first.

    Raises:
        DataError: The file cannot be read, or it does not belong to these images.
    """
    labels = read_real_labels(path, val.images)
    images = val.images.only([image_id for image_id in val.images.ids if labels[image_id]])
    pairs = [(labels[image_id], own) for image_id, own in zip(images.ids, images.labels, strict=True)]
    answers = [[own] * (own in right) + [label for label in right if label != own] for right, own in pairs]
    most = max(map(len, answers))
    return replace(
        val,
        name=f"{val.name} ({REAL_NAME})",
        images=replace(images, labels=tuple(first for first, *_ in answers)),
        answers=torch.tensor([right + right[:1] * (most - len(right)) for right in answers]),
        terms={
            "trained_on": val.classes_sha256,
            "labels": hash_lines(" ".join(map(str, labels[image_id])) for image_id in images.ids),
        },
    )


def check_different(tests: Sequence[EvalSet]) -> None:
    """Raise DataError where two test sets would give the same numbers."""
    first: dict[tuple[object, ...], str] = {}
    for test in tests:
        key = (test.sha256, test.classes_sha256, *sorted(test.terms.items()))
        if key in first:
            what = f"two test sets hold the same images: {first[key]} and {test.name}"
            raise DataError(what, hint="Give each of them once.")
        first[key] = test.name


def hash_lines(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines of text, such as file names."""
    return hashlib.sha256(b"".join(os.fsencode(line) + b"\n" for line in lines)).hexdigest()
