"""The zip archive that torch.save writes, accounted for byte by byte before torch opens it."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from msn_eval.errors import CheckpointError, printable

_MOST_MEMBERS = 100_000
_LONGEST_NAME = 1024
_MOST_DIRECTORY_BYTES = _MOST_MEMBERS * (_LONGEST_NAME + 128)
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR_BYTES = (0, 12, 16, 20, 24)  # with or without a signature, with sizes of 4 or 8 bytes
_LONGEST_COMMENT = 0xFFFF
_SATURATED = 0xFFFFFFFF
_UNIX = 3
_LINK = 0o120000
_DRIVE = re.compile(r"^[A-Za-z]:")
_FETCH = "The file is damaged or truncated; fetch it again."
_RESAVE = "torch.save does not write such archives. Fetch the file again, or save the state dict anew."


@dataclass(frozen=True, kw_only=True)
class Member:
    """A member of the archive: its bytes lie at start to start + size, and crc32 is their checksum."""

    name: str
    start: int
    size: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The members by their names below the top folder, and whether the writer gave them checksums."""

    members: dict[str, Member]
    has_checksums: bool


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: bytes
    flags: int
    method: int
    crc32: int
    packed: int
    size: int
    made_by: int
    mode: int
    header: int


def read_archive(file: BinaryIO, file_bytes: int, *, where: str) -> Archive:
    """Read the directory of a zip file that torch.save wrote, and find every member where the directory says it is.

    Raises CheckpointError where the file is cut, another kind of zip, or not what torch.save writes.
    """
    directory_start, directory_bytes, count = _find_directory(file, file_bytes, where)
    file.seek(directory_start)
    entries = list(_entries(file.read(directory_bytes), count, where))
    names = [_checked_name(entry, where) for entry in entries]
    top = _check_kind(names, where)
    if len({name.lower() for name in names}) < len(names):  # torch finds members whatever their case
        raise _unlike_torch("two members of one name", where)
    members = [_locate(file, name, entry, where) for name, entry in zip(names, entries, strict=True)]
    _check_order(members, entries, directory_start, where)
    # set_crc32_options(False) writes zeros; a genuine checksum is zero once in four billion.
    has_checksums = any(member.crc32 for member in members)
    return Archive(members={member.name.removeprefix(top): member for member in members}, has_checksums=has_checksums)


def _find_directory(file: BinaryIO, file_bytes: int, where: str) -> tuple[int, int, int]:
    """Give start, bytes and entries of the directory, which must end where the records behind it begin."""
    if file_bytes < _END.size:
        raise _truncated(file_bytes, where)
    file.seek(file_bytes - _END.size)
    magic, disk, first_disk, here, count, size, start, comment = _END.unpack(file.read(_END.size))
    if magic != b"PK\5\6" or comment:
        file.seek(max(0, file_bytes - _LONGEST_COMMENT - _END.size))
        if b"PK\5\6" in file.read():
            raise _unlike_torch("bytes behind its directory", where)
        raise _truncated(file_bytes, where)
    end = file_bytes - _END.size
    if end >= _LOCATOR64.size + _END64.size:
        file.seek(end - _LOCATOR64.size)
        magic64, disk64, end64, disks = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
        if magic64 == b"PK\6\7":
            end -= _LOCATOR64.size + _END64.size
            if end64 != end or disk64 or disks > 1:
                raise _unlike_torch("a directory that is not where it should be", where)
            file.seek(end)
            large = _END64.unpack(file.read(_END64.size))
            for small, wide, limit in (
                (count, large[7], 0xFFFF),
                (size, large[8], _SATURATED),
                (start, large[9], _SATURATED),
            ):
                if small not in (limit, wide):
                    raise _unlike_torch("two directories", where)
            if large[0] != b"PK\6\6" or large[1] != _END64.size - 12 or large[4] or large[5] or large[6] != large[7]:
                raise _unlike_torch("a damaged directory", where)
            count, size, start, here = large[7], large[8], large[9], count
    if disk or first_disk or here not in (count, 0xFFFF) or start + size != end:
        raise _unlike_torch("a directory that is not where it should be", where)
    if count > _MOST_MEMBERS or size > _MOST_DIRECTORY_BYTES:
        raise _unlike_torch(f"more than {_MOST_MEMBERS:,} members", where)
    return start, size, count


def _entries(directory: bytes, count: int, where: str) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(directory):
            raise _unlike_torch("a damaged directory", where)
        fields = _ENTRY.unpack_from(directory, at)
        magic, made_by, _, flags, method, _, _, crc32, packed, size, name_bytes, extra_bytes, note_bytes = fields[:13]
        disk, mode, header = fields[13], fields[15], fields[16]
        name_at = at + _ENTRY.size
        extra_at = name_at + name_bytes
        at = extra_at + extra_bytes + note_bytes
        if magic != b"PK\1\2" or at > len(directory) or disk or name_bytes > _LONGEST_NAME:
            raise _unlike_torch("a damaged directory", where)
        size, packed, header = _widened(directory[extra_at : extra_at + extra_bytes], (size, packed, header), where)
        yield _Entry(
            name=directory[name_at:extra_at],
            flags=flags,
            method=method,
            crc32=crc32,
            packed=packed,
            size=size,
            made_by=made_by >> 8,
            mode=mode >> 16,
            header=header,
        )
    if at != len(directory):
        raise _unlike_torch("a damaged directory", where)


