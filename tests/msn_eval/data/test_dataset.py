import hashlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from msn_eval.data import list_datasets, read_dataset, read_split
from msn_eval.data.dataset import (
    DatasetListing,
    Listing,
    LoadOptions,
    class_map_sha256,
    find_look_alikes,
    make_dataset,
    make_split,
)
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


def test_class_map_hash_covers_the_bytes_of_names_that_are_not_utf8() -> None:
    assert class_map_sha256(("caf\udce9", "ünder")) == hashlib.sha256(b"caf\xe9\n\xc3\xbcnder\n").hexdigest()


def test_any_other_name_is_the_path_of_an_image_folder(tmp_path: Path) -> None:
    data = read_dataset(str(image_folder(tmp_path / "pets")))
    assert (data.name, data.classes) == ("pets", ("cat", "dog"))


@pytest.mark.parametrize("name", ["digits", "nowhere"])
def test_split_that_no_data_set_has_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="split 'test': a data set has the splits train and val") as caught:
        read_split(name, "test")
    assert caught.value.exit_code == 2


def test_data_sets_that_can_be_named_are_described() -> None:
    assert list(list_datasets()) == ["DIR", "wds", "csv", "tv", "hf", "digits"]
    assert all(word in list_datasets()["DIR"] for word in ("ImageNet", "devkit", "synset file", "LOC_val_solution.csv"))


def test_archives_of_a_webdataset_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").touch()
    with pytest.raises(DataError, match="has no train images") as caught:
        read_dataset(str(tmp_path))
    assert caught.value.hint == f"Give wds:{tmp_path} if these are the archives of a WebDataset."


SOURCE = FolderSource(Path("nowhere"))


@pytest.mark.parametrize(
    "files",
    [
        {"a": ["x", "a-", "Z"], "a-b": ["x"], "a b": ["x"], "a.": ["x"], "a0": ["x"]},
        {"a": ["\udcff.jpg", "é.jpg", "\ud7ff.jpg", "\U0001f600.jpg", "a.jpg"], "ü": ["x"], "\udce9": ["x"]},
    ],
)
def test_ids_are_in_byte_order_with_their_classes(files: dict[str, list[str]]) -> None:
    images = make_split(Listing(files=files, source=SOURCE))
    wanted = sorted((f"{name}/{file}", name) for name in files for file in files[name])
    wanted.sort(key=lambda row: os.fsencode(row[0]))
    assert list(zip(images.ids, (images.classes[label] for label in images.labels), strict=True)) == wanted


def test_classes_are_in_byte_order() -> None:
    files = {name: ["x"] for name in ("b", "a-b", "a", "\udcff", "é")}
    assert make_split(Listing(files=files, source=SOURCE)).classes == ("a", "a-b", "b", "é", "\udcff")


def pets(train: Listing, val: Listing) -> DatasetListing:
    return DatasetListing(name="pets", splits={"train": train, "val": val})


def test_files_that_were_passed_over_are_counted_for_each_split() -> None:
    data = make_dataset(
        pets(*(Listing(files={"a": ["x"]}, source=SOURCE, passed_over=n) for n in (3, 5))), where="here"
    )
    assert (data.train.passed_over, data.val.passed_over) == (3, 5)


@pytest.mark.parametrize(
    ("train", "val", "shown"),
    [
        (["Cat", "cat"], ["Cat", "cat"], "Cat and cat"),
        (["Cat"], ["cat"], "Cat and cat"),
        (
            ["caf\u00e9"],
            ["caf\u00e9", "cafe\u0301"],
            "cafe\u0301 ('cafe\\u0301') and caf\u00e9 ('caf\\xe9')",
        ),
    ],
)
def test_classes_that_look_alike_are_refused_by_name(train: list[str], val: list[str], shown: str) -> None:
    splits = (Listing(files={name: ["x"] for name in names}, source=SOURCE) for names in (train, val))
    with pytest.raises(DataError) as caught:
        make_dataset(pets(*splits), where="here", allow_class_mismatch=True)
    assert caught.value.what == f"the classes {shown} differ only by case or Unicode normalisation"
    assert (caught.value.exit_code, caught.value.where) == (21, "here")


