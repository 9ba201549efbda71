"""The trained class of each class of a test set, and the labels of ImageNet ReaL."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from msn_eval.data.class_match import match_classes, read_class_map, read_real_labels
from msn_eval.data.images import ImageSet
from msn_eval.errors import DataError, NumericalError

_WNIDS = tuple(f"n{number:08d}" for number in range(1, 13))
_Make = Callable[[Sequence[str]], ImageSet]


@pytest.fixture
def make_set(memory_images: Callable[..., ImageSet]) -> _Make:
    """Return a function that makes a set of one image for each class."""
    return lambda names: memory_images({f"{name}/x.png": b"" for name in names})


def _trained_classes(images: ImageSet) -> dict[str, str]:
    return {image_id: images.classes[label] for image_id, label in zip(images.ids, images.labels, strict=True)}


def test_classes_are_matched_by_name_in_the_order_of_training(make_set: _Make) -> None:
    images, renamed = match_classes(make_set(["cat", "ant"]), ("ant", "bee", "cat"), where="test")

    assert (images.classes, images.labels, renamed) == (("ant", "cat"), (0, 1), {})


def test_folders_of_numbers_are_the_classes_of_imagenet_by_number(make_set: _Make) -> None:
    images, renamed = match_classes(make_set(list(map(str, range(12)))), _WNIDS, where="v2")

    assert _trained_classes(images) == {f"{number}/x.png": wnid for number, wnid in enumerate(_WNIDS)}
    assert renamed == {str(number): wnid for number, wnid in enumerate(_WNIDS)}


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (list(map(str, range(11))), _WNIDS),  # the numbers of which 12 classes?
        (list(map(str, range(3))), ("ant", "bee", "cat")),
        (["00", "1", *map(str, range(2, 12))], _WNIDS),
    ],
)
def test_numbers_that_may_mean_something_else_are_refused(
    make_set: _Make, names: list[str], trained: tuple[str, ...]
) -> None:
    with pytest.raises(DataError, match="has no class in common with the") as caught:
        match_classes(make_set(names), trained, where="v2")

    assert "--class-map FILE" in caught.value.hint


def test_class_map_renames_and_may_join_classes(make_set: _Make) -> None:
    class_map = {"tabby": "cat", "tiger": "cat"}

    images, renamed = match_classes(make_set(["ant", "tabby", "tiger"]), ("ant", "bee", "cat"), class_map, where="test")

    assert _trained_classes(images) == {"ant/x.png": "ant", "tabby/x.png": "cat", "tiger/x.png": "cat"}
    assert renamed == class_map


def test_classes_that_are_not_trained_are_named(make_set: _Make) -> None:
    with pytest.raises(DataError) as caught:
        match_classes(make_set(["ant", "dog", "elk"]), ("ant", "bee"), {"elk": "moose"}, where="test")

    assert caught.value.where == "test"
    assert caught.value.what == (
        "2 of 3 classes of this test set are not among the trained ones: 'dog', 'elk' (mapped to 'moose')"
    )
    assert "--class-map" not in caught.value.hint  # it is given


def test_test_set_of_one_class_is_refused(make_set: _Make) -> None:
    with pytest.raises(NumericalError, match="are of the trained class 'ant': every prediction would be right"):
        match_classes(make_set(["ant"]), ("ant", "bee"), where="test")


def test_class_map_has_tabs_or_commas(tmp_path: Path) -> None:
    file = tmp_path / "map.txt"
    file.write_text("\ufefftabby, cat\r\n\nred ant\tant, red\n")

    assert read_class_map(file) == {"tabby": "cat", "red ant": "ant, red"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tabby cat\n", "line 1: 'tabby cat' is not a pair of classes"),
        ("a,b\na,b,c\n", "line 2: 'a,b,c' is not a pair of classes"),
        ("a,b\nc,\n", "line 2: 'c,' is not a pair of classes"),
        ("a,b\na,c\n", "line 2: 'a' is 'b' in an earlier line and 'c' here"),
    ],
)
def test_line_of_a_class_map_that_is_no_pair_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map.txt").write_text(text)

    with pytest.raises(DataError, match=message):
        read_class_map(tmp_path / "map.txt")


@pytest.fixture
def val(memory_images: Callable[..., ImageSet]) -> ImageSet:
    """Return six validation images, whose order by class differs from that of their numbers."""
    numbers = {"ant": (2, 5), "bee": (1, 6), "cat": (3, 4)}
    ids = [f"{name}/ILSVRC2012_val_{number:08d}.JPEG" for name, pair in numbers.items() for number in pair]
    return memory_images(dict.fromkeys(ids, b""))


def test_real_labels_are_found_by_the_number_in_the_file_name(tmp_path: Path, val: ImageSet) -> None:
    (tmp_path / "real.json").write_text(json.dumps([[1], [0, 2], [], [2], [1, 0], [1]]))

    labels = read_real_labels(tmp_path / "real.json", val)

    numbers = {int(image_id[-13:-5]): found for image_id, found in labels.items()}
    assert numbers == {1: (1,), 2: (0, 2), 3: (), 4: (2,), 5: (1, 0), 6: (1,)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[[1], [0], [2], [2], [0]]",
            "labels 5 images by their numbers, and bee/ILSVRC2012_val_00000006.JPEG has none",
        ),
        ("[[0], [1], [1], [1], [1], [0]]", "has the ImageNet label for only 0 of 6 images that it labels"),
        ("[[], [], [], [], [], []]", "has the ImageNet label for only 0 of 0 images that it labels"),
        ("[[1], [0], [3], [2], [0], [1]]", "a label is not a number from 0 to 2"),
        ("[[1], [0], [true], [2], [0], [1]]", "a label is not a number from 0 to 2"),
        ("[1, 0, 2, 2, 0, 1]", "not a list of lists of class numbers"),
        ("{", "not a list of lists of class numbers"),
    ],
)
def test_real_labels_of_other_images_or_classes_are_refused(
    tmp_path: Path, val: ImageSet, text: str, message: str
) -> None:
    (tmp_path / "real.json").write_text(text)

    with pytest.raises(DataError, match=message):
        read_real_labels(tmp_path / "real.json", val)
