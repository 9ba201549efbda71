"""A file's content as plain data. Nothing from the file is run, and nothing is taken on trust."""

import hashlib
import io
import os
import re
import stat
import sys
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch

from msn_eval.checkpoints.formats.contents import Content, Outline, check_unchanged, make_outline, plain_content
from msn_eval.checkpoints.formats.pickle_allowlist import (
    MOST_PICKLE_BYTES,
    PickleScan,
    check_names,
    scan_pickle,
    stand_ins,
    too_large,
    vetted_names,
)
from msn_eval.checkpoints.formats.pickle_dry_run import Rehearsal, rehearse
from msn_eval.checkpoints.formats.safetensors import read_header, read_tensors
from msn_eval.checkpoints.formats.torch_zip import Archive, Member, read_archive
from msn_eval.errors import CheckpointError, printable

Container = Literal["zip", "pickle", "safetensors"]

_NOT_WEIGHTS = (
    (b"<", "a web page or XML, not weights", "The download went wrong; fetch the file again."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first (gunzip or tar -xzf)."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it first."),
    (b"BZh", "a bzip2 archive", "Unpack it first."),
    (b"\xfd7zXZ", "an xz archive", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it first."),
    (b"\x04\x22\x4d\x18", "an lz4 archive", "Unpack it first."),
    (b"Rar!\x1a\x07", "a RAR archive", "Unpack it first."),
    (b"PK\x05\x06", "an empty zip archive", "Fetch the file again, or save it again with torch.save."),
    (b"PK\x07\x08", "one part of a split zip archive", "Join its parts first."),
    (b"\x93NUMPY", "a NumPy array", "Give a PyTorch or safetensors file."),
    (b"\x89HDF", "an HDF5 file", "Convert it to a PyTorch state dict first."),
    (b"GGUF", "a GGUF file", "Give the PyTorch or safetensors file that it was made from."),
    (b"\x7fELF", "a program, not weights", "Give a PyTorch or safetensors file."),
    (b"\x89PNG", "an image, not weights", "Give a PyTorch or safetensors file."),
    (b"\xff\xd8\xff", "an image, not weights", "Give a PyTorch or safetensors file."),
    (b"%PDF", "a PDF document, not weights", "Give a PyTorch or safetensors file."),
    (b"#!", "a script, not weights", "Give a PyTorch or safetensors file."),
)
_LFS = b"version https://git-lfs"
_LFS_SIZE = re.compile(rb"\nsize (\d{1,18})\n")
_TAR_MAGIC_AT = 257
# Protobuf field 1 (a small version number) and then field 2, 3 or 7: the first fields of ONNX and of a SavedModel.
_PROTOBUF_MODEL = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x3a]")
# What protocols 0 and 1 begin with: a global, a marked container, or an empty container that is remembered.
_PICKLE_WITHOUT_VERSION = re.compile(rb"c[\w.]+\n[\w.]+\n|\((?:[dlt]|i[\w.]+\n|c[\w.]+\n|q)|[\]})](?:q|\.)")
_LONGEST_SAFETENSORS_HEADER = 1 << 40


def sniff_container(head: bytes) -> Container | tuple[str, str]:
    """Give the container that `head`, the first 512 bytes, announces, or what is wrong and what to do about it."""
    if not head:
        return "the file is empty", "The download or copy went wrong; fetch it again."
    if not head.strip(b"\0"):
        return "the file starts with zeros, as after a crash while writing", "Fetch it again."
    if head.startswith(_LFS):
        return _pointer(head), "Run `git lfs pull` where it came from."
    if _is_tar(head):
        return "a tar archive", "Unpack it first; a PyTorch checkpoint named .pth.tar is no tar archive."
    for magic, what, hint in _NOT_WEIGHTS:
        if head.startswith(magic):
            return what, hint
    return _known_container(head) or _unknown(head)


def _known_container(head: bytes) -> Container | None:
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_SAFETENSORS_HEADER:
        return "safetensors"
    if head[:1] == b"\x80" or _PICKLE_WITHOUT_VERSION.match(head):
        return "pickle"
    return None


