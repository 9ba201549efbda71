"""Outline: tensors without values, of the shapes and types that a file says, and where in the file their values lie."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from msn_eval.checkpoints.formats.content import storage_id
from msn_eval.checkpoints.formats.pickle_dry_run import Extent, Made, Storage
from msn_eval.checkpoints.formats.safetensors import TensorSpan
from msn_eval.errors import CheckpointError

_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A file whose values were left where they are.

    status: of the file when it was checked
    starts: of the bytes behind a tensor's storage, by `storage_id`
    """

    path: Path
    status: os.stat_result
    starts: Mapping[int, int]

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether the values of a tensor lie in this file."""
        return tensor.device.type == "meta" and storage_id(tensor) in self.starts

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """Give the values of a tensor that it holds, flat and piece by piece, in memory of their own.

        Raises CheckpointError where the file is no longer what was checked.
        """
        where = str(self.path)
        item_bytes = tensor.element_size()
        at = self.starts[storage_id(tensor)] + int(tensor.storage_offset()) * item_bytes
        try:
            with self.path.open("rb") as file:
                check_unchanged(self.status, os.fstat(file.fileno()), where=where)
                file.seek(at)
                if tensor.is_contiguous():
                    for left in range(tensor.numel() * item_bytes, 0, -_CHUNK_BYTES):
                        yield _values(file, min(left, _CHUNK_BYTES), tensor.dtype, where)
                elif tensor.numel():
                    extent = 1 + sum((one - 1) * step for one, step in zip(tensor.shape, tensor.stride(), strict=True))
                    values = _values(file, extent * item_bytes, tensor.dtype, where)
                    yield values.as_strided(tensor.shape, tensor.stride()).reshape(-1)
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", where=where, remedy="Check the path and its permissions."
            ) from error


def _values(file: BinaryIO, count: int, dtype: torch.dtype, where: str) -> Tensor:
    content = bytearray(count)
    if file.readinto(content) != count:  # type: ignore[attr-defined]
        raise _changed(where)
    return torch.frombuffer(content, dtype=dtype)


def check_unchanged(before: os.stat_result, *after: os.stat_result, where: str) -> None:
    """Raise CheckpointError where a file has another size, date or place than when it was opened."""
    for one in after:
        if any(getattr(one, fact) != getattr(before, fact) for fact in ("st_size", "st_mtime_ns", "st_ino", "st_dev")):
            raise _changed(where)


def _changed(where: str) -> CheckpointError:
    return CheckpointError("changed while it was being read", where=where, remedy="Wait until it is written in full.")


def make_outline(plan: object, starts: Mapping[str, int]) -> tuple[object, dict[int, int]]:
    """Make what a plan plans, with tensors on the meta device, and give the start of each of their storages.

    plan:   what a pickle was rehearsed to give, or the tensors of a safetensors file
    starts: of the plan's storages in the file, by their keys
    """
    if isinstance(plan, tuple):
        tensors = {
            span.name: torch.empty(span.shape, dtype=span.dtype, device="meta") for span in plan if _is_span(span)
        }
        return tensors, {storage_id(tensor): starts[name] for name, tensor in tensors.items()}
    storages: dict[Storage, torch.UntypedStorage] = {}
    made: dict[int, dict[str, object]] = {}
    loaded = _filled(plan, made, storages)
    waiting = [plan]
    while waiting:
        mapping = waiting.pop()
        if not isinstance(mapping, Made) or not mapping.named:
            continue
        target = made[id(mapping)]
        if target:  # met before
            continue
        for name, value in mapping.named.items():
            target[name] = _filled(value, made, storages)
            waiting.append(value)
    return loaded, {int(made_of._cdata): starts[one.key] + one.start for one, made_of in storages.items()}


def _is_span(span: object) -> bool:
    return isinstance(span, TensorSpan)


def _filled(value: object, made: dict[int, dict[str, object]], storages: dict[Storage, torch.UntypedStorage]) -> object:
    """Give a plain value as it is, an outline for a tensor, and for a dict the one to be filled, whenever it is met."""
    if not isinstance(value, Made):
        return value
    if value.extent is not None:
        return _outlined(value.extent, storages)
    return made.setdefault(id(value), {}) if _is_dict(value) else value


def _is_dict(value: Made) -> bool:
    return value.kind in ("dict", "collections.OrderedDict", "collections.Counter")


def _outlined(extent: Extent, storages: dict[Storage, torch.UntypedStorage]) -> Tensor:
    storage = storages.get(extent.storage)
    if storage is None:
        storages[extent.storage] = storage = torch.UntypedStorage(extent.storage.bytes, device="meta")  # type: ignore[no-untyped-call]
    blank = torch.empty(0, dtype=extent.dtype, device="meta")
    return blank.set_(storage, extent.offset, extent.size, extent.stride)
