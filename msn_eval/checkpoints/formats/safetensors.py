"""The safetensors format: a JSON header that must fit its file exactly, and tensors read straight into their memory."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from msn_eval.errors import CheckpointError, printable

_MOST_HEADER_BYTES = 64 << 20
_MOST_TENSORS = 1_000_000
_MOST_DIMENSIONS = 64
_LENGTH_BYTES = 8
_WIDEST_BYTES = 16  # of a value; strides are computed for tensors of no values too
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True, kw_only=True)
class TensorSpan:
    """A tensor of the file: its bytes lie at start to start + size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(file: BinaryIO, file_bytes: int, *, where: str) -> tuple[TensorSpan, ...]:
    """Read the header of a safetensors file whose tensors cover the rest of it, in the order of their bytes.

    Raises CheckpointError where the header is none, says something twice, or does not fit the file.
    """
    file.seek(0)
    size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    data_start = _LENGTH_BYTES + size
    if data_start > file_bytes or size > _MOST_HEADER_BYTES:
        raise _misfit(f"a header of {size:,} bytes, in a file of {file_bytes:,}", where)
    entries = _parsed(file.read(size), where)
    if len(entries) > _MOST_TENSORS:
        raise _misfit(f"more than {_MOST_TENSORS:,} tensors", where)
    spans = sorted(
        (_span(name, entry, data_start, where) for name, entry in entries.items() if name != "__metadata__"),
        key=lambda span: (span.start, span.size),
    )
    _check_metadata(entries.get("__metadata__", {}), where)
    end = data_start
    for span in spans:
        if span.start != end:
            raise _misfit(f"tensor {_quoted(span.name)} overlapping another or leaving a gap", where)
        end += span.size
    if end != file_bytes:
        raise CheckpointError(
            f"cannot be read in full: its tensors end at byte {end:,}, the file at {file_bytes:,}",
            where=where,
            hint="The file is truncated or damaged; fetch it again.",
        )
    return tuple(spans)


def read_metadata(path: Path) -> dict[str, str]:
    """Give what the writer of a safetensors file says about it, beside its tensors.

    Raises CheckpointError as `read_header` does.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        metadata = _parsed(file.read(min(size, _MOST_HEADER_BYTES)), str(path)).get("__metadata__", {})
    _check_metadata(metadata, str(path))
    return cast("dict[str, str]", metadata)


def read_tensors(file: BinaryIO, spans: tuple[TensorSpan, ...], *, where: str) -> dict[str, Tensor]:
    """Read every tensor into memory of its own: a mapped file that shrinks would kill the process."""
    return {span.name: _read_tensor(file, span, where) for span in spans}


def _read_tensor(file: BinaryIO, span: TensorSpan, where: str) -> Tensor:
    tensor = torch.empty(span.shape, dtype=span.dtype)
    # NumPy has no bfloat16 and no float8, but every tensor is bytes.
    view = tensor.reshape(-1).view(torch.uint8).numpy().data if span.size else memoryview(b"")
    file.seek(span.start)
    done = 0
    while done < span.size:
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise _misfit("an end that came while it was being read", where)
        done += count
    return tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, readable to whom the umask lets. Raises OSError where the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Each in memory of its own: the format knows no views, and no two names for one tensor.
    owned = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(owned, path, metadata={"format": "pt"})
        path.chmod(mode)  # as of every other file of the user's: the library lets nobody else read its own
    except SafetensorError as error:  # what the disk said, as the library tells it
        raise OSError(str(error)) from error


class _TwiceError(ValueError):
    pass


def _parsed(header: bytes, where: str) -> dict[str, object]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except _TwiceError as error:
        raise _misfit(f"the name {_quoted(str(error))} twice", where) from error
    except (ValueError, RecursionError) as error:
        raise _misfit("a header that is no JSON", where) from error
    if not isinstance(entries, dict):
        raise _misfit("a header that is no JSON object", where)
    return entries


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
    return entries


def _no_number(text: str) -> object:
    raise ValueError(text)


def _check_metadata(metadata: object, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _misfit("metadata that is no text", where)


def _span(name: str, entry: object, data_start: int, where: str) -> TensorSpan:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if not rest:
            sizes = tuple(_counts(shape))
            first, last = (*_counts([start, end]), -1, -1)[:2]
        case _:
            raise _misfit(f"tensor {_quoted(name)} without its type, shape and place", where)
    if dtype not in DTYPES:
        raise CheckpointError(
            f"holds tensor {_quoted(name)} of type {_quoted(dtype)}, which is not known",
            where=where,
            hint=f"Save it as one of {', '.join(DTYPES)}.",
        )
    size = math.prod(sizes) * DTYPES[dtype].itemsize if len(sizes) == len(shape) <= _MOST_DIMENSIONS else -1
    if first < 0 or size != last - first or math.prod(max(1, one) for one in sizes) * _WIDEST_BYTES >= 1 << 63:
        raise _misfit(f"tensor {_quoted(name)} whose shape does not fit its bytes", where)
    return TensorSpan(name=name, dtype=DTYPES[dtype], shape=sizes, start=data_start + first, size=size)


def _counts(numbers: list[object]) -> Iterator[int]:
    """Give those that are counts; JSON's true and 1.0 are none."""
    return (number for number in numbers if type(number) is int and 0 <= number < 1 << 63)


def _quoted(text: str) -> str:
    return f"{printable(text)!r:.80}"


def _misfit(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"a safetensors file with {what}", where=where, hint="The file is damaged or of another kind; fetch it again."
    )
