"""TarSource: images read in place from tar archives, and how the members of archives become a listing."""

import io
import os
import tarfile
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msn_eval.data.dataset import Listing
from msn_eval.data.images import Stamp, decode_image, file_stamp
from msn_eval.data.index import Part
from msn_eval.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A tar archive as it was when its headers were read; what was found in it is void once it changes."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class ClassMembers:
    """The images of one class.

    files:  names in byte order
    places: (n, 3) int64, a row a file: which archive, the offset of its bytes in it, their number
    """

    files: tuple[str, ...]
    places: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource:
    """Members of archives. It holds no open file, so that forks, threads and pickles have nothing to share.

    root: the archive, or the folder or first archive of many; no two splits have the same
    """

    root: Path
    archives: tuple[Archive, ...]
    classes: Mapping[str, ClassMembers]

    def read(self, image_id: str) -> bytes:
        archive, offset, size = self._find(image_id)
        descriptor = os.open(archive.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            _check_unchanged(archive, os.fstat(descriptor))
            content = os.pread(descriptor, size, offset)
            while len(content) < size:  # one call gives at most two gigabytes, and less when a signal comes
                more = os.pread(descriptor, size - len(content), offset + len(content))
                if not more:
                    raise OSError(f"the archive ends {size - len(content)} bytes before the image does")
                content += more
            return content
        finally:
            os.close(descriptor)

    def decode(self, content: bytes) -> Image.Image:
        return decode_image(content)

    def place(self, image_id: str) -> str:
        return f"{self._find(image_id)[0].path}: {image_id}"

    def stamp(self, image_id: str) -> Stamp:
        archive, offset, size = self._find(image_id)
        status = archive.path.stat()
        return size, *file_stamp(status)[1:], status.st_size, offset

    def _find(self, image_id: str) -> tuple[Archive, int, int]:
        name, _, file = image_id.partition("/")
        members = self.classes[name]
        row = bisect_left(members.files, os.fsencode(file), key=os.fsencode)
        if members.files[row : row + 1] != (file,):
            raise KeyError(image_id)
        archive, offset, size = members.places[row].tolist()
        return self.archives[archive], offset, size


def open_archives(paths: Iterable[Path]) -> tuple[Archive, ...]:
    """Give archives as they are now; to be asked before their headers are read, so that no change slips in between."""
    archives = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror or error}", where=str(path), hint="Check its permissions."
            ) from error
        archives.append(Archive(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns))
    return tuple(archives)


def list_members(
    archives: tuple[Archive, ...], parts: Sequence[Part], classes: Sequence[Sequence[str]], *, root: Path
) -> Listing:
    """Give the images of archives by class, read in place.

    parts:   what each archive holds: file names, with the offset and the size of each as their first two numbers
    classes: the class of each image of each part
    Raises DataError where two images of a class have one name.
    """
    files = [file for part in parts for file in part.names]
    numbers = [np.full((len(part.names), 1), number, dtype=np.int64) for number, part in enumerate(parts)]
    places = np.concatenate(
        [np.hstack([number, part.numbers[:, :2]]) for number, part in zip(numbers, parts, strict=True)]
    )
    grouped: dict[str, list[int]] = {}
    for row, name in enumerate(chain.from_iterable(classes)):
        grouped.setdefault(name, []).append(row)
    members = {}
    for name, rows in grouped.items():
        rows.sort(key=lambda row: os.fsencode(files[row]))
        for one, other in pairwise(rows):
            if files[one] == files[other]:
                raise _duplicate(archives[places[one, 0]], archives[places[other, 0]], f"{name}/{files[one]}")
        members[name] = ClassMembers(files=tuple(files[row] for row in rows), places=places[rows])
    return Listing(
        files={name: found.files for name, found in members.items()},
        source=TarSource(root=root, archives=archives, classes=members),
        passed_over=sum(part.passed_over for part in parts),
    )


def _check_unchanged(archive: Archive, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (archive.size, archive.mtime_ns):
        raise OSError("the archive changed after its images were listed; start again")


def _duplicate(one: Archive, other: Archive, image_id: str) -> DataError:
    where = str(one.path) if one == other else f"{one.path} and {other.path}"
    return DataError(
        f"hold{'s' if one == other else ''} two images of the id {image_id}",
        where=where,
        hint="Remove or rename one of them: an id is a class and a file name without folders.",
    )


_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_LONGEST_HEADER = 1 << 20  # bytes of a long name or of pax records; a damaged length must not read the disk into memory
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4 -k"),
}
# What Python's tarfile was seen or is known to raise on headers that no tar program writes.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, LookupError, RecursionError, EOFError)


