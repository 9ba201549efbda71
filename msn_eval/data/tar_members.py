"""TarMember: a file inside a tar archive, found by the archive's headers alone. Nothing is ever unpacked."""

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from msn_eval.errors import DataError

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
            f"cannot be read: {error.strerror or error}", where=where, remedy="Check its permissions and its disk."
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
        raise DataError("is empty: no tar archive is", where=where, remedy="Download or write it again.")
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"is compressed by {name}; images are read in place, which takes a plain tar",
                where=where,
                remedy=f"Decompress it once, such as by `{command}`, and leave the plain tar in its place.",
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
                remedy="Part of it was overwritten by zeros, or several archives were joined; "
                "write it again, or keep each in a file of its own.",
            )
        if not rest:
            raise _cut_short(where, "it became shorter while it was read")
        at += len(rest)


def _cut_short(where: str, why: str) -> DataError:
    return DataError(
        f"is no tar archive, or a damaged or truncated one: {why}",
        where=where,
        remedy="Compare its size and checksum with the original's, and copy or download it again.",
    )


def _sparse(where: str, name: str) -> DataError:
    return DataError(
        f"member {name} is stored with its zeros left out",
        where=where,
        remedy="Write the archive without tar's --sparse; images are read in place.",
    )
