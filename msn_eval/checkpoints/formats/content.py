"""What a checkpoint holds as plain data: tensors, numbers and texts by name. Everything else is left out."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from msn_eval.errors import CheckpointError

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
        raise CheckpointError(f"holds a {type(loaded).__name__}, not a state dict", where=where, remedy=_SAVE_PLAINLY)
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
        remedy="Only dense tensors are read; save it with .to_dense().",
    )


def _expanded(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"holds {what}",
        where=where,
        remedy="Expanded tensors are refused; where it was made, save them with .contiguous().",
    )


def _endless(where: str) -> CheckpointError:
    return CheckpointError(
        f"holds more than {_MOST_NODES:,} values, or values nested more than {_DEEPEST} deep",
        where=where,
        remedy=_SAVE_PLAINLY,
    )
