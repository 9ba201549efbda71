import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from msn_eval.data import index as image_index
from msn_eval.data import read_split
from msn_eval.data.folder import scan_images
from msn_eval.data.index import ContainerIndex, index_containers, make_index
from msn_eval.errors import DataError

TarWriter = Callable[..., Path]


@dataclass
class Scanner:
    """Lists a folder, and remembers which it listed."""

    scanned: list[str] = field(default_factory=list)

    def __call__(self, path: Path) -> ContainerIndex:
        self.scanned.append(path.name)
        if path.is_dir():
            return scan_images(path)
        return make_index([path.read_text()], [(path.stat().st_size, -7)], columns=2)


@pytest.fixture(autouse=True)
def small_sets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_index, "_FEWEST_IMAGES", 1)


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock three seconds ahead, so that all changes count as settled."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3_000_000_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / f"{name}.jpg").touch()
    return tmp_path / "train"


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def listed(root: Path, cache_dir: Path | None, kind: str = "folders") -> tuple[dict[str, list[str]], list[str]]:
    """Return the names in each folder, and the folders that were scanned."""
    scanner = Scanner()
    paths = sorted(root.iterdir())
    indexes = index_containers(paths, scanner, root=root, kind=kind, cache_dir=cache_dir)
    names = {path.name: sorted(index.names) for path, index in zip(paths, indexes, strict=True)}
    return names, sorted(scanner.scanned)


def index_file(cache_dir: Path) -> Path:
    (path,) = (cache_dir / "indexes").iterdir()
    return path


ALL = {"a": ["a.jpg"], "b": ["b.jpg"], "c": ["c.jpg"]}


def test_second_listing_scans_nothing(root: Path, cache_dir: Path) -> None:
    assert listed(root, cache_dir) == (ALL, ["a", "b", "c"])
    assert listed(root, cache_dir) == (ALL, [])


def test_without_a_cache_everything_is_scanned_and_nothing_written(root: Path, tmp_path: Path) -> None:
    listed(root, None)
    assert listed(root, None) == (ALL, ["a", "b", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda path: path.unlink(), {"b": []}),
        (lambda path: path.rename(path.with_name("z.jpg")), {"b": ["z.jpg"]}),
        (lambda path: path.with_name("new.jpg").touch(), {"b": ["b.jpg", "new.jpg"]}),
    ],
    ids=["deleted", "renamed", "added"],
)
def test_change_of_a_folder_is_noticed_in_this_folder_only(
    root: Path, cache_dir: Path, change: Callable[[Path], object], names: dict[str, list[str]]
) -> None:
    listed(root, cache_dir)
    change(root / "b" / "b.jpg")
    assert listed(root, cache_dir) == (ALL | names, ["b"])
    assert listed(root, cache_dir)[1] == []


