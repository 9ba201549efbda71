"""Files of torch.save: the zip archive, and the row of pickles before PyTorch 1.6. Both are checked, then loaded by torch."""

import io
import re
import struct
import warnings
import zipfile
from functools import partial
from typing import Any, BinaryIO

import torch

from msn_eval.checkpoints.formats.pickle_allowlist import STUBS
from msn_eval.checkpoints.formats.pickle_dry_run import dry_run_pickle
from msn_eval.errors import CheckpointError, printable

_MAX_PICKLE_BYTES = 128 << 20  # without the tensors; ViT-H with its optimiser takes 1 MB
_END_BYTES = 22  # of a zip's last record, which torch writes without a comment
_METHOD_OFFSET = 8  # of the compression method in a member's header
_SYMLINK = 0o120000
_UNSAFE_NAME = re.compile(r"\\|\0|(^|/)(\.{0,2})(/|$)")
_OTHER_ARCHIVES = {
    "constants.pkl": "a TorchScript archive, which is a program and not a state dict",
    "archive_format": "an exported program of torch.export (.pt2), not a state dict",
    ".npy": "a NumPy archive (.npz)",
}
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of a file before PyTorch 1.6
_COUNT_BYTES = 8  # before each storage of such a file
_TORCH_ADVICE = re.compile("weights_only|safe_globals|file an issue", re.IGNORECASE)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RESAVE = "torch.save does not write such archives. Fetch the file again, or save the state dict again."
_FETCH = "The file is damaged, truncated or of another kind; fetch it again."


def check_zip(file: BinaryIO, *, file_bytes: int, sha256: str) -> tuple[str, ...]:
    """Check an archive of torch.save, its checksums and its pickle, and return notes for the user."""
    file.seek(-min(_END_BYTES, file_bytes), io.SEEK_END)
    ends_with_directory = file.read(4) == b"PK\5\6"
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        top = _check_kind([entry.orig_filename for entry in entries])
        _check_members(entries, top, file_bytes if ends_with_directory else 0)
        has_checksums = any(entry.CRC for entry in entries)
        for entry in entries if not has_checksums else ():
            del entry.CRC  # so that zipfile does not compare it
        if (damaged := archive.testzip()) is not None:
            raise _damaged(f"the checksum of {printable(damaged)!r:.80} does not match")
        for entry in entries:
            file.seek(entry.header_offset + _METHOD_OFFSET)
            if file.read(2) != b"\0\0":
                raise zipfile.BadZipFile("method and header differ")  # which zipfile does not compare
        pickled = io.BytesIO(archive.open(f"{top}data.pkl").read(_MAX_PICKLE_BYTES))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, struct.error) as error:
        differs = "header" in str(error)
        what = "a zip archive whose members differ from" if differs else "truncated zip: no"
        raise CheckpointError(f"{what} central directory", hint=_RESAVE) from error
    _, storages, notes = dry_run_pickle(pickled, file_bytes=file_bytes, sha256=sha256)
    sizes = {entry.filename.removeprefix(top): entry.file_size for entry in entries}
    for key, storage_bytes in storages.items():
        if sizes.get(f"data/{key}") != storage_bytes:
            raise _damaged(f"storage {key!r:.80} should have {storage_bytes:,} bytes")
    return notes if has_checksums else ("its members carry no checksums", *notes)


def _check_kind(names: list[str]) -> str:
    """Return the top folder with its slash."""
    for mark, what in _OTHER_ARCHIVES.items():
        if any(name.endswith(mark) for name in names):
            raise CheckpointError(what, hint="Save the state_dict() of the module, with torch.save.")
    first = names[0] if names else ""
    top = f"{first.partition('/')[0]}/"
    if f"{top}data.pkl" not in names:
        what = f"a zip archive of something else (first member {printable(first)!r:.80})"
        raise CheckpointError(what, hint="If a checkpoint is in it, unpack it first; else fetch the file again.")
    return top


def _check_members(entries: list[zipfile.ZipInfo], top: str, file_bytes: int) -> None:
    names = [entry.orig_filename for entry in entries]
    problems = {
        "two members of one name": len({name.lower() for name in names}) < len(names),  # torch ignores case
        "unsafe names of members": any(not name.startswith(top) or _UNSAFE_NAME.search(name) for name in names),
        "symbolic links": any((entry.external_attr >> 16) & 0o170000 == _SYMLINK for entry in entries),
        "encrypted members": any(entry.flag_bits & 1 for entry in entries),
        "compressed members": any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries),
        "bytes before its first member": min(entry.header_offset for entry in entries) > 0,
        "bytes behind its directory": sum(entry.file_size for entry in entries) > file_bytes,
    }
    for problem, is_present in problems.items():
        if is_present:
            raise CheckpointError(f"a zip archive with {problem}", hint=_RESAVE)


def check_pickles(file: BinaryIO, *, file_bytes: int, sha256: str) -> tuple[str, ...]:
    """Check a file before PyTorch 1.6, and return notes for the user.

    It is a row of five pickles (a magic number, a version, facts of the system, the content, the keys of the storages)
    and the storages, each behind the count of its items.
    """
    file.seek(0)
    stream = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    dry_run = partial(dry_run_pickle, stream, file_bytes=file_bytes, sha256=sha256)
    if dry_run()[0] != _MAGIC or dry_run()[0] != _VERSION:
        hint = "Open it where it was made, and save its state dict with torch.save, best as .safetensors."
        raise CheckpointError("a pickle that torch.save did not write", hint=hint)
    _, (_, storages, notes), (keys, _, _) = dry_run(), dry_run(), dry_run()
    if not isinstance(keys, list) or set(keys) != storages.keys():
        raise _damaged("its list of storages is not that of its tensors")
    end = stream.tell() + sum(_COUNT_BYTES + storages[key] for key in keys)
    if end != file_bytes:
        raise _damaged(f"its weights should end at byte {end:,} and the file ends at {file_bytes:,}")
    return notes


def load_checked(file: BinaryIO) -> object:
    """Load a checked file with torch. Classes on the allowlist become stubs."""
    file.seek(0)
    stubs: list[Any] = [(stub, name) for name, stub in STUBS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stubs):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except MemoryError as error:
        raise CheckpointError("does not fit into memory", hint="Free memory, or use a larger host.") from error
    except Exception as error:  # RecursionError, struct.error and AssertionError among others
        reason = printable(_ANSI.sub("", str(error)).partition("\n")[0])[:160]
        raise _damaged("torch cannot load it" if _TORCH_ADVICE.search(reason) else reason) from error


def _damaged(reason: str) -> CheckpointError:
    return CheckpointError(f"cannot be read in full: {reason}", hint=_FETCH)
