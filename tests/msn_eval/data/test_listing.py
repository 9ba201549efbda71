import os
from pathlib import Path

import pytest

from msn_eval.data.folder import FolderSource
from msn_eval.data.listing import Listing, make_dataset, make_split
from msn_eval.errors import DataError

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