def test_change_whose_time_was_set_back_is_noticed(root: Path, cache_dir: Path) -> None:
    listed(root, cache_dir)
    status = (root / "b").stat()
    (root / "b" / "b.jpg").rename(root / "b" / "z.jpg")
    os.utime(root / "b", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert listed(root, cache_dir) == (ALL | {"b": ["z.jpg"]}, ["b"])


def test_removed_class_is_gone_and_forgotten(root: Path, cache_dir: Path) -> None:
    listed(root, cache_dir)
    before = index_file(cache_dir).read_bytes()
    shutil.rmtree(root / "b")
    assert listed(root, cache_dir) == ({"a": ["a.jpg"], "c": ["c.jpg"]}, [])
    assert index_file(cache_dir).read_bytes() != before


def test_exchanged_classes_are_noticed(root: Path, cache_dir: Path) -> None:
    listed(root, cache_dir)
    (root / "a").rename(root / "x")
    (root / "b").rename(root / "a")
    (root / "x").rename(root / "b")
    assert listed(root, cache_dir) == ({"a": ["b.jpg"], "b": ["a.jpg"], "c": ["c.jpg"]}, ["a", "b"])


def test_folder_that_changed_a_moment_ago_is_not_trusted(
    root: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another change within the same tick of the disk's clock would leave no trace."""
    changed = {path.name: max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in root.iterdir()}
    monkeypatch.setattr(time, "time_ns", lambda: changed["b"] + 1_999_999_999)
    assert "b" in listed(root, cache_dir)[1]
    assert "b" in listed(root, cache_dir)[1]


def test_folder_whose_old_time_was_just_set_is_not_trusted(root: Path, cache_dir: Path) -> None:
    """Unpacking sets a folder's time back as its last step; it may come again."""
    with pytest.MonkeyPatch.context() as patch:
        os.utime(root / "b", (1, 1))
        changed = (root / "b").stat().st_ctime_ns
        patch.setattr(time, "time_ns", lambda: changed + 1_000_000_000)
        listed(root, cache_dir)
        assert "b" in listed(root, cache_dir)[1]


def test_folder_whose_time_lies_ahead_is_not_trusted(root: Path, cache_dir: Path) -> None:
    """Its disk's clock and ours are apart, so nothing is known of the moment of its last change."""
    os.utime(root / "b", (time.time() + 3600,) * 2)
    listed(root, cache_dir)
    assert listed(root, cache_dir) == (ALL, ["b"])


def test_file_added_while_its_folder_is_listed_is_found_next_time(root: Path, cache_dir: Path) -> None:
    def scan(path: Path) -> ContainerIndex:
        index = scan_images(path)
        if path.name == "b":
            (path / "late.jpg").touch()
        return index

    index_containers(sorted(root.iterdir()), scan, root=root, kind="folders", cache_dir=cache_dir)
    assert listed(root, cache_dir) == (ALL | {"b": ["b.jpg", "late.jpg"]}, ["b"])


def test_numbers_and_counts_are_cached(tmp_path: Path, cache_dir: Path) -> None:
    archive = tmp_path / "x.tar"
    archive.write_text("name")
    scan = Scanner()
    first, second = (
        index_containers([archive], scan, root=archive, kind="tar", cache_dir=cache_dir)[0] for _ in range(2)
    )
    assert scan.scanned == ["x.tar"]
    assert second.names == first.names == ("name",)
    assert np.array_equal(second.numbers, [[4, -7]])
    assert second.numbers.dtype == np.int64


@pytest.mark.parametrize("name", ["\udcff.jpg", "é.jpg", 'a"b.jpg', "new\nline.jpg"])
def test_odd_names_are_cached_as_they_are(root: Path, cache_dir: Path, name: str) -> None:
    (root / "a" / name).touch()
    assert listed(root, cache_dir)[0] == listed(root, cache_dir)[0] == ALL | {"a": sorted(["a.jpg", name])}
    assert listed(root, cache_dir)[1] == []


def test_every_flipped_byte_of_an_index_invalidates_it(root: Path, cache_dir: Path) -> None:
    listed(root, cache_dir)
    index = index_file(cache_dir)
    content = index.read_bytes()
    wrong = []
    for at in range(0, len(content), 7):
        index.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        if listed(root, cache_dir) != (ALL, ["a", "b", "c"]):
            wrong.append(at)
    assert wrong == []


def test_each_root_and_kind_has_an_index_of_its_own(root: Path, cache_dir: Path) -> None:
    listed(root, cache_dir)
    assert listed(root, cache_dir, "other")[1] == ["a", "b", "c"]
    index_containers([root / "a"], scan_images, root=root / "a", kind="folders", cache_dir=cache_dir)
    assert len(list((cache_dir / "indexes").iterdir())) == 3


def test_small_sets_are_not_worth_a_file(root: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_index, "_FEWEST_IMAGES", 4)
    listed(root, cache_dir)
    assert not cache_dir.exists()
    (root / "a" / "fourth.jpg").touch()
    listed(root, cache_dir)
    assert index_file(cache_dir).is_file()


def test_cache_that_cannot_be_written_is_not_needed(
    root: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_dir.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "msn_eval"):
        assert listed(root, cache_dir) == (ALL, ["a", "b", "c"])
    assert "cannot be cached for the next run" in caplog.text


def test_folder_that_vanishes_is_named(root: Path) -> None:
    with pytest.raises(DataError, match="gone: cannot be read: No such file") as caught:
        index_containers([root / "a", root / "gone"], scan_images, root=root, kind="folders", cache_dir=None)
    assert caught.value.exit_code == 21


def test_image_folder_is_not_listed_twice(root: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = read_split(str(root.parent), "train", cache_dir=cache_dir).ids
    listing = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).parent == root:
            raise AssertionError(f"{path} is listed again")
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert read_split(str(root.parent), "train", cache_dir=cache_dir).ids == ids == ("a/a.jpg", "b/b.jpg", "c/c.jpg")


def test_headers_of_an_archive_are_not_read_twice(
    tmp_path: Path, cache_dir: Path, write_tar: TarWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "train" / "n01440764.tar", [("a.jpg", b"ant")])
    read_split(str(tmp_path), "train", cache_dir=cache_dir)
    monkeypatch.setattr("msn_eval.data.imagenet.read_members", None)
    again = read_split(str(tmp_path), "train", cache_dir=cache_dir)
    assert again.source.read("n01440764/a.jpg") == b"ant"


@pytest.mark.parametrize("members", [[("b.jpg", b"bee")], [("a.jpg", b"ape")], [("0.jpg", b""), ("a.jpg", b"ant")]])
def test_replaced_archive_is_read_again(
    tmp_path: Path, cache_dir: Path, write_tar: TarWriter, members: list[tuple[str, bytes]]
) -> None:
    archive = write_tar(tmp_path / "train" / "n01440764.tar", [("a.jpg", b"ant")])
    read_split(str(tmp_path), "train", cache_dir=cache_dir)
    status = archive.stat()
    write_tar(tmp_path / "new.tar", members).replace(archive)
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    train = read_split(str(tmp_path), "train", cache_dir=cache_dir)
    assert {name: train.source.read(name) for name in train.ids} == {
        f"n01440764/{name}": data for name, data in members
    }


def test_corrected_classes_txt_is_used_with_cached_archives(
    tmp_path: Path, cache_dir: Path, write_tar: TarWriter
) -> None:
    write_tar(tmp_path / "train-000000.tar", [("a.jpg", b""), ("a.cls", b"0")])
    (tmp_path / "classes.txt").write_text("bee\n")
    read_split(f"wds:{tmp_path}", "train", cache_dir=cache_dir)
    (tmp_path / "classes.txt").write_text("ant\n")
    assert read_split(f"wds:{tmp_path}", "train", cache_dir=cache_dir).ids == ("ant/a.jpg",)


@pytest.mark.parametrize(("name", "value"), [("_VERSION", 1), ("SUFFIXES", frozenset({".jpg", ".tga"}))])
def test_index_made_under_different_rules_is_ignored(
    root: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    listed(root, cache_dir)
    monkeypatch.setattr(image_index, name, value)
    assert listed(root, cache_dir)[1] == ["a", "b", "c"]


def test_class_with_folders_below_it_is_listed_again_since_its_times_do_not_show_their_changes(
    root: Path, cache_dir: Path
) -> None:
    (root / "a" / "more").mkdir()
    (root / "a" / "more" / "x.jpg").touch()
    ids = []
    for name in ("y.jpg", "z.jpg"):
        ids.append(read_split(str(root.parent), "train", cache_dir=cache_dir).ids)
        (root / "a" / "more" / name).touch()
    assert set(ids[1]) - set(ids[0]) == {"a/more/y.jpg"}
