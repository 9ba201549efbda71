import io
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from msn_eval.data import list_datasets, read_dataset, read_split, read_training_images
from msn_eval.errors import DataError


def make_files(root: Path, names: Iterable[str]) -> Path:
    """Make empty files; a scan of names does not open them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def both(names: Iterable[str]) -> list[str]:
    """Return the same names in `train` and `val`."""
    return [f"{split}/{name}" for name in names for split in ("train", "val")]


def test_ids_are_in_byte_order_and_labels_in_that_of_the_classes(tmp_path: Path) -> None:
    """`a-b` comes before `a/` as bytes of ids, yet class `a` before class `a-b`."""
    root = make_files(tmp_path, both(["a/x.jpg", "a-b/x.jpg", "B/x.jpg", "é/x.jpg"]))
    val = read_dataset(str(root)).val
    assert (val.classes, val.ids, val.labels) == (
        ("B", "a", "a-b", "é"),
        ("B/x.jpg", "a-b/x.jpg", "a/x.jpg", "é/x.jpg"),
        (0, 2, 1, 3),
    )


def test_splits_of_different_classes_are_refused_and_the_classes_named(tmp_path: Path) -> None:
    root = make_files(tmp_path, [*both(["a/x.jpg"]), "train/b/x.jpg", "val/c/x.jpg"])
    with pytest.raises(DataError) as caught:
        read_dataset(str(root))
    assert caught.value.exit_code == 21
    assert f"{root}: train and val differ in their classes (only in train: b; only in val: c)" in str(caught.value)
    assert "--allow-class-mismatch" in str(caught.value)


def test_mismatch_of_many_classes_shows_five_and_counts_the_rest(tmp_path: Path) -> None:
    root = make_files(tmp_path, [*both(["a/x.jpg"]), *(f"train/b{number}/x.jpg" for number in range(7))])
    with pytest.raises(DataError, match="only in train: b0, b1, b2, b3, b4 and 2 more"):
        read_dataset(str(root))


def test_allowed_mismatch_numbers_the_union_of_the_classes(tmp_path: Path) -> None:
    root = make_files(tmp_path, ["train/a/x.jpg", "train/c/x.jpg", "val/b/x.jpg", "val/c/x.jpg"])
    data = read_dataset(str(root), allow_class_mismatch=True)
    assert (data.train.classes, data.train.labels, data.val.labels) == (("a", "b", "c"), (0, 2), (1, 2))


def test_missing_folder_is_named_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(str(tmp_path / "nowhere"))
    assert caught.value.exit_code == 21
    assert str(caught.value).startswith(f"{tmp_path / 'nowhere'}: the data folder does not exist\nGive a folder")


def test_mistyped_folder_is_answered_without_a_list_of_layouts(tmp_path: Path) -> None:
    root = make_files(tmp_path, ["photos/train/a/x.jpg"])
    with pytest.raises(DataError, match=r"Did you mean .*photos") as caught:
        read_dataset(str(root / "photoz"))
    assert "Data sets that can be read" not in caught.value.hint


@pytest.mark.parametrize("inside", [[], ["notes.txt"], ["train/a/x.jpg"], ["pictures/deep/below/x.jpg"]])
def test_folder_that_cannot_be_read_names_every_layout_that_can(tmp_path: Path, inside: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(str(make_files(tmp_path, inside)))
    listed = [f"  {name}: {summary}" for name, summary in list_datasets().items()]
    assert caught.value.hint.splitlines()[-len(listed) - 1 :] == ["Data sets that can be read:", *listed]


def test_file_instead_of_a_folder_is_reported(tmp_path: Path) -> None:
    archive = make_files(tmp_path, ["imagenet.tar"]) / "imagenet.tar"
    with pytest.raises(DataError, match=r"imagenet\.tar: the data folder is a file, not a folder"):
        read_dataset(str(archive))


def test_folder_without_val_is_reported_with_what_it_holds_and_lacks(tmp_path: Path) -> None:
    root = make_files(tmp_path, ["train/more/a/x.jpg", "holdout/a/x.jpg"])
    with pytest.raises(DataError) as caught:
        read_dataset(str(root))
    assert caught.value.exit_code == 21
    assert f"{root}: has no val images (it holds: holdout, train)" in str(caught.value)
    assert "val/<class>" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "folder"), [(["a/x.jpg", "b/x.jpg"], ""), (["train/a/x.jpg", "train/b/x.jpg"], "train")]
)
def test_class_folders_without_val_name_the_command_that_draws_it(
    tmp_path: Path, names: list[str], folder: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(str(make_files(tmp_path, names)))
    assert f"`msn-eval data split {tmp_path / folder} --out DIR`" in caught.value.hint


@pytest.mark.parametrize(
    ("folders", "chosen"),
    [
        (["val", "valid", "validation", "test"], "val"),
        (["valid", "validation", "test"], "valid"),
        (["validation", "test"], "validation"),
        (["test"], "test"),
    ],
)
def test_first_folder_of_val_counts_and_is_named(tmp_path: Path, folders: list[str], chosen: str) -> None:
    root = make_files(tmp_path / "pets", ["train/a/x.jpg", *(f"{folder}/a/{folder}.jpg" for folder in folders)])
    data = read_dataset(str(root))
    name = "pets" if chosen == "val" else f"pets ({chosen})"
    assert (data.name, data.val.ids) == (name, (f"a/{chosen}.jpg",))


def test_test_images_without_classes_are_not_val(tmp_path: Path) -> None:
    root = make_files(tmp_path, ["train/a/x.jpg", "train/b/x.jpg", "test/1.jpg"])
    with pytest.raises(DataError, match="has no val images") as caught:
        read_dataset(str(root))
    assert f"`msn-eval data split {root / 'train'} --out DIR`" in caught.value.hint


def test_class_folders_alone_are_val_where_only_val_is_wanted(tmp_path: Path) -> None:
    root = make_files(tmp_path, ["10/b.jpeg", "2/a.jpeg", "2/more/c.jpeg", "README.md"])
    val = read_split(str(root), "val")
    assert (val.classes, val.ids, val.passed_over) == (("10", "2"), ("10/b.jpeg", "2/a.jpeg", "2/more/c.jpeg"), 1)


@pytest.mark.parametrize(
    "names", [["train/a/x.jpg"], ["a/x.jpg", "train/x.jpg"], ["a/x.jpg", "b/more/x.jpg"], ["x.jpg"]]
)
def test_other_folders_without_val_are_not_taken_for_val(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(DataError, match="has no val images"):
        read_split(str(make_files(tmp_path, names)), "val")


def test_class_folders_alone_are_not_train(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no train images"):
        read_split(str(make_files(tmp_path, ["a/x.jpg", "b/x.jpg"])), "train")


@pytest.mark.parametrize("inside", ["train/b/notes.txt", "train/b/.hidden.jpg"])
def test_class_without_images_is_named(tmp_path: Path, inside: str) -> None:
    root = make_files(tmp_path, [*both(["a/x.jpg"]), inside])
    with pytest.raises(DataError) as caught:
        read_dataset(str(root))
    assert str(caught.value) == f"{root / 'train' / 'b'}: this class has no images\nRemove it or fill it."


def test_images_in_folders_below_a_class_are_listed_at_any_depth(tmp_path: Path) -> None:
    names = ["a/x.jpg", "a/more/x.jpg", "a/more/and/more.png/y.jpg", "b/images/x.JPEG"]
    val = read_dataset(str(make_files(tmp_path, both(names)))).val
    assert (val.ids, val.passed_over) == (tuple(sorted(names)), 0)


def test_files_below_a_class_that_are_no_images_are_counted_without_their_folder(tmp_path: Path) -> None:
    odd = ["val/a/more/notes.txt", "val/a/more/._x.jpg", "val/a/more/.thumbnails/x.jpg"]
    val = read_dataset(str(make_files(tmp_path, [*both(["a/x.jpg", "a/more/x.jpg"]), *odd]))).val
    assert (val.ids, val.passed_over) == (("a/more/x.jpg", "a/x.jpg"), len(odd))


def test_images_in_folders_below_a_class_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_files(tmp_path, both(["a/x.jpg", "a/more/x.jpg", "a/more/y.jpg"]))
    with caplog.at_level("INFO", "msn_eval"):
        read_split(str(root), "val")
    assert f"{root / 'val'}: 2 images in folders below the folder of their class" in caplog.messages


@pytest.mark.parametrize("target", [".", "..", "../more"])
def test_link_back_to_a_folder_of_the_class_is_refused(tmp_path: Path, target: str) -> None:
    root = make_files(tmp_path, both(["a/x.jpg", "a/more/y.jpg"]))
    (root / "val" / "a" / "more" / "again").symlink_to(target)
    with pytest.raises(DataError, match="links to a folder of the same class") as caught:
        read_split(str(root), "val")
    assert caught.value.where.startswith(str(root / "val" / "a" / "more" / "again"))


def test_folder_below_a_class_may_be_a_link(tmp_path: Path) -> None:
    root = make_files(tmp_path / "data", both(["a/x.jpg"]))
    (root / "val" / "a" / "more").symlink_to(make_files(tmp_path / "elsewhere", ["y.jpg"]))
    assert read_split(str(root), "val").ids == ("a/more/y.jpg", "a/x.jpg")


def test_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    odd = ["val/.DS_Store", "val/labels.csv", "val/.git/x.jpg", "val/a/._x.jpg", "val/a/Thumbs.db", "val/a/x.tga"]
    data = read_dataset(str(make_files(tmp_path, [*both(["a/x.jpg"]), *odd])))
    assert (data.val.ids, data.val.passed_over, data.train.passed_over) == (("a/x.jpg",), len(odd), 0)


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    for split in (b"train", b"val"):
        folder = os.fsencode(tmp_path) + b"/" + split + b"/caf\xe9"
        os.makedirs(folder)  # noqa: PTH103 - a name of bytes
        Path(os.fsdecode(folder + b"/\xff.jpg")).write_bytes(b"content")
    data = read_dataset(str(tmp_path))
    assert [os.fsencode(image_id) for image_id in data.val.ids] == [b"caf\xe9/\xff.jpg"]
    assert data.val.source.read(data.val.ids[0]) == b"content"


def test_error_about_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    make_files(tmp_path, both(["a/x.jpg"]))
    os.makedirs(os.fsencode(tmp_path) + b"/train/caf\xe9")  # noqa: PTH103 - a name of bytes
    with pytest.raises(DataError) as caught:
        read_dataset(str(tmp_path))
    assert b"caf\\udce9: this class has no images" in str(caught.value).encode("utf-8")


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    root = make_files(tmp_path / "data", both(["a/x.jpg"]))
    make_files(tmp_path / "elsewhere", ["y.jpg"])
    for split in ("train", "val"):
        (root / split / "b").symlink_to(tmp_path / "elsewhere")
    assert read_dataset(str(root)).val.ids == ("a/x.jpg", "b/y.jpg")


def test_link_to_a_missing_image_is_not_passed_over_silently(tmp_path: Path) -> None:
    """It is an image by its name; it is reported when it is read."""
    root = make_files(tmp_path, both(["a/x.jpg"]))
    (root / "val" / "a" / "y.jpg").symlink_to(tmp_path / "unmounted" / "y.jpg")
    assert read_dataset(str(root)).val.ids == ("a/x.jpg", "a/y.jpg")


def test_what_has_the_name_of_an_image_but_is_no_file_is_not_passed_over_silently(tmp_path: Path) -> None:
    root = make_files(tmp_path, both(["a/x.jpg"]))
    os.mkfifo(root / "val" / "a" / "pipe.jpg")
    (root / "val" / "a" / "folder.jpg").mkdir()
    (root / "val" / "a" / "loop.jpg").symlink_to("loop.jpg")
    (root / "val" / "loop").symlink_to("loop")
    val = read_dataset(str(root)).val
    assert val.ids == ("a/folder.jpg", "a/loop.jpg", "a/pipe.jpg", "a/x.jpg")
    assert val.passed_over == 1


def test_png_under_a_jpeg_name_decodes(tmp_path: Path) -> None:
    root = make_files(tmp_path, both(["n02105855/n02105855_2933.JPEG"]))
    content = io.BytesIO()
    Image.new("RGBA", (2, 2), (1, 2, 3, 4)).save(content, "PNG")
    (root / "train" / "n02105855" / "n02105855_2933.JPEG").write_bytes(content.getvalue())
    train = read_dataset(str(root)).train
    assert train.source.decode(train.source.read(train.ids[0])).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("ending", ["", "/", "/."])
def test_data_set_is_called_like_its_folder(tmp_path: Path, ending: str) -> None:
    root = make_files(tmp_path / "pets", both(["a/x.jpg"]))
    assert read_dataset(f"{root}{ending}").name == "pets"


def test_one_split_that_is_missing_is_named(tmp_path: Path) -> None:
    root = make_files(tmp_path, ["val/a/x.jpg"])
    with pytest.raises(DataError, match=r"has no train images \(it holds: val\)") as caught:
        read_split(str(root), "train")
    assert caught.value.exit_code == 21


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["b.jpg", "a/deep/er/c.png", "a.txt", ".git/x.jpg"], ("a/deep/er/c.png", "b.jpg")),
        (["cat/1.jpg", "dog/1.jpg"], ("cat/1.jpg", "dog/1.jpg")),
        (["train/b.jpg", "val/a.jpg"], ("b.jpg",)),
    ],
)
def test_images_without_classes_are_training_images_by_their_paths(
    tmp_path: Path, names: list[str], ids: tuple[str, ...]
) -> None:
    images = read_training_images(str(make_files(tmp_path, names)))
    assert (images.ids, images.is_labelled, len(images.labels)) == (ids, False, len(ids))


def test_training_images_with_classes_keep_them(tmp_path: Path) -> None:
    images = read_training_images(str(make_files(tmp_path, ["train/a/x.jpg", "train/b/more/x.jpg"])))
    assert (images.ids, images.classes, images.is_labelled) == (("a/x.jpg", "b/more/x.jpg"), ("a", "b"), True)


@pytest.mark.parametrize("names", [["val/a/x.jpg"], ["test/x.jpg", "x.jpg"], ["notes.txt"], []])
def test_validation_images_and_folders_without_any_are_not_trained_on(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(DataError):
        read_training_images(str(make_files(tmp_path, names)))
