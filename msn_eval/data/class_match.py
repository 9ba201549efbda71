"""Class match: which trained class stands for each class of a test set, and the labels of ImageNet ReaL."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from msn_eval.data.dataset import class_map_sha256
from msn_eval.data.imagenet_labels import WNID
from msn_eval.data.imagenet_subsets import read_publication
from msn_eval.data.images import ImageSet, reading
from msn_eval.errors import DataError, NumericalError
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file

_SHOWN = 20
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.")
_LEAST_AGREEMENT = 0.5  # share of the images whose ImageNet label is among those of ReaL; published: about nine tenths


def read_class_map(path: Path) -> dict[str, str]:
    """Read lines `TEST_CLASS<TAB or comma>TRAIN_CLASS`: the trained class of each class of a test set.

    Raises:
        DataError: The file cannot be read, a line has another form, or a class of the test set has two trained classes.
    """
    with reading(path, hint="Give --class-map a text file with a line for each class: TEST_CLASS,TRAIN_CLASS."):
        text = read_regular_file(path, most_bytes=MOST_TEXT_BYTES).decode("utf-8-sig", "surrogateescape")
    trained: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t" if "\t" in line else ",")]
        if len(fields) != 2 or not all(fields):
            hint = "Write TEST_CLASS, a tab or a comma, and TRAIN_CLASS. With a tab, names may have commas."
            raise DataError(f"line {number}: {line[:80]!r} is not a pair of classes", where=str(path), hint=hint)
        if trained.setdefault(fields[0], fields[1]) != fields[1]:
            what = f"line {number}: {fields[0]!r} is {trained[fields[0]]!r} in an earlier line and {fields[1]!r} here"
            raise DataError(what, where=str(path), hint="Keep one line for each class of the test set.")
    return trained


def match_classes(
    images: ImageSet, trained: Sequence[str], class_map: Mapping[str, str] | None = None, *, where: str
) -> tuple[ImageSet, dict[str, str]]:
    """Number the classes of a test set as the trained classes that stand for them, in the order of training.

    A class stands for the trained class of its name, unless the class map has it. Where folders are called `0` to `n - 1`
    and the n trained classes are WordNet ids, each stands for the class of that number, as in ImageNet-V2.

    Args:
        images: The test set with its own classes.
        trained: Names of the trained classes, in order.
        class_map: Trained classes by class of the test set.
        where: The test set, for errors.

    Returns:
        The images, with `classes` the trained classes that are present; and the trained class of each class whose name
        differs from it.

    Raises:
        DataError: A class is not among the trained ones. The error has all names, up to twenty.
        NumericalError: All images are of one trained class, so that every prediction would be right.
    """
    mapped = {name: (class_map or {}).get(name, name) for name in images.classes}
    if _are_numbers(images.classes, trained):
        mapped = {name: trained[int(name)] if mapped[name] == name else mapped[name] for name in images.classes}
    unknown = [name for name in images.classes if mapped[name] not in set(trained)]
    if unknown:
        raise _make_unknown_error(unknown, mapped, trained, where=where, has_map=class_map is not None)
    present = set(mapped.values())
    if len(present) == 1:
        raise NumericalError(
            f"all images of this test set are of the trained class {present.pop()!r}: every prediction would be right",
            where=where,
            hint="Give a test set of several classes.",
        )
    classes = tuple(name for name in trained if name in present)
    number = {name: label for label, name in enumerate(classes)}
    labels = tuple(number[mapped[images.classes[label]]] for label in images.labels)
    renamed = {name: trained_name for name, trained_name in mapped.items() if name != trained_name}
    return replace(images, labels=labels, classes=classes), renamed


def _are_numbers(names: Sequence[str], trained: Sequence[str]) -> bool:
    """Whether names are numbers of trained ImageNet classes. Part of the numbers is enough for all classes of ImageNet."""
    numbers = {str(number) for number in range(len(trained))}
    if not all(map(WNID.fullmatch, trained)) or not set(names) <= numbers:
        return False
    return len(names) == len(numbers) or class_map_sha256(tuple(trained)) == read_publication().class_map_sha256


def _make_unknown_error(
    unknown: Sequence[str], mapped: Mapping[str, str], trained: Sequence[str], *, where: str, has_map: bool
) -> DataError:
    texts = [repr(name) if mapped[name] == name else f"{name!r} (mapped to {mapped[name]!r})" for name in unknown]
    listed = ", ".join(texts[:_SHOWN]) + (f", and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")
    if len(unknown) == len(mapped):
        sample = ", ".join(map(repr, trained[:3]))
        what = (
            f"this test set has no class in common with the {len(trained)} trained ones ({sample}, …): it has {listed}"
        )
    else:
        are = "is" if len(unknown) == 1 else "are"
        what = f"{len(unknown)} of {len(mapped)} classes of this test set {are} not among the trained ones: {listed}"
    hint = "Say with --class-map FILE which trained class each of them is, or leave them out of the test set."
    if has_map:
        hint = "Write into the class map which trained class each of them is, as the folder of that class is called."
    return DataError(what, where=where, hint=hint)


def read_real_labels(path: Path, val: ImageSet) -> dict[str, tuple[int, ...]]:
    """Read the labels of ImageNet ReaL for validation images, by id; none of an image that ReaL leaves out.

    The file is `real.json` of the reassessed-imagenet repository: a list with the list of class numbers of each image, in
    the order of their files, ILSVRC2012_val_00000001.JPEG first.

    Args:
        path: The file.
        val: Validation images of ImageNet.

    Raises:
        DataError: It cannot be read, or it does not belong to these images.

    Source: Beyer et al. 2020, arXiv:2006.07159.
    """
    hint = "Give real:FILE the file real.json of github.com/google-research/reassessed-imagenet."
    with reading(path, hint=hint):
        text = read_regular_file(path, most_bytes=MOST_TEXT_BYTES)
    try:
        entries = json.loads(text)
        rows = [tuple(dict.fromkeys(entry)) for entry in entries]
        if not all(type(label) is int and 0 <= label < len(val.classes) for row in rows for label in row):
            raise ValueError(f"a label is not a number from 0 to {len(val.classes) - 1}")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"not a list of lists of class numbers: {error}", where=str(path), hint=hint) from error
    found: dict[str, tuple[int, ...]] = {}
    for image_id in val.ids:
        match = _VAL_IMAGE.match(image_id.rpartition("/")[2])
        if match is None or not 1 <= int(match[1]) <= len(rows):
            what = f"labels {len(rows):,} images by their numbers, and {image_id} has none of these"
            raise DataError(what, where=str(path), hint="ReaL labels the images of ImageNet's own val split.")
        found[image_id] = rows[int(match[1]) - 1]
    pairs = [(label, found[image_id]) for image_id, label in zip(val.ids, val.labels, strict=True) if found[image_id]]
    agreeing = sum(label in labels for label, labels in pairs)
    if not pairs or agreeing < _LEAST_AGREEMENT * len(pairs):
        what = f"has the ImageNet label for only {agreeing:,} of {len(pairs):,} images that it labels"
        raise DataError(f"{what}: images or classes are in another order", where=str(path), hint=hint)
    return found
