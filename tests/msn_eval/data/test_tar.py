import bz2
import gzip
import lzma
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from msn_eval.data.dataset import Listing, make_split
from msn_eval.data.hashing import hash_images
from msn_eval.data.images import ImageSet, file_stamp
from msn_eval.data.index import make_index
from msn_eval.data.tar import _HeaderFile, list_members, open_archives, read_members
from msn_eval.errors import DataError

TarWriter = Callable[..., Path]

FIRST = [("b.jpg", b"bee"), ("\udcff.jpg", b"byte"), ("\uff21.jpg", b"wide"), ("a.jpg", b"ant"), ("é.jpg", b"acute")]
SECOND = [("c.jpg", b"cat"), ("a.jpg", b"ape" * 1000)]


def listing_of(*paths: Path, classes: str = "xy") -> Listing:
    archives = open_archives(paths)
    indexes = []
    for path in paths:
        members = read_members(path)
        rows = [(member.offset, member.size) for member in members]
        indexes.append(make_index([member.file for member in members], rows, columns=2))
    names = [[name] * len(index.names) for name, index in zip(classes, indexes, strict=True)]
    return list_members(archives, indexes, names, root=paths[0])


@pytest.fixture
def paths(tmp_path: Path, write_tar: TarWriter) -> tuple[Path, Path]:
    return write_tar(tmp_path / "first.tar", FIRST), write_tar(tmp_path / "second.tar", SECOND)


@pytest.fixture
def listing(paths: tuple[Path, Path]) -> Listing:
    return listing_of(*paths)


def test_files_of_a_class_are_in_byte_order(listing: Listing) -> None:
    assert listing.files == {"x": ("a.jpg", "b.jpg", "é.jpg", "\uff21.jpg", "\udcff.jpg"), "y": ("a.jpg", "c.jpg")}


def test_each_image_is_read_from_its_own_archive(listing: Listing) -> None:
    wanted = {f"x/{name}": data for name, data in FIRST} | {f"y/{name}": data for name, data in SECOND}
    assert {image_id: listing.source.read(image_id) for image_id in wanted} == wanted


def test_one_class_in_two_archives_is_one_class(paths: tuple[Path, Path], tmp_path: Path, write_tar: TarWriter) -> None:
    other = write_tar(tmp_path / "third.tar", [("d.jpg", b"dog"), ("0.jpg", b"nil")])
    listing = listing_of(paths[1], other, classes="xx")
    assert listing.files == {"x": ("0.jpg", "a.jpg", "c.jpg", "d.jpg")}
    assert [listing.source.read(f"x/{name}") for name in ("0.jpg", "c.jpg", "d.jpg")] == [b"nil", b"cat", b"dog"]


def test_place_is_the_archive_and_the_image(listing: Listing, paths: tuple[Path, Path]) -> None:
    assert listing.source.place("y/c.jpg") == f"{paths[1]}: y/c.jpg"


def test_stamp_has_the_size_the_archive_and_the_offset(listing: Listing, paths: tuple[Path, Path]) -> None:
    status = paths[1].stat()
    assert listing.source.stamp("y/c.jpg") == (3, *file_stamp(status)[1:], status.st_size, 512)


def test_unreadable_archive_is_reported_with_the_images_that_it_costs(
    listing: Listing, paths: tuple[Path, Path]
) -> None:
    images = ImageSet(ids=("y/a.jpg", "y/c.jpg"), labels=(0, 0), classes=("y",), source=listing.source)
    os.truncate(paths[1], 100)
    with pytest.raises(DataError, match=r"2 images cannot be used:\n.*second\.tar: y/a\.jpg: the archive changed"):
        hash_images(images, cache_dir=None)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_read_at_once(listing: Listing) -> None:
    listing.source.read("x/a.jpg")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(listing.source.read, ["y/a.jpg", "x/b.jpg"] * 50) == [b"ape" * 1000, b"bee"] * 50


FILES = [("a/0.jpg", b"first"), ("a/1.jpg", b"x" * 600), ("2.jpg", b"")]


@pytest.fixture
def archive(tmp_path: Path, write_tar: TarWriter) -> Path:
    return write_tar(tmp_path / "images.tar", FILES)