def _widened(extra: bytes, numbers: tuple[int, int, int], where: str) -> tuple[int, int, int]:
    """Replace the numbers that do not fit 32 bits by those of the zip64 field."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + size]
            break
        at += 4 + size
    if len(wide) < 8 * numbers.count(_SATURATED):
        raise _unlike_torch("a damaged directory", where)
    values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    size, packed, header = (next(values) if number == _SATURATED else number for number in numbers)
    return size, packed, header


def _checked_name(entry: _Entry, where: str) -> str:
    name = entry.name.decode("utf-8", "surrogateescape")
    parts = name.split("/")
    if "\\" in name or "\0" in name or _DRIVE.match(name) or any(part in ("", ".", "..") for part in parts):
        raise _unlike_torch(f"a member named {printable(name)!r:.80}", where)
    if entry.made_by == _UNIX and entry.mode & 0o170000 == _LINK:
        raise _unlike_torch("a symbolic link", where)
    if entry.flags & 0x2041:
        raise _unlike_torch("encrypted members", where)
    return name


def _check_kind(names: list[str], where: str) -> str:
    """Give the top folder with its slash. Raises CheckpointError with words of its own for other kinds of zip."""
    if not names:
        raise CheckpointError("an empty zip archive", where=where, hint=_FETCH)
    top = names[0].partition("/")[0] + "/"
    below = {name.removeprefix(top) for name in names if name.startswith(top)}
    if "constants.pkl" in below or any(name.startswith("code/") for name in below):
        raise CheckpointError(
            "a TorchScript archive, which is a program and not a state dict",
            where=where,
            hint="Save the state_dict() of the module it came from.",
        )
    if below & {"archive_format", "archive_version", "serialized_exported_program.json"} or "archive_version" in names:
        raise CheckpointError(
            "an exported program of torch.export (.pt2), not a state dict",
            where=where,
            hint="Save the state_dict() of the module it came from.",
        )
    if all(name.endswith(".npy") for name in names):
        raise CheckpointError("a NumPy archive (.npz)", where=where, hint="Give a PyTorch or safetensors file.")
    if {"config.json", "metadata.json"} <= set(names) or "model.weights.h5" in names:
        raise CheckpointError("a Keras model", where=where, hint="Convert it to a PyTorch state dict first.")
    if top + "data.pkl" not in names:
        raise CheckpointError(
            f"a zip archive of something else (first member {printable(names[0])!r:.80})",
            where=where,
            hint="If a checkpoint is in it, unpack it first; else fetch the file again.",
        )
    if len(below) < len(set(names)):
        raise _unlike_torch("members outside its one folder", where)
    return top


def _locate(file: BinaryIO, name: str, entry: _Entry, where: str) -> Member:
    if entry.method or entry.packed != entry.size:
        raise _unlike_torch("compressed members", where)
    file.seek(entry.header)
    head = file.read(_LOCAL.size + len(entry.name))
    if len(head) < _LOCAL.size + len(entry.name):
        raise _unlike_torch("members that are not where they should be", where)
    magic, _, flags, method, _, _, crc32, packed, size, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
    # Where a descriptor follows the data, the numbers are there and those of the header are 0.
    agrees = size in (entry.size, _SATURATED) and packed in (entry.size, _SATURATED) and crc32 == entry.crc32
    if (
        magic != b"PK\3\4"
        or method
        or flags != entry.flags
        or head[_LOCAL.size :] != entry.name
        or name_bytes != len(entry.name)
        or not (agrees or (flags & 8 and not size and not packed and not crc32))
    ):
        raise _unlike_torch("members that differ from their directory", where)
    start = entry.header + len(head) + extra_bytes
    return Member(name=name, start=start, size=entry.size, crc32=entry.crc32)


def _check_order(members: list[Member], entries: list[_Entry], directory_start: int, where: str) -> None:
    """Check that the members fill the file from its first byte to its directory, each byte belonging to one."""
    spans = sorted((entry.header, member.start + member.size) for member, entry in zip(members, entries, strict=True))
    if spans[0][0] != 0:
        raise _unlike_torch("bytes before its first member", where)
    for (_, end), (following, _) in pairwise([*spans, (directory_start, directory_start)]):
        if following - end not in _DESCRIPTOR_BYTES:
            raise _unlike_torch("members that overlap or leave gaps", where)


def _truncated(file_bytes: int, where: str) -> CheckpointError:
    return CheckpointError(f"truncated zip: no central directory, {file_bytes:,} bytes", where=where, hint=_FETCH)


def _unlike_torch(what: str, where: str) -> CheckpointError:
    return CheckpointError(f"a zip archive with {what}", where=where, hint=_RESAVE)
