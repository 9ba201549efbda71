"""Outline: tensors without values, of the shapes and types that a file says, and where in the file their values lie."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import torch
from torch import Tensor, nn

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
                f"cannot be read: {error.strerror or error}", where=where, hint="Check the path and its permissions."
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
    return CheckpointError("changed while it was being read", where=where, hint="Wait until it is written in full.")


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


Content: TypeAlias = "Tensor | int | float | str | dict[str, Content]"

_MOST_NODES = 1_000_000
_DEEPEST = 100
_SLACK_BYTES = 1 << 20
_SAVE_PLAINLY = "Save model.state_dict()."


def plain_content(
    loaded: object, *, file_bytes: int, where: str, device: Literal["cpu", "meta"] = "cpu"
) -> dict[str, Content]:
    """Give the string-keyed mappings, tensors and plain values of `loaded`; parameters as their values.

    file_bytes: the size of the file; its tensors may be twice as large, for those that share their bytes
    device:     where the tensors are; on meta they are outlines, without values
    Raises CheckpointError where `loaded` is no mapping, has no end, or holds a tensor that is more than its bytes.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds a {type(loaded).__name__}, not a state dict", where=where, hint=_SAVE_PLAINLY)
    content: dict[str, Content] = {}
    distinct: set[tuple[object, ...]] = set()
    waiting: list[tuple[Mapping[object, object], dict[str, Content], int]] = [(loaded, content, 1)]
    nodes = logical_bytes = 0
    while waiting:
        source, target, depth = waiting.pop()
        # What is shared counts every time it is met, so what comes out is a tree of bounded size, and no circle.
        nodes += len(source)
        if nodes > _MOST_NODES or depth > _DEEPEST:
            raise _endless(where)
        for name, value in source.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, Tensor):
                target[name] = tensor = _dense(value, name, where, device)
                identity = (storage_id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
                if (*identity, tensor.dtype) not in distinct:
                    distinct.add((*identity, tensor.dtype))
                    logical_bytes += tensor.numel() * tensor.element_size()
            elif isinstance(value, (bool, int, float, str)):
                target[name] = value
            elif isinstance(value, Mapping):
                inner: dict[str, Content] = {}
                target[name] = inner
                waiting.append((value, inner, depth + 1))
    if logical_bytes > 2 * file_bytes + _SLACK_BYTES:
        raise _expanded(f"tensors of {logical_bytes:,} bytes in a file of {file_bytes:,}", where)
    return content


def storage_id(tensor: Tensor) -> int:
    """Give what tensors that share their bytes have in common, while one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def _dense(tensor: Tensor, name: str, where: str, device: str) -> Tensor:
    """Give the values of a tensor that is dense, on its device, and no larger than its bytes."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise _not_dense(f"a {type(tensor).__name__}", name, where)
    if tensor.is_nested:
        raise _not_dense("nested", name, where)
    if tensor.layout != torch.strided:
        raise _not_dense(str(tensor.layout).removeprefix("torch."), name, where)
    if tensor.device.type != device:
        raise _not_dense(f"on the device {tensor.device.type}", name, where)
    if tensor.is_quantized:
        raise _not_dense("quantised", name, where)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise _expanded(f"tensor {name!r:.80} of {tensor.numel():,} values in fewer bytes", where)
    return tensor.detach()


def _not_dense(what: str, name: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"holds tensor {name!r:.80}, which is {what}",
        where=where,
        hint="Only dense tensors are read; save it with .to_dense().",
    )


def _expanded(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"holds {what}",
        where=where,
        hint="Expanded tensors are refused; where it was made, save them with .contiguous().",
    )


def _endless(where: str) -> CheckpointError:
    return CheckpointError(
        f"holds more than {_MOST_NODES:,} values, or values nested more than {_DEEPEST} deep",
        where=where,
        hint=_SAVE_PLAINLY,
    )