def _unknown(head: bytes) -> tuple[str, str]:
    if _PROTOBUF_MODEL.match(head):
        return "an ONNX or TensorFlow model", "Give the PyTorch or safetensors file that it was made from."
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model", "Give the PyTorch or safetensors file that it was made from."
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON text, not weights", "Give the weight file itself; an index only names the files that hold them."
    return (
        f"no checkpoint format that is known (first bytes {head[:4].hex(' ')})",
        "Give a PyTorch or safetensors file.",
    )


def _pointer(head: bytes) -> str:
    size = _LFS_SIZE.search(head)
    of = f" of {int(size.group(1)):,} bytes" if size else ""
    return f"a git-lfs pointer, not the weights{of}"


def _is_tar(head: bytes) -> bool:
    """Tell a tar by its name or, as torch would, by a checksum that fits: a pickle can be written to be both."""
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(head.ljust(tarfile.BLOCKSIZE, b"\0"), "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError):
        return False
    return True


_OLDEST_TORCH = (2, 10)  # earlier ones have holes in weights_only loading (CVE-2025-32434, CVE-2026-24747)
_HEAD_BYTES = 512
_CHUNK_BYTES = 4 << 20
_LONGEST_SIDECAR = 4096
_SHA256 = re.compile(r"\b[0-9a-fA-F]{64}\b")
_ADVICE = re.compile("weights_only|safe_globals", re.IGNORECASE)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FETCH = "The file is damaged, truncated or of another kind; fetch it again."
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001
_OLD_COUNT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What was in a file.

    content:    its tensors and plain values by name
    sha256:     of its bytes
    container:  zip, pickle or safetensors
    file_bytes: its size
    notes:      what a reader of the result may want to know of the reading
    """

    content: Mapping[str, Content]
    sha256: str
    container: Container
    file_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A file that was found to be in order, before its tensors are made.

    plan:   what the pickle makes, or the tensors of a safetensors file
    starts: of the storages that the plan names, None where their values do not lie in the file as they are in memory
    """

    sha256: str
    container: Container
    notes: tuple[str, ...]
    plan: object
    starts: Mapping[str, int] | None


def read_weight_file(path: Path) -> WeightFile:
    """Read a PyTorch or safetensors file without running anything from it.

    Raises CheckpointError naming the file, what is wrong with it, and what to do.
    """
    where = str(path)
    with _checked(path, where) as (file, size, checked):
        if isinstance(checked.plan, tuple):
            loaded: object = read_tensors(file, checked.plan, where=where)
        else:
            loaded = _load(file, where)
    return _weight_file(path, size, checked, plain_content(loaded, file_bytes=size, where=where))


def read_weight_outline(path: Path) -> tuple[WeightFile, Outline]:
    """Read the same without the values: tensors are outlines on the meta device, and the second of the pair can read them.

    Raises CheckpointError as `read_weight_file` does.
    """
    where = str(path)
    with _checked(path, where) as (file, size, checked):
        status = os.fstat(file.fileno())
        if checked.starts is None:
            loaded: object = _load(file, where)
            outline = Outline(path=path, status=status, starts={})
            content = plain_content(loaded, file_bytes=size, where=where)
        else:
            loaded, starts = make_outline(checked.plan, checked.starts)
            outline = Outline(path=path, status=status, starts=starts)
            content = plain_content(loaded, file_bytes=size, where=where, device="meta")
    return _weight_file(path, size, checked, content), outline


def _weight_file(path: Path, size: int, checked: _Checked, content: dict[str, Content]) -> WeightFile:
    return WeightFile(
        content=content,
        sha256=checked.sha256,
        container=checked.container,
        file_bytes=size,
        notes=checked.notes + _checked_sidecar(path, checked.sha256, str(path)),
    )


@contextmanager
def _checked(path: Path, where: str) -> Iterator[tuple[BinaryIO, int, _Checked]]:
    """Open a file and check it; afterwards, that it was not changed meanwhile."""
    _check_torch()
    with _opened(path, where) as file:
        before = os.fstat(file.fileno())
        size = before.st_size
        container = sniff_container(file.read(_HEAD_BYTES))
        match container:
            case "zip":
                checked = _check_zip(file, size, where)
            case "pickle":
                checked = _check_old(file, size, where)
            case "safetensors":
                spans = read_header(file, size, where=where)
                starts = {span.name: span.start for span in spans}
                sha256 = _sha256(file, (), where)
                checked = _Checked(sha256=sha256, container=container, notes=(), plan=spans, starts=starts)
            case what, hint:
                raise CheckpointError(what, where=where, hint=hint)
        yield file, size, checked
        check_unchanged(before, os.fstat(file.fileno()), path.stat(), where=where)


@contextmanager
def _opened(path: Path, where: str) -> Iterator[BinaryIO]:
    """Open a regular file; a pipe or device is refused before reading it could wait or go on for ever."""
    try:
        _check_regular(path.stat().st_mode, where)
        # Were a pipe put in its place meanwhile, opening it without O_NONBLOCK would wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            _check_regular(os.fstat(file.fileno()).st_mode, where)
            yield file
    except FileNotFoundError:
        raise CheckpointError(
            "no such checkpoint file",
            where=where,
            hint="Give a file, or one of the schemes that `msn-eval ls checkpoints` lists.",
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}", where=where, hint="Check the path and its permissions."
        ) from error


