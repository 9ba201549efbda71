import hashlib
import os
from pathlib import Path

import pytest

from msn_eval.data import DATASETS, read_dataset, read_split
from msn_eval.data.dataset import DataSet, Listing, class_map_sha256, make_dataset, make_split
from msn_eval.data.folder import FolderSource
from msn_eval.errors import DataError, UsageError


def image_folder(root: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes(b"")
    return root


def test_class_map_hash_covers_the_names_in_order_a_line_each() -> None:
    assert class_map_sha256(("cat", "dog")) == hashlib.sha256(b"cat\ndog\n").hexdigest()


def test_class_map_hash_of_another_order_is_another() -> None:
    assert class_map_sha256(("cat", "dog")) != class_map_sha256(("dog", "cat"))


def test_class_map_hash_covers_the_bytes_of_names_that_are_no_utf8() -> None:
    assert class_map_sha256(("caf\udce9", "ünder")) == hashlib.sha256(b"caf\xe9\n\xc3\xbcnder\n").hexdigest()


def test_digits_are_known_by_name() -> None:
    assert read_dataset("digits").name == "digits"


def test_any_other_name_is_the_path_of_an_image_folder(tmp_path: Path) -> None:
    data = read_dataset(str(image_folder(tmp_path / "pets")))
    assert (data.name, data.classes) == ("pets", ("cat", "dog"))


def test_class_mismatch_is_allowed_where_asked_for(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "val" / "dog" / "0.png").unlink()
    (root / "val" / "dog").rmdir()
    assert read_dataset(str(root), allow_class_mismatch=True).classes == ("cat", "dog")


def test_class_mismatch_is_refused_by_default(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "val" / "dog").rename(root / "val" / "emu")
    with pytest.raises(DataError, match="only in train: dog; only in val: emu"):
        read_dataset(str(root))


def test_classes_of_a_data_set_are_those_of_its_validation_images(tmp_path: Path) -> None:
    data = read_dataset(str(image_folder(tmp_path)))
    assert DataSet(name="pets", train=data.train, val=data.val).classes == data.val.classes


@pytest.mark.parametrize(("split", "images"), [("train", 1000), ("val", 797)])
def test_split_of_the_digits_is_read_by_its_name(split: str, images: int) -> None:
    assert len(read_split("digits", split)) == images


def test_split_of_a_folder_is_read_without_the_other(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "train").rename(root / "elsewhere")
    assert read_split(str(root), "val").ids == ("cat/0.png", "dog/0.png")


@pytest.mark.parametrize("name", ["digits", "nowhere"])
def test_split_that_no_data_set_has_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="split 'test': a data set has the splits train and val") as caught:
        read_split(name, "test")
    assert caught.value.exit_code == 2


def test_data_sets_that_can_be_named_are_described() -> None:
    assert list(DATASETS) == ["DIR", "wds:DIR", "hf:NAME_OR_DIR", "digits"]
    assert all(word in DATASETS["DIR"] for word in ("ImageNet", "devkit", "synset file", "LOC_val_solution.csv"))


def test_missing_folder_is_answered_with_all_that_can_be_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data folder does not exist") as caught:
        read_dataset(str(tmp_path / "nowhere"))
    assert all(form in caught.value.hint for form in ("train/<class>/*", "ImageNet", "wds:", "hf:", "digits"))


def test_archives_of_a_webdataset_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").touch()
    with pytest.raises(DataError, match="has no folder 'train'") as caught:
        read_dataset(str(tmp_path))
    assert caught.value.hint == f"Give wds:{tmp_path} if these are the archives of a WebDataset."


SOURCE = FolderSource(Path("nowhere"))


@pytest.mark.parametrize(
    "files",
    [
        {"a": ["x", "a-", "Z"], "a-b": ["x"], "a b": ["x"], "a.": ["x"], "a0": ["x"]},
        {"a": ["\udcff.jpg", "é.jpg", "\ud7ff.jpg", "\U0001f600.jpg", "a.jpg"], "ü": ["x"], "\udce9": ["x"]},
        {"a": ["c", "a"], "a/b": ["x", "d"], "a/": ["x"]},
    ],
)
def test_ids_stand_in_byte_order_with_their_classes(files: dict[str, list[str]]) -> None:
    images = make_split(Listing(files=files, source=SOURCE))
    wanted = sorted((f"{name}/{file}", name) for name in files for file in files[name])
    wanted.sort(key=lambda row: os.fsencode(row[0]))
    assert list(zip(images.ids, (images.classes[label] for label in images.labels), strict=True)) == wanted


def test_classes_stand_in_byte_order() -> None:
    files = {name: ["x"] for name in ("b", "a-b", "a", "\udcff", "é")}
    assert make_split(Listing(files=files, source=SOURCE)).classes == ("a", "a-b", "b", "é", "\udcff")


def test_files_that_were_passed_over_are_counted_for_each_split() -> None:
    train, val = (Listing(files={"a": ["x"]}, source=SOURCE, passed_over=count) for count in (3, 5))
    data = make_dataset("pets", where="here", train=train, val=val, allow_class_mismatch=False)
    assert (data.train.passed_over, data.val.passed_over) == (3, 5)


def test_splits_of_different_classes_are_refused_with_their_place() -> None:
    train, val = (Listing(files={name: ["x"]}, source=SOURCE) for name in "ab")
    with pytest.raises(DataError, match=r"^here: train and val differ in their classes"):
        make_dataset("pets", where="here", train=train, val=val, allow_class_mismatch=False)