class TarMember(NamedTuple):
    """One entry of an archive that is no folder.

    name:    as the archive has it, folders and all; only ever shown and compared
    offset:  of its bytes in the file on disk, also where the archive itself is a member of another
    size:    bytes
    is_file: False for links, devices and pipes, which have no bytes of their own
    """

    name: str
    offset: int
    size: int
    is_file: bool

    @property
    def file(self) -> str:
        """Give the name without its folders."""
        return self.name.rpartition("/")[2]


class _HeaderFile(io.FileIO):
    """The archive's file, which gives headers but not whole members."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def read_members(path: Path, *, within: TarMember | None = None) -> list[TarMember]:
    """Give every entry of an uncompressed tar archive but its folders, in order, from its headers.

    within: the member of the file at `path` that is the archive; None for the whole file
    Raises DataError for compressed, damaged and truncated archives, and for ones that go on after their end: whoever
    stops at the first odd header has fewer images and does not know it.
    """
    where = f"{path}: {within.name}" if within else str(path)
    try:
        with _HeaderFile(path) as file:
            start = within.offset if within else 0
            end = start + within.size if within else os.fstat(file.fileno()).st_size
            _check_kind(file, start, end, where)
            members, closing = _walk(file, start, end, where)
            _check_end(file, closing, end, where)
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}", where=where, hint="Check its permissions and its disk."
        ) from error
    return members


def _walk(file: _HeaderFile, start: int, end: int, where: str) -> tuple[list[TarMember], int]:
    """Give the members and the place at which their headers end."""
    members: list[TarMember] = []
    file.seek(start)
    try:
        with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as archive:
            while (header := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header, a kilobyte each
                if header.offset >= end:  # it is the outer archive's: this one was never closed
                    return members, header.offset
                if header.size < 0 or archive.offset > end or archive.offset <= header.offset:
                    raise _cut_short(where, f"member {header.name} reaches beyond its end at byte {end - start:,}")
                if header.issparse():
                    raise _sparse(where, header.name)
                if not header.isdir():
                    size = header.size if header.isreg() else 0
                    members.append(TarMember(header.name, header.offset_data, size, header.isreg()))
            return members, archive.offset
    except _DAMAGE as error:
        last = f"after member {members[-1].name}" if members else "at its beginning"
        raise _cut_short(where, f"{error or type(error).__name__} ({last})") from error


def _check_kind(file: _HeaderFile, start: int, end: int, where: str) -> None:
    head = os.pread(file.fileno(), min(_BLOCK, max(0, end - start)), start)
    if not head:
        raise DataError("is empty: no tar archive is", where=where, hint="Download or write it again.")
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"is compressed by {name}; images are read in place, which takes a plain tar",
                where=where,
                hint=f"Decompress it once, such as by `{command}`, and leave the plain tar in its place.",
            )


def _check_end(file: _HeaderFile, offset: int, end: int, where: str) -> None:
    """Be sure that the headers ended because the archive does: by a block of zeros, and nothing but zeros after it."""
    room = end - offset
    block = os.pread(file.fileno(), min(_BLOCK, max(0, room)), offset)
    if any(block):
        raise _cut_short(where, f"there is no tar header at byte {offset:,} of {file.name!s}")
    if len(block) < _BLOCK:
        raise _cut_short(where, "it ends without the zeros that close an archive")
    at = offset + _BLOCK
    while at < end:
        rest = os.pread(file.fileno(), min(_CHUNK, end - at), at)
        if any(rest):
            raise DataError(
                f"goes on after its end at byte {offset:,}",
                where=where,
                hint="Part of it was overwritten by zeros, or several archives were joined; "
                "write it again, or keep each in a file of its own.",
            )
        if not rest:
            raise _cut_short(where, "it became shorter while it was read")
        at += len(rest)


def _cut_short(where: str, why: str) -> DataError:
    return DataError(
        f"is no tar archive, or a damaged or truncated one: {why}",
        where=where,
        hint="Compare its size and checksum with the original's, and copy or download it again.",
    )


def _sparse(where: str, name: str) -> DataError:
    return DataError(
        f"member {name} is stored with its zeros left out",
        where=where,
        hint="Write the archive without tar's --sparse; images are read in place.",
    )