def contents(path: Path) -> list[tuple[str, bytes]]:
    content = path.read_bytes()
    return [(member.name, content[member.offset : member.offset + member.size]) for member in read_members(path)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_at_their_bytes(tmp_path: Path, write_tar: TarWriter, format: int) -> None:
    assert contents(write_tar(tmp_path / "images.tar", FILES, format=format)) == FILES


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_beyond_a_header_are_read_in_full(tmp_path: Path, write_tar: TarWriter, format: int) -> None:
    long = f"{'folder/' * 60}é.jpg"
    path = write_tar(tmp_path / "images.tar", [(long, b"one"), ("z.jpg", b"two")], format=format)
    assert contents(path) == [(long, b"one"), ("z.jpg", b"two")]


def test_archive_within_another_is_read_in_place(tmp_path: Path, write_tar: TarWriter, archive: Path) -> None:
    outer = write_tar(tmp_path / "outer.tar", [("x.tar", b"before"), ("inner.tar", archive.read_bytes())])
    inner = read_members(outer)[1]
    content = outer.read_bytes()
    members = read_members(outer, within=inner)
    assert [(member.name, content[member.offset : member.offset + member.size]) for member in members] == FILES


def test_links_devices_and_folders_are_not_files(tmp_path: Path) -> None:
    kinds = {"s.jpg": tarfile.SYMTYPE, "h.jpg": tarfile.LNKTYPE, "f.jpg": tarfile.FIFOTYPE, "c.jpg": tarfile.CHRTYPE}
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, kind in kinds.items():
            header = tarfile.TarInfo(name)
            header.type, header.linkname, header.size = kind, "/etc/passwd", 9
            tar.addfile(header)
    assert [(member.name, member.is_file, member.size) for member in read_members(path)] == [
        (name, False, 0) for name in kinds
    ]


def test_names_that_lead_out_of_a_folder_are_only_names(tmp_path: Path, write_tar: TarWriter) -> None:
    path = write_tar(tmp_path / "images.tar", [("../../up.jpg", b"1"), ("/etc/abs.jpg", b"2")])
    assert [member.file for member in read_members(path)] == ["up.jpg", "abs.jpg"]
    assert list(tmp_path.iterdir()) == [path]


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    path = tmp_path / "latin.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.jpg"))
    assert [member.name for member in read_members(path)] == ["caf\udce9.jpg"]


@pytest.mark.parametrize(
    ("name", "pack", "command"),
    [
        ("gzip", gzip.compress, "gunzip"),
        ("bzip2", bz2.compress, "bunzip2"),
        ("xz", lzma.compress, "unxz"),
        ("zstd", lambda content: b"\x28\xb5\x2f\xfd" + content, "unzstd"),
    ],
)
def test_compressed_archive_is_refused_with_the_command_that_decompresses_it(
    archive: Path, name: str, pack: Callable[[bytes], bytes], command: str
) -> None:
    archive.write_bytes(pack(archive.read_bytes()))
    with pytest.raises(DataError, match=f"is compressed by {name}; images are read in place") as caught:
        read_members(archive)
    assert (caught.value.exit_code, caught.value.where) == (21, str(archive))
    assert command in caught.value.hint


@pytest.mark.parametrize("length", range(0, 4096, 256))
def test_archive_cut_anywhere_is_refused_and_named(archive: Path, length: int) -> None:
    """Its members and zeros take: 512 + 512, 512 + 1024, 512 and 1024 bytes; a cut may fall on their borders."""
    content = archive.read_bytes()
    closing = 512 * 6
    archive.write_bytes(content[: min(length, closing + 511)])
    with pytest.raises(DataError) as caught:
        read_members(archive)
    assert caught.value.exit_code == 21
    assert caught.value.where == str(archive)
    assert caught.value.hint


def test_one_block_of_zeros_closes_an_archive(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[: 512 * 7])
    assert contents(archive) == FILES


