"""Replica: the ranks' copies of one network, which are equal bit by bit as long as no hardware changes a number on its own."""

import socket
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from msn_eval.errors import DistributedError
from msn_pretrain.distributed.process_group import Ranks, gather

_SHOWN = 3


def check_replicas(ranks: Ranks, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Go on only if every rank holds the same tensors; all ranks must ask.

    step: that is finished, for the error
    Raises DistributedError naming the ranks that differ from most of them, their hosts, and the first tensors.
    """
    if ranks.world == 1:
        return
    told = gather(ranks, (socket.gethostname(), tuple(checksums(tensors).tolist())))
    usual, count = Counter(sums for _, sums in told).most_common(1)[0]
    if count == len(told):
        return
    other = [rank for rank, (_, sums) in enumerate(told) if sums != usual]
    differing = [
        name
        for place, name in enumerate(sorted(tensors))
        if any(told[rank][1][place] != usual[place] for rank in other)
    ]
    clear = 2 * count > len(told)
    named = other if clear else range(len(told))
    shown = ", ".join(f"rank {rank} on {told[rank][0]}" for rank in named)
    raise DistributedError(
        f"after step {step} {shown} {'holds' if clear and len(other) == 1 else 'hold'} other weights than "
        f"{'the rest' if clear else 'each other'}: {len(differing)} tensors, {', '.join(differing[:_SHOWN])}",
        remedy="Hardware that changes numbers on its own does this: leave that machine or GPU out, and start the same command.",
        kept="The last snapshot is kept; it was written after such a comparison.",
    )


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """Give one int64 a tensor, by their names' order: the sum of its bits as 32-bit integers, or as bytes where they are none.

    Integers are added, so the order of adding, and the device, changes nothing, and a bit that flips does.
    """
    return torch.stack([_checksum(tensors[name]) for name in sorted(tensors)]).cpu()


def _checksum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8).sum(dtype=torch.int64)