def _check_regular(mode: int, where: str) -> None:
    if stat.S_ISDIR(mode):
        raise CheckpointError("is a folder, not a checkpoint file", where=where, hint="Name the file.")
    if not stat.S_ISREG(mode):
        raise CheckpointError("is a pipe, device or socket, not a checkpoint file", where=where, hint="Name the file.")


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        raise CheckpointError(
            f"torch {torch.__version__} does not load strangers' files safely", hint="Install torch 2.10 or newer."
        )


def _check_zip(file: BinaryIO, size: int, where: str) -> _Checked:
    archive = read_archive(file, size, where=where)
    pickled = archive.members["data.pkl"]
    if pickled.size > MOST_PICKLE_BYTES:
        raise too_large(where)
    sha256 = _sha256(file, tuple(archive.members.values()) if archive.has_checksums else (), where)
    file.seek(pickled.start)
    data = io.BytesIO(file.read(pickled.size))
    scan = scan_pickle(data, where=where)
    check_names(scan, sha256=sha256, where=where)
    data.seek(0)
    plan = rehearse(data, most_bytes=size, where=where)
    _check_storages(plan, archive, where)
    notes = () if archive.has_checksums else ("its members carry no checksums",)
    order = archive.members.get("byteorder")
    starts = {key: archive.members[f"data/{key}"].start for key in plan.storages}
    return _Checked(
        sha256=sha256,
        container="zip",
        notes=notes + _left_out(scan),
        plan=plan.value,
        starts=starts if order is None or _text(file, order) == sys.byteorder else None,
    )


def _text(file: BinaryIO, member: Member) -> str:
    file.seek(member.start)
    return file.read(min(member.size, _HEAD_BYTES)).decode("ascii", "replace")


def _check_storages(plan: Rehearsal, archive: Archive, where: str) -> None:
    for key, storage in plan.storages.items():
        member = archive.members.get(f"data/{key}")
        if member is None or member.size != storage.bytes:
            held = "no" if member is None else f"{member.size:,}"
            raise _damaged(f"storage {key!r:.80} should have {storage.bytes:,} bytes and has {held}", where)


def _check_old(file: BinaryIO, size: int, where: str) -> _Checked:
    """Check what torch.save wrote before 1.6: four pickles and a fifth with the keys of the storages that follow."""
    sha256 = _sha256(file, (), where)
    file.seek(0)
    scans = []
    plans = []
    for expected in (_OLD_MAGIC, _OLD_VERSION, None, None, None):
        start = file.tell()
        scans.append(scan_pickle(file, where=where))
        check_names(scans[-1], sha256=sha256, where=where)
        file.seek(start)
        plans.append(rehearse(file, most_bytes=size, where=where))
        if expected not in (None, plans[-1].value):
            raise CheckpointError(
                "a pickle that torch.save did not write",
                where=where,
                hint="Open it where it was made, and save its state dict with torch.save, best as .safetensors.",
            )
    return _Checked(
        sha256=sha256,
        container="pickle",
        notes=_left_out(scans[3]),
        plan=plans[3].value,
        starts=_old_starts(file, plans[3], plans[4].value, size, where),
    )


