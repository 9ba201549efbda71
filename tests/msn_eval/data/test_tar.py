import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from msn_eval.data.hashing import hash_images
from msn_eval.data.images import ImageSet, file_stamp
from msn_eval.data.index import make_part
from msn_eval.data.listing import Listing
from msn_eval.data.tar import list_members, open_archives
from msn_eval.data.tar_members import read_members
from msn_eval.errors import DataError

TarWriter = Callable[..., Path]

FIRST = [("b.jpg", b"bee"), ("\udcff.jpg", b"byte"), ("\uff21.jpg", b"wide"), ("a.jpg", b"ant"), ("é.jpg", b"acute")]
SECOND = [("c.jpg", b"cat"), ("a.jpg", b"ape" * 1000)]


def listing_of(*paths: Path, classes: str = "xy") -> Listing:
    archives = open_archives(paths)
    parts = []
    for path in paths:
        members = read_members(path)
        parts.append(make_part([one.file for one in members], [(one.offset, one.size) for one in members], columns=2))
    names = [[name] * len(part.names) for name, part in zip(classes, parts, strict=True)]
    return list_members(archives, parts, names, root=paths[0])


@pytest.fixture
def paths(tmp_path: Path, write_tar: TarWriter) -> tuple[Path, Path]:
    return write_tar(tmp_path / "first.tar", FIRST), write_tar(tmp_path / "second.tar", SECOND)


@pytest.fixture
def listing(paths: tuple[Path, Path]) -> Listing:
    return listing_of(*paths)


def test_files_of_a_class_stand_in_byte_order(listing: Listing) -> None:
    assert listing.files == {"x": ("a.jpg", "b.jpg", "é.jpg", "\uff21.jpg", "\udcff.jpg"), "y": ("a.jpg", "c.jpg")}


def test_each_image_is_read_from_its_own_archive(listing: Listing) -> None:
    wanted = {f"x/{name}": data for name, data in FIRST} | {f"y/{name}": data for name, data in SECOND}
    assert {image_id: listing.source.read(image_id) for image_id in wanted} == wanted


@pytest.mark.parametrize("image_id", ["x/c.jpg", "x/zzz.jpg", "z/a.jpg"])
def test_image_that_is_not_there_is_a_key_error(listing: Listing, image_id: str) -> None:
    with pytest.raises(KeyError):
        listing.source.read(image_id)


def test_one_class_in_two_archives_is_one_class(paths: tuple[Path, Path], tmp_path: Path, write_tar: TarWriter) -> None:
    other = write_tar(tmp_path / "third.tar", [("d.jpg", b"dog"), ("0.jpg", b"nil")])
    listing = listing_of(paths[1], other, classes="xx")
    assert listing.files == {"x": ("0.jpg", "a.jpg", "c.jpg", "d.jpg")}
    assert [listing.source.read(f"x/{name}") for name in ("0.jpg", "c.jpg", "d.jpg")] == [b"nil", b"cat", b"dog"]


def test_id_in_two_archives_is_refused_and_both_are_named(paths: tuple[Path, Path]) -> None:
    with pytest.raises(DataError) as caught:
        listing_of(*paths, classes="xx")
    assert str(caught.value).startswith(f"{paths[0]} and {paths[1]}: hold two images of the id x/a.jpg\n")


def test_id_twice_in_one_archive_is_refused(tmp_path: Path, write_tar: TarWriter) -> None:
    path = write_tar(tmp_path / "twice.tar", [("one/a.jpg", b"1"), ("two/a.jpg", b"2")])
    with pytest.raises(DataError, match=r"twice\.tar: holds two images of the id x/a\.jpg"):
        listing_of(path, classes="x")


def test_place_is_the_archive_and_the_image(listing: Listing, paths: tuple[Path, Path]) -> None:
    assert listing.source.place("y/c.jpg") == f"{paths[1]}: y/c.jpg"


def test_stamp_is_the_size_what_tells_the_archive_and_the_offset(listing: Listing, paths: tuple[Path, Path]) -> None:
    status = paths[1].stat()
    assert listing.source.stamp("y/c.jpg") == (3, *file_stamp(status)[1:], status.st_size, 512)


def test_replaced_archive_changes_the_stamps(listing: Listing, paths: tuple[Path, Path]) -> None:
    before = listing.source.stamp("y/c.jpg")
    status = paths[1].stat()
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert listing.source.stamp("y/c.jpg") != before


def test_archive_that_changed_after_the_listing_is_not_read(
    listing: Listing, paths: tuple[Path, Path], write_tar: TarWriter
) -> None:
    write_tar(paths[1], [("other.jpg", b"dog"), *SECOND[1:]])
    status = paths[1].stat()
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # a coarse clock may not have ticked
    with pytest.raises(OSError, match="the archive changed after its images were listed"):
        listing.source.read("y/c.jpg")


def test_archive_of_another_size_and_the_same_time_is_not_read(listing: Listing, paths: tuple[Path, Path]) -> None:
    status = paths[1].stat()
    with paths[1].open("ab") as file:
        file.write(bytes(512))
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(OSError, match="the archive changed"):
        listing.source.read("y/c.jpg")


def test_archive_that_became_shorter_gives_no_short_bytes(
    listing: Listing, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msn_eval.data.tar._check_unchanged", lambda *_: None)
    os.truncate(paths[1], 512 + 1024 + 100)
    with pytest.raises(OSError, match="the archive ends 2900 bytes before the image does"):
        listing.source.read("y/a.jpg")


def test_read_that_gives_less_than_asked_goes_on(listing: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 7), offset))
    assert listing.source.read("y/a.jpg") == b"ape" * 1000


def test_missing_archive_is_an_os_error(listing: Listing, paths: tuple[Path, Path]) -> None:
    paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        listing.source.read("y/c.jpg")


def test_unreadable_archive_is_told_with_the_images_that_it_costs(listing: Listing, paths: tuple[Path, Path]) -> None:
    images = ImageSet(ids=("y/a.jpg", "y/c.jpg"), labels=(0, 0), classes=("y",), source=listing.source)
    os.truncate(paths[1], 100)
    with pytest.raises(DataError, match=r"2 images cannot be used:\n.*second\.tar: y/a\.jpg: the archive changed"):
        hash_images(images, memory=None)


def test_no_file_stays_open(listing: Listing) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        listing.source.read("x/a.jpg")
    with pytest.raises(KeyError):
        listing.source.read("x/none.jpg")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_threads_read_their_own_images(listing: Listing) -> None:
    wanted = [("x/a.jpg", b"ant"), ("y/c.jpg", b"cat"), ("x/b.jpg", b"bee")] * 200
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(listing.source.read, [name for name, _ in wanted])) == [data for _, data in wanted]


def test_copy_in_another_process_reads_the_same(listing: Listing) -> None:
    copy = pickle.loads(pickle.dumps(listing.source))
    assert copy.read("y/a.jpg") == listing.source.read("y/a.jpg")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_read_at_once(listing: Listing) -> None:
    listing.source.read("x/a.jpg")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(listing.source.read, ["y/a.jpg", "x/b.jpg"] * 50) == [b"ape" * 1000, b"bee"] * 50