def test_damaged_byte_of_a_header_is_noticed_or_harmless(archive: Path) -> None:
    """A reader that stops at the first odd header gives fewer images."""
    content = archive.read_bytes()
    silent = []
    for at in [*range(0, 512, 3), *range(1024, 1536, 3), *range(2560, 3072, 3)]:
        archive.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
        try:
            if contents(archive) != FILES:
                silent.append(at)
        except DataError:
            continue
    assert silent == []


def test_inner_archive_ends_where_its_member_does(tmp_path: Path, write_tar: TarWriter, archive: Path) -> None:
    """What follows in the outer archive must not be taken for the rest of a truncated inner one."""
    cut = archive.read_bytes()[: 512 * 6]
    outer = write_tar(tmp_path / "outer.tar", [("inner.tar", cut), ("next.tar", archive.read_bytes())])
    inner = read_members(outer)[0]
    with pytest.raises(DataError, match=r"outer\.tar: inner\.tar: is not a tar archive.* zeros that close"):
        read_members(outer, within=inner)


def test_archive_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read: No such file"):
        read_members(tmp_path / "gone.tar")


def test_images_are_not_read_with_the_headers(
    tmp_path: Path, write_tar: TarWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Counted(_HeaderFile):
        def read(self, size: int | None = -1, /) -> bytes:
            sizes.append(size or 0)
            return super().read(size)

    path = write_tar(tmp_path / "large.tar", [("a.jpg", bytes(1 << 20)), ("b.jpg", bytes(1 << 20))])
    monkeypatch.setattr("msn_eval.data.tar._HeaderFile", Counted)
    read_members(path)
    assert sum(sizes) < 20_000


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:1024] + bytes(512) + content[1536:],
        lambda content: content * 2,
        lambda content: content + bytes(3 << 20) + b"x",
    ],
    ids=["zeroed header", "joined archives", "far behind its end"],
)
def test_content_after_the_end_is_refused(archive: Path, change: Callable[[bytes], bytes]) -> None:
    archive.write_bytes(change(archive.read_bytes()))
    with pytest.raises(DataError, match="goes on after its end at byte"):
        read_members(archive)


def header_of(
    name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, fields: Mapping[int, bytes] = MappingProxyType({})
) -> bytes:
    """Return a header with some of its bytes replaced, under a valid checksum."""
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    for offset, content in {**fields, 148: b" " * 8}.items():
        block[offset : offset + len(content)] = content
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SPARSE = {386: b"%011o\0" % 0, 398: b"%011o\0" % 512, 483: b"%011o\0" % 4096}
LONG_NAME = ("././@LongLink", tarfile.GNUTYPE_LONGNAME)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (bytes(range(256)) * 20, "at its beginning"),
        (header_of("a.jpg", tarfile.GNUTYPE_SPARSE, 512, SPARSE) + bytes(2048), "--sparse"),
        (header_of("a.jpg", fields={124: b"\xff" * 10 + b"\xfc\x00"}) + bytes(4096), ""),  # -1024, in the base-256 form
        (header_of(*LONG_NAME, 1 << 21) + b"a" * (1 << 21) + bytes(4096), "a header of 2097152 bytes"),
        ((header_of(*LONG_NAME, 2) + b"a\0".ljust(512, b"\0")) * 5000 + bytes(1024), ""),
    ],
    ids=["empty", "picture", "sparse member", "negative size", "very long name", "endless chain of names"],
)
def test_file_that_is_not_a_usable_archive_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "hostile.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"hostile\.tar: is not a tar archive, or is damaged or truncated: .*{reason}"):
        read_members(path)


@pytest.mark.parametrize("change", [{"size": 512}, {"mtime": 1}], ids=str)
def test_archive_that_changed_after_the_listing_is_not_read(
    listing: Listing, paths: tuple[Path, Path], change: dict[str, int]
) -> None:
    status = paths[1].stat()
    with paths[1].open("ab") as file:
        file.write(bytes(change.get("size", 0)))
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns + change.get("mtime", 0)))
    with pytest.raises(OSError, match="the archive changed after its images were listed"):
        listing.source.read("y/c.jpg")


def test_id_in_two_archives_is_refused(paths: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"\.tar: x/a\.jpg: two images have the id x/a\.jpg\n"):
        make_split(listing_of(*paths, classes="xx"))
