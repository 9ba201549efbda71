"""A whole data set: both splits, what they share, what is known of it."""

import hashlib
import io
from collections.abc import Callable, Mapping

import pytest
from PIL import Image

from msn_eval.data import validation as dataset_check
from msn_eval.data.dataset import DataSet, class_map_sha256
from msn_eval.data.imagenet_subsets import Publication
from msn_eval.data.images import ImageSet
from msn_eval.data.validation import check_dataset, shared_images

ImageSetMaker = Callable[..., ImageSet]
DataSetMaker = Callable[..., DataSet]


def picture(size: tuple[int, int] = (3, 2)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size).save(content, "PNG")
    return content.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def data_set(memory_images: ImageSetMaker) -> DataSetMaker:
    def make(train: Mapping[str, bytes | None], val: Mapping[str, bytes | None]) -> DataSet:
        return DataSet(name="pets", train=memory_images(train), val=memory_images(val))

    return make


def test_shared_images_are_named_with_the_first_of_training() -> None:
    train = {"a/1": b"x", "a/2": b"y", "b/1": b"y"}
    assert shared_images(train, {"a/7": b"y", "a/8": b"z", "b/9": b"y"}) == (("a/7", "a/2"), ("b/9", "a/2"))


def test_data_set_is_checked_split_by_split(data_set: DataSetMaker) -> None:
    shared = picture(size=(5, 5))
    found = check_dataset(data_set({"a/1.png": picture(), "a/2.png": shared}, {"a/9.png": shared}))
    assert [(one.split, one.images) for one in found.splits] == [("train", 2), ("val", 1)]
    assert (found.shared, found.class_map_sha256) == ((("a/9.png", "a/2.png"),), class_map_sha256(("a",)))


def publish(monkeypatch: pytest.MonkeyPatch, classes: tuple[str, ...]) -> None:
    known = Publication(url="", class_map_sha256=class_map_sha256(classes), val_images=3, lists=())
    monkeypatch.setattr(dataset_check, "read_publication", lambda: known)
    monkeypatch.setattr(dataset_check, "_IMAGENET_TRAIN_IMAGES", 1)


def test_known_data_set_of_other_counts_is_warned_of(data_set: DataSetMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, ("a",))
    found = check_dataset(data_set({"a/1.png": picture(), "a/2.png": picture()}, {"a/9.png": picture()}))
    assert found.warnings == (
        "these are ImageNet's classes, but train has 2 images instead of 1",
        "these are ImageNet's classes, but val has 1 images instead of 3",
    )


def test_known_data_set_of_its_counts_and_unknown_ones_are_not(
    data_set: DataSetMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, ("a",))
    contents = {f"a/{number}.png": picture() for number in range(3)}
    assert check_dataset(data_set({"a/1.png": picture()}, contents)).warnings == ()
    publish(monkeypatch, ("b",))
    assert check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": picture()})).warnings == ()


def test_imagenet_has_as_many_training_images_as_published() -> None:
    assert dataset_check._IMAGENET_TRAIN_IMAGES == 1_281_167


@pytest.mark.parametrize(("content", "sound"), [(picture(), True), (b"damaged", False), (None, False)])
def test_data_set_with_an_image_that_cannot_be_used_is_not_sound(
    data_set: DataSetMaker, content: bytes | None, sound: bool
) -> None:
    assert check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": content})).sound == sound


@pytest.mark.parametrize("difference", ["changed", "missing", "extra"])
def test_any_difference_from_the_manifest_is_unsound(data_set: DataSetMaker, difference: str) -> None:
    manifest = {"train/a/1.png": digest(picture()), "val/a/1.png": digest(picture())}
    sound = check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": picture()}), manifest=manifest)
    if difference == "changed":
        manifest["val/a/1.png"] = "0" * 64
    elif difference == "missing":
        manifest["val/a/2.png"] = "0" * 64
    else:
        del manifest["val/a/1.png"]
    unsound = check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": picture()}), manifest=manifest)
    assert (sound.sound, unsound.sound) == (True, False)