def test_single_split_with_classes_that_look_alike_is_refused(tmp_path: Path) -> None:
    for name in ("Cat", "cat"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "x.png").touch()
    with pytest.raises(DataError, match="the classes Cat and cat differ only by case"):
        read_split(str(tmp_path), "val")


def mismatch(train: Sequence[str], val: Sequence[str], *, allowed: bool = False) -> DataError:
    splits = (Listing(files={name: ["x"] for name in names}, source=SOURCE) for names in (train, val))
    with pytest.raises(DataError) as caught:
        make_dataset(pets(*splits), where="here", allow_class_mismatch=allowed)
    return caught.value


@pytest.mark.parametrize("allowed", [False, True])
def test_splits_without_a_common_class_are_refused_even_where_a_mismatch_is_allowed(allowed: bool) -> None:
    error = mismatch(["n01", "n02", "n10"], ["0", "1", "2"], allowed=allowed)
    assert error.what == (
        "train and val have no class in common, so no validation image can be right "
        "(only in train: n01, n02, n10; only in val: 0, 1, 2)"
    )
    assert (error.exit_code, "--allow-class-mismatch" in error.hint) == (21, False)
    assert error.hint.endswith("If val counts the classes of train in byte order, 0 is n01 and 2 is n10.")


def test_class_that_only_val_has_is_said_to_be_lost_where_the_mismatch_is_allowed() -> None:
    hints = [mismatch(["a", "b"], val).hint for val in (["a"], ["a", "c"])]
    assert ["can be right" in hint for hint in hints] == [False, True]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["a/x.jpg", "a/X.JPG", "a/y.jpg"], (("a/x.jpg", "a/X.JPG"),)),
        (["caf\u00e9/1.jpg", "cafe\u0301/1.jpg"], (("caf\u00e9/1.jpg", "cafe\u0301/1.jpg"),)),
        (["caf\u00c9/1.jpg", "cafe\u0301/1.jpg"], (("caf\u00c9/1.jpg", "cafe\u0301/1.jpg"),)),
        (["a/x.jpg", "b/x.jpg", "caf\udce9/1.jpg"], ()),
    ],
    ids=["case", "normalisation", "both", "none"],
)
def test_names_that_some_disks_hold_for_one_are_grouped(
    names: Sequence[str], groups: tuple[tuple[str, ...], ...]
) -> None:
    assert find_look_alikes(names) == groups


def list_toy(place: str, options: LoadOptions) -> DatasetListing:
    """A loader as a plug-in has it."""
    root = Path(place)
    files = {"cat": ["0.png"], "dog": ["0.png"]}
    splits = {split: Listing(files=files, source=FolderSource(root / split)) for split in options.splits}
    return DatasetListing(name="toy", splits=splits)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the distribution `toys 1.2`, whose entry point is the loader above."""
    point = EntryPoint("toy", f"{__name__}:list_toy", "msn_eval.datasets")
    vars(point)["dist"] = SimpleNamespace(name="toys", version="1.2")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr("msn_eval.registry.entry_points", lambda group: [point] if group == point.group else [])


@pytest.mark.usefixtures("toy")
def test_plug_in_is_listed_and_read_with_its_distribution(tmp_path: Path) -> None:
    data = read_dataset(f"toy:{image_folder(tmp_path)}")
    assert list_datasets()["toy"] == "plug-in of toys 1.2"
    assert (data.name, data.distribution, data.val.ids) == ("toy", "toys 1.2", ("cat/0.png", "dog/0.png"))


@pytest.mark.parametrize(("name", "suggestion"), [("wsd:x", " Did you mean wds?"), ("digit:", " Did you mean digits?")])
def test_unknown_scheme_is_a_usage_error_with_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_dataset(name)
    assert caught.value.what == f"No data set is called {name.partition(':')[0]!r}.{suggestion}"
    assert caught.value.hint == "Known: DIR, wds, csv, tv, hf, digits."


def test_folder_whose_name_has_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path / "pets:small")
    monkeypatch.chdir(tmp_path)
    assert read_dataset("pets:small").name == "pets:small"
