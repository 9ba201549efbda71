"""Team: the ranks that share one piece of work. The first has the rows, gives each of the others its share, and leads."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, distributed

from msn_eval.distributed.group import Group, broadcast_from_rank0, joined, share
from msn_eval.errors import DistributedError, NumericalError, ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.probes.knn_search.index import check_finite, index_bank
from msn_eval.probes.knn_search.search import Found, search_sharded
from msn_eval.probes.logistic_solvers.newton import RowShare, minimise_in_chunks
from msn_eval.probes.logistic_solvers.objective import Solution

_SENT_ROWS = 1 << 14
_QUERIES = 1 << 13  # that travel at once: as many as a GPU searches for at once
_DONE = ""


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """The ranks of a group, each with a device to compute on."""

    group: Group
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """One fit, as the first rank tells the others."""

    name: ClassVar[str] = "fit"

    n: int
    width: int
    n_classes: int
    mus: tuple[float, ...]
    target: float


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One search for the k nearest of n rows to each of m queries, likewise."""

    name: ClassVar[str] = "search"

    n: int
    width: int
    m: int
    k: int


def minimise_together(
    team: WorkerGroup, whole: RowShare, mus: Sequence[float], *, target: float
) -> Iterator[tuple[Solution, int]]:
    """Call the others, who are in `assist`, to a fit, send them their rows, and solve with them as `minimise_in_chunks` does.

    whole: all rows, on the first rank
    """
    _call(team, _Fit(n=whole.n, width=whole.width, n_classes=whole.n_classes, mus=tuple(mus), target=target))
    with _at_work(team):
        _send_shares(team, whole.values, whole.labels)
        own = len(_rows_of(team, whole.n, 0))
        first = replace(whole, values=whole.values[:own], labels=whole.labels[:own], total=add_up)
        yield from minimise_in_chunks(first, mus, target=target)


def search_together(team: WorkerGroup, queries: Tensor, bank: Tensor, k: int) -> Found:
    """Call the others, who are in `assist`, to a search, send them their rows of the bank, and search with them.

    queries: (m, d) float32, m >= 1, on the first rank
    bank:    (n, d) float32, n >= k, likewise
    returns: on the first rank's device what `search_nearest` gives there, to the last bit
    Raises NumericalError for rows that are not finite, before anybody is called.
    """
    check_finite(bank, "labelled row")
    check_finite(queries, "query")
    search = _Search(n=len(bank), width=bank.shape[1], m=len(queries), k=k)
    _call(team, search)
    with _at_work(team):
        _send_shares(team, bank)
        parts = _searched(team, search, bank[: len(_rows_of(team, search.n, 0))].to(team.device), queries)
    cosines, rows = (torch.cat(column) for column in zip(*parts, strict=True))
    return cosines, rows


def serve(team: WorkerGroup) -> None:
    """Take part in what the first rank calls to, until it says that there is no more."""
    while told := broadcast_from_rank0(team.group, "work", lambda: _DONE):
        name, facts = json.loads(told)
        with _at_work(team):
            if name == _Search.name:
                _help_to_search(team, _Search(**facts))
            else:
                _help_to_fit(team, _Fit(**facts))


def shutdown(team: WorkerGroup) -> None:
    """Tell the others, on the first rank, that there is no more."""
    broadcast_from_rank0(team.group, "work", lambda: _DONE)


def add_up(sums: Tensor) -> None:
    """Add up over ranks; the first one's bits are everyone's, so that all take the same steps."""
    distributed.all_reduce(sums)
    distributed.broadcast(sums, 0)


def _call(team: WorkerGroup, work: _Fit | _Search) -> None:
    broadcast_from_rank0(team.group, "work", lambda: json.dumps([work.name, asdict(work)]))


@contextmanager
def _at_work(team: WorkerGroup) -> Iterator[None]:
    """Have a process group inside. What keeps one rank from going on ends the job: the others wait for it in a collective."""
    rank, device = team.group.rank, team.device
    with joined(team.group, device):
        try:
            yield
        except NumericalError as error:  # elsewhere that of one result
            raise DistributedError(f"rank {rank} cannot go on: {error.what}", hint=error.hint) from error
        except OUT_OF_MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(
                f"rank {rank}: memory of {device} is too small for its share: {str(error).partition(chr(10))[0]}",
                hint="Use more ranks, fewer of them on one host, or --device cpu.",
            ) from error


def _help_to_fit(team: WorkerGroup, fit: _Fit) -> None:
    rows = len(_rows_of(team, fit.n, team.group.rank))
    values = torch.empty(rows, fit.width, device=team.device)
    labels = torch.empty(rows, dtype=torch.int64, device=team.device)
    _receive_share(values, labels)
    own = RowShare(values=values, labels=labels, n_classes=fit.n_classes, n=fit.n, total=add_up)
    for _ in minimise_in_chunks(own, fit.mus, target=fit.target):
        pass


def _help_to_search(team: WorkerGroup, search: _Search) -> None:
    values = torch.empty(len(_rows_of(team, search.n, team.group.rank)), search.width, device=team.device)
    _receive_share(values)
    _searched(team, search, values, None)


def _searched(team: WorkerGroup, search: _Search, values: Tensor, queries: Tensor | None) -> list[Found]:
    """Search for the first rank's queries, which alone has some, a part of them at a time.

    values: this rank's rows of the bank
    """
    shard = index_bank(values) if len(values) else None
    first = _rows_of(team, search.n, team.group.rank).start
    nothing = values.new_empty(0, search.width)
    return [
        search_sharded(nothing if queries is None else queries[some].to(team.device), shard, first, search.k)
        for some in _pieces(range(search.m), _QUERIES)
    ]


def _send_shares(team: WorkerGroup, *whole: Tensor) -> None:
    """Send every other rank its rows of each tensor."""
    for rank in range(1, team.group.world):
        for some in _pieces(_rows_of(team, len(whole[0]), rank), _SENT_ROWS):
            for one in whole:
                distributed.send(one[some].to(team.device).contiguous(), rank)


def _receive_share(*share_of: Tensor) -> None:
    for some in _pieces(range(len(share_of[0])), _SENT_ROWS):
        for one in share_of:
            distributed.recv(one[some], 0)


def _rows_of(team: WorkerGroup, n: int, rank: int) -> range:
    return share(n, replace(team.group, rank=rank), block=1)


def _pieces(rows: range, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size))
