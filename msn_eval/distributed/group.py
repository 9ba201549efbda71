"""Group: the processes of one job, the share of each, and that none waits for one that is gone.

No tensor travels between ranks: each writes the features of its share to the cache that all of them read. So they only
have to agree, to wait for each other and to notice each other's end. The key-value store by which launchers let ranks
meet is enough for that, beside any backend, and no call here can hang in a collective.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from msn_eval.distributed.job import Line
from msn_eval.distributed.peers import SHOWN, Limits, read_place
from msn_eval.errors import DistributedError


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks of one job as one of them sees it.

    rank:       0 to world - 1; rank 0 alone prints and writes records
    local_rank: among the ranks of this host: the number of its GPU
    line:       to the other ranks; None where there are none
    """

    rank: int
    world: int
    local_rank: int
    host: str
    line: Line | None = field(default=None, repr=False)


ALONE = Group(rank=0, world=1, local_rank=0, host="localhost")


def share(items: int, group: Group, *, block: int) -> range:
    """Give the rows that one rank does: contiguous, nothing twice, in whole blocks of which only the last may be short.

    Over all ranks they are range(items), and no rank has over one block more than another.
    """
    blocks = -(-items // block)
    first, last = (blocks * edge // group.world for edge in (group.rank, group.rank + 1))
    return range(first * block, min(last * block, items))


@contextmanager
def join_group(*, environment: Mapping[str, str] | None = None, limits: Limits | None = None) -> Iterator[Group]:
    """Give the group that the launcher's environment names; a group of one where it names none.

    Inside, the death or silence of another rank ends the body with DistributedError, whose exit code is the one that the
    other rank posted, if it posted one. An exception that leaves the body is told to the others; of several ranks with the
    same fault, the lowest keeps its error and the rest leave with a line. An orderly end is told too, and a rank that
    holds the store waits for the others.
    Raises DistributedError where the environment is incomplete or the ranks do not meet.
    """
    place = read_place(os.environ if environment is None else environment)
    if place is None:
        yield ALONE
        return
    line = Line(place, limits or Limits())
    with line.open():
        yield Group(rank=place.rank, world=place.world, local_rank=place.local_rank, host=place.host, line=line)


def check_equal_across_ranks(group: Group, what: str, facts: Mapping[str, str]) -> None:
    """Go on only if every rank states the same facts.

    what: whose facts they are, for people
    Raises DistributedError on every rank, naming the facts that differ, the ranks and what each says.
    """
    if group.line is None:
        return
    told = [json.loads(facts_of) for facts_of in group.line.exchange("agreement", what, json.dumps(dict(facts)))]
    names = list(dict.fromkeys(name for one in told for name in one))
    differing = [name for name in names if any(one.get(name) != told[0].get(name) for one in told)]
    if not differing:
        return
    lines = []
    for name in differing[:SHOWN]:
        sayings: dict[str | None, list[int]] = defaultdict(list)
        for rank, one in enumerate(told):
            sayings[one.get(name)].append(rank)
        said = (
            f"{'nothing' if value is None else value} on {group.line.others.names(ranks)}"
            for value, ranks in sayings.items()
        )
        lines.append(f"  {name}: {'; '.join(said)}")
    if len(differing) > SHOWN:
        lines.append(f"  and {len(differing) - SHOWN} more")
    raise DistributedError(
        "\n".join([f"the ranks do not agree on {what}:", *lines]),
        hint="Give every host the same files, options and versions.",
    )


def barrier(group: Group, name: str) -> None:
    """Wait until every rank is here. Raises DistributedError where one of them will not come."""
    if group.line is not None:
        group.line.exchange("barrier", name, "")


def all_gather_object(group: Group, name: str, value: str) -> list[str]:
    """Give what every rank says, in the order of the ranks. Raises DistributedError where one of them is lost."""
    return [value] if group.line is None else group.line.exchange("gathering", name, value)


def broadcast_from_rank0(group: Group, name: str, make: Callable[[], str]) -> str:
    """Give what rank 0 makes; the others wait for it. Raises DistributedError where rank 0 is lost."""
    if group.line is None:
        return make()
    return group.line.follow(name, make)


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
            hint="See what the other ranks say.",
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
