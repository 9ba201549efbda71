import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from msn_eval.data import read_dataset, read_split
from msn_eval.errors import DataError

Pictures = Mapping[str, Mapping[str, bytes]]
Store = Callable[..., str]
TarWriter = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "imagenet"


def test_places_name_file_or_archive(root: Path, store_pictures: Store) -> None:
    data = read_dataset(store_pictures(root, train="tar", val="flat", labels="synsets"))
    assert data.train.source.place(data.train.ids[0]) == f"{root / 'ILSVRC2012_img_train.tar'}: {data.train.ids[0]}"
    file = data.val.ids[0].partition("/")[2]
    assert data.val.source.place(data.val.ids[0]) == str(root / "val" / file)


def test_unpacked_folders_come_before_the_archive_they_came_from(root: Path, store_pictures: Store) -> None:
    store_pictures(root, train="tar", val="flat", labels="synsets")
    store_pictures(root, train="folders")
    assert read_split(str(root), "train").source.root == root / "train"


def test_archive_is_read_where_the_folder_of_the_split_is_empty(root: Path, store_pictures: Store) -> None:
    (root / "train").mkdir(parents=True)
    store_pictures(root, train="tar")
    assert read_split(str(root), "train").source.root == root / "ILSVRC2012_img_train.tar"


def test_labels_of_kaggle_are_found_from_the_innermost_folder(root: Path, store_pictures: Store) -> None:
    store_pictures(root, layout="kaggle")
    assert len(read_dataset(str(root / "ILSVRC" / "Data" / "CLS-LOC")).val) == 7


def test_labels_may_be_beside_the_flat_images(root: Path, store_pictures: Store) -> None:
    store_pictures(root, train="folders", val="flat", labels="synsets")
    name = "imagenet_2012_validation_synset_labels.txt"
    (root / name).rename(root / "val" / name)
    val = read_dataset(str(root)).val
    assert (len(val), val.passed_over) == (7, 1)


def test_val_of_a_class_that_train_lacks_names_the_line_of_its_label(root: Path, store_pictures: Store) -> None:
    store_pictures(root, train="folders", val="flat", labels="synsets")
    for file in (root / "train" / "n02012849").iterdir():
        file.unlink()
    (root / "train" / "n02012849").rmdir()
    with pytest.raises(DataError) as caught:
        read_dataset(str(root))
    assert str(caught.value).startswith(
        f"{root / 'imagenet_2012_validation_synset_labels.txt'}: line 3: n02012849, the class of "
        "ILSVRC2012_val_00000003.JPEG, is not one of the 2 training classes\n"
    )


def test_class_mismatch_is_allowed_on_request(root: Path, store_pictures: Store) -> None:
    store_pictures(root, train="class tars", val="flat", labels="synsets")
    (root / "train" / "n02012849.tar").unlink()
    assert len(read_dataset(str(root), allow_class_mismatch=True).classes) == 3


def test_class_that_val_lacks_is_refused(root: Path, store_pictures: Store) -> None:
    store_pictures(root, train="class tars", val="flat", labels="named")
    (root / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
    with pytest.raises(DataError, match="only in train: n02012849"):
        read_dataset(str(root))


@pytest.mark.parametrize(
    ("forms", "missing", "archive"),
    [({"val": "flat"}, "train", "ILSVRC2012_img_train.tar"), ({"train": "tar"}, "val", "ILSVRC2012_img_val.tar")],
)
def test_missing_split_is_named_with_the_archive_to_get(
    root: Path, store_pictures: Store, forms: dict[str, str], missing: str, archive: str
) -> None:
    store_pictures(root, labels="synsets", **forms)
    with pytest.raises(DataError, match=f"has no {missing} images \\(it holds: ") as caught:
        read_dataset(str(root))
    assert (caught.value.exit_code, caught.value.where) == (21, str(root))
    assert archive in caught.value.hint


def test_class_tar_beside_its_own_folder_is_passed_over(root: Path, store_pictures: Store) -> None:
    (root / "train").mkdir(parents=True)
    store_pictures(root / "other", train="class tars")
    store_pictures(root, train="folders", val="folders")
    (root / "other" / "train" / "n01440764.tar").rename(root / "train" / "n01440764.tar")
    assert read_dataset(str(root)).train.passed_over == 1


def test_other_members_of_archives_are_passed_over_and_counted(root: Path, write_tar: TarWriter) -> None:
    inner = write_tar(root / "inner.tar", [("a.JPEG", b"a"), ("._a.JPEG", b""), ("notes.txt", b"")]).read_bytes()
    write_tar(root / "ILSVRC2012_img_train.tar", [("n01440764.tar", inner), ("README", b""), ("other.tar", b"")])
    train = read_split(str(root), "train")
    assert (train.ids, train.passed_over) == (("n01440764/a.JPEG",), 4)


def test_class_tar_without_images_is_named(root: Path, write_tar: TarWriter) -> None:
    write_tar(root / "train" / "n01440764.tar", [("notes.txt", b"")])
    with pytest.raises(DataError, match=r"n01440764\.tar: this archive has no images"):
        read_split(str(root), "train")


def test_inner_tar_without_images_is_named_with_the_outer(root: Path, write_tar: TarWriter) -> None:
    inner = write_tar(root / "inner.tar", []).read_bytes()
    write_tar(root / "ILSVRC2012_img_train.tar", [("n01440764.tar", inner)])
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar: n01440764\.tar: this archive has no images"):
        read_split(str(root), "train")


def test_train_archive_of_folders_is_refused(root: Path, write_tar: TarWriter) -> None:
    write_tar(root / "ILSVRC2012_img_train.tar", [("n01440764/a.JPEG", b"a")])
    with pytest.raises(DataError, match=r"holds no class tars such as n01440764\.tar"):
        read_split(str(root), "train")


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_truncated_archive_is_refused(root: Path, store_pictures: Store, name: str) -> None:
    store_pictures(root, train="tar", val="tar", labels="synsets")
    os.truncate(root / name, (root / name).stat().st_size // 2)
    with pytest.raises(DataError, match=re.escape(f"{root / name}: is not a tar archive, or is damaged or truncated")):
        read_dataset(str(root))


def test_folder_of_a_split_that_cannot_be_listed_is_named(
    root: Path, store_pictures: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_pictures(root, train="folders", val="flat", labels="synsets")
    listing = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path) == root / "val":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="val: cannot be read: Permission denied"):
        read_dataset(str(root))


@pytest.mark.parametrize("name", ["train/n01443537.tar", "val/ILSVRC2012_val_00000050.JPEG"])
def test_half_unpacked_split_is_refused(root: Path, store_pictures: Store, name: str) -> None:
    store_pictures(root, train="folders", val="folders")
    shutil.rmtree(root / "train" / "n01443537")
    (root / name).touch()
    with pytest.raises(DataError, match=re.escape(f": holds {Path(name).name} beside class folders")):
        read_split(str(root), name.partition("/")[0])
