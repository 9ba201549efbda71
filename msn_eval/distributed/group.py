"""Group: the ranks of one job, the rows that each of them processes, and the objects that they exchange.

Every job has one process group of torch: gloo for CPU tensors and Python objects, NCCL for CUDA tensors. A job of one rank
has none, and every function here then returns at once.
"""

import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
from torch import Tensor, distributed
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from msn_eval.distributed.failure_detector import FailureDetector, failure_of_peer, name_ranks
from msn_eval.distributed.rank_info import LAUNCHER_HOLDS_STORE, RankInfo, Timeouts, read_rank_info
from msn_eval.errors import DistributedError, exit_code_of
from msn_eval.process import terminate_with_parent

_T = TypeVar("_T")
_SHOWN = 6  # values in one message
_BIND_SECONDS = 5.0  # an earlier group of this process may still hold the port
# Every rank joins the same groups in the same order; the keys of an earlier one must not be read again.
_groups_joined = count()


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks of one job as one of them sees it.

    Attributes:
        rank: 0 to world - 1. Rank 0 alone prints and writes records.
        world: Number of ranks.
        local_rank: Number of this rank among those of its host, and of its GPU.
        host: Name of this host.
        device: Where this rank computes, if the job has decided that.
    """

    rank: int
    world: int
    local_rank: int = 0
    host: str = "localhost"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Group(rank=0, world=1)


def split_across_ranks(items: int, group: Group, *, block: int) -> range:
    """Return the rows of one rank: contiguous, in complete blocks; only the last block of all may be shorter.

    Over all ranks they are range(items). No rank has more than one block more than another.
    """
    blocks = -(-items // block)
    first, last = (blocks * edge // group.world for edge in (group.rank, group.rank + 1))
    return range(first * block, min(last * block, items))


@contextmanager
def join_group(*, environment: Mapping[str, str] | None = None, timeouts: Timeouts | None = None) -> Iterator[Group]:
    """Join the group that the launcher's environment describes; yield ALONE if it describes none.

    If another rank dies, fails or hangs, the body ends with DistributedError, with the exit code of that rank if it reported
    one. An exception that leaves the body is reported to the other ranks. The rank that holds the store leaves last.

    Raises:
        DistributedError: The environment is incomplete, the ranks do not meet, or a rank is lost.
    """
    info = read_rank_info(environment)
    if info is None:
        yield ALONE
        return
    timeouts = timeouts or Timeouts()
    if os.environ.get(LAUNCHER_HOLDS_STORE) == "True":
        terminate_with_parent()  # a shell that starts ranks itself may end before them; a launcher may not
    prefix = f"msn_eval/{info.attempt}/{next(_groups_joined)}"
    # Both stay open until the end: the first may hold the server.
    server, peers = _meet(info, timeouts, prefix)
    store = PrefixStore(prefix, server)

    def connect() -> Store:
        return PrefixStore(prefix, _connect(info, timeouts.collective_seconds))

    detector = FailureDetector(info, store, connect, peers=peers, timeouts=timeouts)
    detector.start()
    failure: BaseException | None = None
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo",
            store=PrefixStore("process_group", connect()),
            rank=info.rank,
            world_size=info.world,
            timeout=timedelta(seconds=timeouts.collective_seconds),
        )
        yield Group(rank=info.rank, world=info.world, local_rank=info.local_rank, host=info.host)
    except BaseException as error:
        failure = error
    try:
        final = detector.report_exit(failure)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        detector.close()
    if final is not None:
        raise final from (failure.__cause__ if final is failure else failure)


def _connect(info: RankInfo, seconds: float, *, serve: bool = False) -> TCPStore:
    options = {"is_master": serve, "wait_for_workers": False, "multi_tenant": True}
    return TCPStore(info.address, info.port, timeout=timedelta(seconds=seconds), **options)


def _meet(info: RankInfo, timeouts: Timeouts, prefix: str) -> tuple[TCPStore, list[dict[str, Any]]]:
    """Connect to the store and wait for all ranks; return the store, and host and process of every rank."""
    started = time.monotonic()
    deadline = started + timeouts.join_seconds
    waited = f"rank {info.rank} of {info.world} waited {timeouts.join_seconds:g} s at {info.endpoint}"
    hint = "Look for the first error of the missing ranks, and check MASTER_ADDR, MASTER_PORT and firewalls."
    own = json.dumps({"host": info.host, "process": os.getpid(), "holds_store": info.holds_store, "token": uuid4().hex})
    keys = [f"rank/{rank}" for rank in range(info.world)]
    while True:
        try:
            # Short attempts, so that SIGTERM is handled in between.
            left = max(1.0, min(2.0, deadline - time.monotonic()))
            if not info.holds_store:  # quieter than TCPStore, and interruptible
                socket.create_connection((info.address, info.port), timeout=left).close()
            server = _connect(info, left, serve=info.holds_store)
            store = PrefixStore(prefix, server)
            registered = store.compare_set(f"rank/{info.rank}", "", own).decode()
            if registered != own:
                other = json.loads(registered)
                raise DistributedError(
                    f"rank {info.rank} at {info.endpoint} is taken by process {other['process']} on {other['host']}",
                    hint="Two jobs use one address and port: choose another MASTER_PORT, or torchrun --standalone.",
                )
            store.set(f"beat/{info.rank}", "joined")
            while not store.check(keys):
                if time.monotonic() > deadline:
                    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
                    raise DistributedError(f"{waited} without {name_ranks(missing)}", hint=hint)
                time.sleep(min(0.05, timeouts.beat_seconds))
            return server, [json.loads(value) for value in store.multi_get(keys)]
        except (DistError, OSError) as error:
            reason = str(error).partition("\n")[0]
            if info.holds_store and time.monotonic() - started > min(_BIND_SECONDS, timeouts.join_seconds):
                raise DistributedError(
                    f"the store of the job could not be opened at {info.endpoint}: {reason}",
                    hint="Another job may use this port: choose another MASTER_PORT, or torchrun --standalone.",
                ) from error
            if time.monotonic() > deadline:
                raise DistributedError(f"{waited}, which was not reached: {reason}", hint=hint) from error
            time.sleep(0.1)


# Python objects. `name` says what is exchanged: ranks that exchange different things are an error, not a wrong value.


def all_gather_object(group: Group, name: str, value: _T) -> list[_T]:
    """Return the values of all ranks, in rank order.

    Raises:
        DistributedError: The ranks exchange different things.
    """
    if not _has_peers(group):
        return [value]
    received: list[Any] = [None] * group.world
    distributed.all_gather_object(received, (name, value))
    for rank, (other, _) in enumerate(received):
        _check_same(name, other, rank)
    return [sent for _, sent in received]


def _check_same(name: str, other: str, rank: int) -> None:
    if other != name:
        raise DistributedError(
            f"rank {rank} exchanges {other!r}, this rank {name!r}", hint="Start every rank with the same arguments."
        )


def broadcast_from_rank0(group: Group, name: str, make: Callable[[], _T]) -> _T:
    """Call `make` on rank 0 and return its result on all ranks; the other ranks wait.

    Raises:
        DistributedError: `make` failed on rank 0 (where its own error is raised), or the ranks exchange different things.
    """
    if not _has_peers(group):
        return make()
    message: list[Any] = [None]
    failure: Exception | None = None
    if group.rank == 0:
        try:
            message = [(name, make(), "", 0)]
        except Exception as error:
            failure = error
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            message = [(name, None, text, exit_code_of(error))]
    distributed.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    other, value, text, code = message[0]
    if text:
        raise failure_of_peer(f"rank 0: {text}", code)
    _check_same(name, other, 0)
    return cast(_T, value)


def barrier(group: Group, name: str) -> None:
    """Wait until every rank is here."""
    all_gather_object(group, name, None)


def check_equal_across_ranks(group: Group, subject: str, facts: Mapping[str, str]) -> None:
    """Check that every rank states the same facts about `subject`.

    Raises:
        DistributedError: On every rank; names the facts that differ, the ranks and their values.
    """
    hosts, stated = zip(*all_gather_object(group, subject, (group.host, dict(facts))), strict=True)
    lines = []
    for name in dict.fromkeys(name for own in stated for name in own):
        ranks_of: dict[str, list[int]] = defaultdict(list)
        for rank, own in enumerate(stated):
            ranks_of[own.get(name, "nothing")].append(rank)
        values = (
            f"{value} on {name_ranks(ranks)} ({', '.join(dict.fromkeys(hosts[rank] for rank in ranks[:_SHOWN]))})"
            for value, ranks in ranks_of.items()
        )
        if len(ranks_of) > 1:
            lines.append(f"  {name}: {'; '.join(values)}")
    if lines:
        raise DistributedError(
            "\n".join([f"the ranks do not agree on {subject}:", *lines[:_SHOWN]]),
            hint="Give every host the same files, options and versions.",
        )


def _has_peers(group: Group) -> bool:
    return group.world > 1 and distributed.is_initialized()


# Tensors.


def all_reduce_tensors(group: Group, tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over ranks.

    The tensors, all of one dtype and device, are added at once, in their order: the same numbers in the same order at every step.
    """
    if group.world == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
