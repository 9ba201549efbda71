"""The safetensors format, read and written by its library."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from msn_eval.errors import CheckpointError, printable

_LENGTH_BYTES = 8  # at the start of a file: the length of its header
DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.bool, torch.complex64),
    )
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors into memory: if a mapped file shrinks, the process is killed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return dict(file.get_tensors())
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise _damaged(str(error), path) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return what the writer of a safetensors file states about it, beside its tensors. A name must not occur twice."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little"))
    try:
        entries = json.loads(header, object_pairs_hook=_check_unique)
        return {str(name): str(text) for name, text in entries.get("__metadata__", {}).items()}
    except (ValueError, RecursionError, AttributeError) as error:
        raise _damaged(str(error), path) from error


def _check_unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("its header has a name twice")
    return entries


def save_tensors(path: Path, tensors: Mapping[str, Tensor], stated: Mapping[str, str] | None = None) -> None:
    """Write tensors, and what is stated about them, to a file with the permissions of the umask.

    Raises:
        OSError: The disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Each in memory of its own: the format has neither views nor two names for one tensor.
    owned = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(owned, path, metadata={"format": "pt", **(stated or {})})
        with path.open("r+b") as file:
            header = file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little"))
            file.seek(_LENGTH_BYTES)
            file.write(sort_metadata(header))
        path.chmod(mode)  # the library lets only the owner read its files
    except SafetensorError as error:  # with the text of the disk's error
        raise OSError(str(error)) from error


def sort_metadata(header: bytes) -> bytes:
    """Return a file's header with sorted metadata, which the library writes in random order: equal weights must give equal
    files."""
    content = json.loads(header)
    stated = dict(sorted(content.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": stated, **content}, separators=(",", ":"), ensure_ascii=False)
    return text.encode().ljust(len(header))


def _damaged(reason: str, path: Path) -> CheckpointError:
    hint = "The file is damaged, truncated or of another kind; fetch it again."
    return CheckpointError(f"cannot be read in full: {printable(reason)[:200]}", where=str(path), hint=hint)
