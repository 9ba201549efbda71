"""TarSource: images read in place from tar archives, and how the members of archives become a listing."""

import io
import os
import tarfile
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msn_eval.data.dataset import Listing
from msn_eval.data.images import Stamp, decode_image, file_stamp, reading
from msn_eval.data.index import ContainerIndex
from msn_eval.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A tar archive as it was when its headers were read. Offsets into it are invalid once it changes."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class ClassMembers:
    """The images of one class.

    Attributes:
        files: Names in byte order.
        locations: (n, 3) int64, for each file: the archive's index, the offset of the bytes in it, their number.
    """

    files: tuple[str, ...]
    locations: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource:
    """Members of archives. It holds no open file, so forks, threads and pickles have nothing to share.

    Attributes:
        root: The archive, or the folder or first archive of many. No two splits have the same.
        archives: The archives that hold the images.
        classes: The images of each class.
    """

    root: Path
    archives: tuple[Archive, ...]
    classes: Mapping[str, ClassMembers]

    def read(self, image_id: str) -> bytes:
        archive, offset, size = self._find(image_id)
        with archive.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (archive.size, archive.mtime_ns):
                raise OSError("the archive changed after its images were listed; start again")
            file.seek(offset)
            return file.read(size)

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
        archive, offset, size = members.locations[row].tolist()
        return self.archives[archive], offset, size


def open_archives(paths: Iterable[Path]) -> tuple[Archive, ...]:
    """Return archives as they are now. Call this before reading their headers, so that no change goes unnoticed."""
    archives = []
    for path in paths:
        with reading(path):
            status = path.stat()
        archives.append(Archive(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns))
    return tuple(archives)


def list_members(
    archives: tuple[Archive, ...], indexes: Sequence[ContainerIndex], classes: Sequence[Sequence[str]], *, root: Path
) -> Listing:
    """List the images of archives by class, to be read in place.

    Args:
        archives: The archives.
        indexes: For each archive the file names, with the offset and the size of each as their first two numbers.
        classes: For each archive the class of each image.
        root: Of the source.
    """
    files = [file for index in indexes for file in index.names]
    archive_column = np.repeat(np.arange(len(indexes)), [len(index.names) for index in indexes])
    locations = np.column_stack([archive_column, np.concatenate([index.numbers[:, :2] for index in indexes])])
    grouped: dict[str, list[int]] = {}
    for row, name in enumerate(chain.from_iterable(classes)):
        grouped.setdefault(name, []).append(row)
    members = {}
    for name, rows in grouped.items():
        rows.sort(key=lambda row: os.fsencode(files[row]))
        members[name] = ClassMembers(files=tuple(files[row] for row in rows), locations=locations[rows])
    return Listing(
        files={name: of_class.files for name, of_class in members.items()},
        source=TarSource(root=root, archives=archives, classes=members),
        passed_over=sum(index.passed_over for index in indexes),
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
# What Python's tarfile is known to raise on headers that no tar program writes.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, LookupError, RecursionError, EOFError)


class TarMember(NamedTuple):
    """One entry of an archive that is not a folder.

    Attributes:
        name: As the archive has it, with folders. It is only shown and compared, never used as a path.
        offset: Of its bytes in the file on disk, also where the archive itself is a member of another.
        size: Bytes.
        is_file: False for links, devices and pipes, which have no bytes of their own.
    """

    name: str
    offset: int
    size: int
    is_file: bool

    @property
    def file(self) -> str:
        """The name without its folders."""
        return self.name.rpartition("/")[2]


class _HeaderFile(io.FileIO):
    """The archive's file, from which headers can be read but not large members."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""

    def read_at(self, offset: int, end: int, most: int) -> bytes:
        """Read up to `most` bytes from `offset`, none from `end` on."""
        self.seek(offset)
        return self.read(max(0, min(most, end - offset)))


def read_members(path: Path, *, within: TarMember | None = None) -> list[TarMember]:
    """Return every entry of an uncompressed tar archive except its folders, in order, from its headers.

    Args:
        path: The file.
        within: The member of the file that is the archive; None where the file itself is.

    Raises:
        DataError: The archive is compressed, damaged or truncated, or goes on after its end. Stopping at the first odd
            header would lose images silently.
    """
    where = f"{path}: {within.name}" if within else str(path)
    with reading(path), _HeaderFile(path) as file:
        start = within.offset if within else 0
        end = start + within.size if within else os.fstat(file.fileno()).st_size
        _check_compression(file.read_at(start, end, _BLOCK), where)
        members, closing = _read_headers(file, start, end, where)
        _check_end(file, closing, end, where)
    return members


def _read_headers(file: _HeaderFile, start: int, end: int, where: str) -> tuple[list[TarMember], int]:
    """Return the members and the offset at which their headers end."""
    members: list[TarMember] = []
    file.seek(start)
    try:
        with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as archive:
            while (header := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header, a kilobyte each
                if header.offset >= end:  # it belongs to the outer archive: this one was never closed
                    return members, header.offset
                if header.size < 0 or archive.offset > end or archive.offset <= header.offset:
                    raise _damage(where, f"member {header.name} reaches beyond its end at byte {end - start:,}")
                if header.issparse():
                    raise _damage(where, f"member {header.name} is stored by tar's --sparse, without its zeros")
                if not header.isdir():
                    size = header.size if header.isreg() else 0
                    members.append(TarMember(header.name, header.offset_data, size, header.isreg()))
            return members, archive.offset
    except _DAMAGE as error:
        last = f"after member {members[-1].name}" if members else "at its beginning"
        raise _damage(where, f"{error or type(error).__name__} ({last})") from error


def _check_compression(head: bytes, where: str) -> None:
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"is compressed by {name}; images are read in place, which needs a plain tar",
                where=where,
                hint=f"Decompress it once, for example by `{command}`, and keep the plain tar in its place.",
            )


def _check_end(file: _HeaderFile, offset: int, end: int, where: str) -> None:
    """Check that the headers ended because the archive does: with a block of zeros and only zeros after it."""
    block = file.read_at(offset, end, _BLOCK)
    if any(block):
        raise _damage(where, f"there is no tar header at byte {offset:,} of {file.name!s}")
    if len(block) < _BLOCK:
        raise _damage(where, "it ends without the zeros that close an archive")
    position = offset + _BLOCK
    while chunk := file.read_at(position, end, _CHUNK):
        if any(chunk):
            raise DataError(
                f"goes on after its end at byte {offset:,}",
                where=where,
                hint="Part of it was overwritten by zeros, or several archives were joined; "
                "write it again, or keep each in a file of its own.",
            )
        position += len(chunk)


def _damage(where: str, why: str) -> DataError:
    return DataError(
        f"is not a tar archive, or is damaged or truncated: {why}",
        where=where,
        hint="Compare its size and checksum with the original's, and copy or download it again.",
    )
