"""Process group: the ranks of a job as torch.distributed knows them, for what must be summed over them at every step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from msn_eval.distributed.group import Group, barrier
from msn_eval.errors import DistributedError

_T = TypeVar("_T")
_groups_made = count()  # every rank makes the same ones in the same order
_TIMEOUT = timedelta(hours=1)  # the group's own line tells much sooner of a rank that is lost
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")


@contextmanager
def joined(group: Group, device: torch.device) -> Iterator[None]:
    """Have a process group inside: gloo on CPUs, NCCL on GPUs. For one rank alone, or where there is one, nothing is done.

    What the transport says of a rank that is gone becomes DistributedError, with what that rank told of itself.
    """
    if group.world == 1:
        yield
        return
    own = not distributed.is_initialized()
    try:
        if own:
            barrier(group, "process group")  # whoever is late is waited for without a limit
            distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=_own_store(group),
                rank=group.rank,
                world_size=group.world,
                timeout=_TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
        yield
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if not any(word in text.lower() for word in _LOST):
            raise
        barrier(group, "lost rank")  # which ends with what the lost one told
        raise DistributedError(
            f"rank {group.rank} has lost another rank: {text.partition(chr(10))[0][:300]}",
            remedy="See what the other ranks say.",
        ) from error
    finally:
        if own and distributed.is_initialized():
            distributed.destroy_process_group()


def _own_store(group: Group) -> "PrefixStore":
    """Give a place in the launcher's store where no earlier process group has left anything: ranks that met by what it left
    would wait for each other for ever."""
    assert group.line is not None
    place = group.line.place
    store = TCPStore(place.address, place.port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
    return PrefixStore(f"msn_eval_sums/{place.job}/{next(_groups_made)}", store)


def sum_over_ranks(group: Group, tensors: Sequence[Tensor]) -> None:
    """Put the sum over ranks into each tensor, all of one dtype and device, by one sum in their order: it adds the same numbers
    in the same order at every step."""
    if group.world == 1:
        return
    flat = torch.cat([one.reshape(-1) for one in tensors])
    distributed.all_reduce(flat)
    for one, part in zip(tensors, torch.split(flat, [one.numel() for one in tensors]), strict=True):
        one.copy_(part.view_as(one))


def rows_of_all_ranks(group: Group, rows: Tensor | None) -> Tensor:
    """Put the rows of all ranks below each other, in the order of ranks; each may have another number of them, None for none."""
    told: list[Tensor | None] = [rows]
    if group.world > 1:
        told = [None] * group.world
        distributed.all_gather_object(told, None if rows is None else rows.cpu())
    return torch.cat([one for one in told if one is not None])


def broadcast_from_first(group: Group, value: _T | None) -> _T:
    """Give the first rank's value on all ranks."""
    told: list[_T | None] = [value]
    if group.world > 1:
        distributed.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]