def _old_starts(file: BinaryIO, plan: Rehearsal, keys: object, size: int, where: str) -> dict[str, int]:
    """Give where the storages start, each behind the count of its items; they are those of the pickle and end with the file."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != plan.storages.keys():
        raise _damaged("its list of storages is not that of its tensors", where)
    at = file.tell()
    starts = {}
    for storage in (plan.storages[key] for key in keys):
        file.seek(at)
        count = int.from_bytes(file.read(_OLD_COUNT_BYTES), "little")
        if count * storage.dtype.itemsize != storage.bytes:
            raise _damaged(f"storage {storage.key!r:.80} does not have the size that its tensors need", where)
        starts[storage.key] = at + _OLD_COUNT_BYTES
        at = starts[storage.key] + storage.bytes
    if at != size:
        raise _damaged(f"its weights should end at byte {at:,} and it ends at {size:,}", where)
    return starts


def _load(file: BinaryIO, where: str) -> object:
    file.seek(0)
    try:
        with warnings.catch_warnings(), stand_ins():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except MemoryError as error:
        raise CheckpointError(
            "does not fit into memory", where=where, hint="Free memory, or use a larger host."
        ) from error
    except (
        Exception
    ) as error:  # the unpickler lets RecursionError, struct.error and AssertionError through, among others
        reason = printable(_ANSI.sub("", str(error)).partition("\n")[0])[:160]
        raise _damaged("torch cannot load it" if _ADVICE.search(reason) else reason, where) from error


def _sha256(file: BinaryIO, members: tuple[Member, ...], where: str) -> str:
    """Give the SHA-256 of the whole file, comparing the checksums of its members in the same pass."""
    digest = hashlib.sha256()
    waiting = iter(sorted(members, key=lambda member: member.start))
    member = next(waiting, None)
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    at = found = 0
    file.seek(0)
    while count := file.readinto(chunk):  # type: ignore[attr-defined]
        digest.update(chunk[:count])
        while member is not None and member.start < at + count:
            end = member.start + member.size
            found = zlib.crc32(chunk[max(member.start - at, 0) : min(end - at, count)], found)
            if end > at + count:
                break
            if found != member.crc32:
                raise CheckpointError(
                    f"is damaged: the checksum of {member.name!r:.80} does not match",
                    where=where,
                    hint="Fetch the file again.",
                )
            member, found = next(waiting, None), 0
        at += count
    return digest.hexdigest()


def _checked_sidecar(path: Path, sha256: str, where: str) -> tuple[str, ...]:
    """Compare with the hash in FILE.sha256, where there is one."""
    sidecar = path.with_name(path.name + ".sha256")
    if not os.path.isfile(sidecar) or sidecar.is_symlink():  # noqa: PTH113 - Path.is_file raises on too long names
        return ()
    try:
        with sidecar.open("rb") as file:
            stated = _SHA256.search(file.read(_LONGEST_SIDECAR).decode("ascii", "replace"))
    except OSError as error:
        raise CheckpointError(
            f"{sidecar.name} beside it cannot be read: {error.strerror or error}",
            where=where,
            hint="Check its permissions.",
        ) from error
    if stated is None:
        raise CheckpointError(
            f"{sidecar.name} beside it holds no SHA-256", where=where, hint="Fetch that file again, or remove it."
        )
    if stated.group().lower() != sha256:
        raise CheckpointError(
            f"is not the file that {sidecar.name} beside it describes\n  its SHA-256: {sha256}\n  described:   {stated.group()}",
            where=where,
            hint="The file is damaged or of another version; fetch both again.",
        )
    return (f"sha256 matches {sidecar.name}",)


def _left_out(scan: PickleScan) -> tuple[str, ...]:
    names = vetted_names(scan)
    return (f"left out: {', '.join(names)}",) if names else ()


def _damaged(reason: str, where: str) -> CheckpointError:
    return CheckpointError(f"cannot be read in full: {reason}", where=where, hint=_FETCH)
