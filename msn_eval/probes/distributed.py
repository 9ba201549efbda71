"""Worker group: ranks that share one fit or one search. Rank 0 has the rows, sends each other rank its share, and leads."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, distributed

from msn_eval.distributed.group import broadcast_from_rank0, split_across_ranks
from msn_eval.errors import DistributedError, NumericalError, ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.probes.base import WorkerGroup
from msn_eval.probes.knn_search import Neighbours, Search, check_finite, index_rows, merge_nearest, search_nearest
from msn_eval.probes.logistic_solvers.newton import RowShare, minimise_in_chunks
from msn_eval.probes.logistic_solvers.objective import Solution

_SENT_ROWS = 1 << 14
_QUERIES = 1 << 13  # sent at once: as many as a GPU searches for at once
_SHUTDOWN = ""


def minimise_on_workers(
    workers: WorkerGroup, rows: RowShare, mus: Sequence[float], *, target: float
) -> Iterator[tuple[Solution, int]]:
    """Minimise as `minimise_in_chunks` does, on rank 0, with the rows shared among all ranks.

    Args:
        workers: The ranks.
        rows: All rows.
        mus: Penalties, as `minimise_in_chunks` takes them.
        target: Relative duality gap to reach.

    Yields:
        The solution and its number of steps for each penalty.
    """
    fit = {"n": rows.n, "width": rows.width, "n_classes": rows.n_classes, "mus": list(mus), "target": target}
    with _lead(workers, "fit", **fit):
        _send_shares(workers, rows.values, rows.labels)
        own = len(_rows_of(workers, rows.n, 0))
        first = replace(rows, values=rows.values[:own], labels=rows.labels[:own], total=add_up)
        yield from minimise_in_chunks(first, mus, target=target)


def search_on_workers(workers: WorkerGroup, queries: Tensor, bank: Tensor, k: int, by: Search = "auto") -> Neighbours:
    """Search for the k nearest rows, on rank 0, with the rows shared among all ranks.

    Args:
        workers: The ranks.
        queries: (m, d) float32, m >= 1.
        bank: (n, d) float32, n >= k.
        k: Number of neighbours.
        by: Who proposes candidates, as `search_nearest` takes it.

    Returns:
        On rank 0's device what `search_nearest` returns, to the last bit.

    Raises:
        NumericalError: A row is not finite; no other rank takes part then.
    """
    check_finite(bank, "labelled row")
    check_finite(queries, "query")
    (n, width), m = bank.shape, len(queries)
    with _lead(workers, "search", n=n, width=width, m=m, k=k, by=by):
        _send_shares(workers, bank)
        own = bank[: len(_rows_of(workers, n, 0))].to(workers.device)
        chunks = _search_shard(workers, own, queries, n=n, m=m, k=k, by=by)
    cosines, rows = (torch.cat(column) for column in zip(*chunks, strict=True))
    return cosines, rows


def serve(workers: WorkerGroup) -> None:
    """Take part in the fits and searches of rank 0, until it shuts the group down."""
    while message := broadcast_from_rank0(workers.group, "work", lambda: _SHUTDOWN):
        work, arguments = json.loads(message)
        with _connect(workers):
            if work == "fit":
                _serve_fit(workers, **arguments)
            else:
                _serve_search(workers, **arguments)


def shutdown(workers: WorkerGroup) -> None:
    """End `serve` on the other ranks. Rank 0 calls it."""
    broadcast_from_rank0(workers.group, "work", lambda: _SHUTDOWN)


def add_up(sums: Tensor) -> None:
    """Sum a tensor over ranks, in place. All ranks get the bits of rank 0, so that all take the same steps."""
    distributed.all_reduce(sums)
    distributed.broadcast(sums, 0)


@contextmanager
def _lead(workers: WorkerGroup, work: str, **arguments: object) -> Iterator[None]:
    """Make the other ranks serve some work, "fit" or "search", which the block leads."""
    broadcast_from_rank0(workers.group, "work", lambda: json.dumps([work, arguments]))
    with _connect(workers):
        yield


@contextmanager
def _connect(workers: WorkerGroup) -> Iterator[None]:
    """Join a process group for the block. An error of one rank ends the job, since the others wait in a collective."""
    rank, device = workers.group.rank, workers.device
    try:
        yield
    except NumericalError as error:  # outside of a worker group it would fail one result only
        raise DistributedError(f"rank {rank} cannot go on: {error.what}", hint=error.hint) from error
    except OUT_OF_MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"rank {rank}: memory of {device} is too small for its share: {str(error).partition(chr(10))[0]}",
            hint="Use more ranks, fewer of them on one host, or --device cpu.",
        ) from error


def _serve_fit(
    workers: WorkerGroup, *, n: int, width: int, n_classes: int, mus: Sequence[float], target: float
) -> None:
    rows = len(_rows_of(workers, n, workers.group.rank))
    values = torch.empty(rows, width, device=workers.device)
    labels = torch.empty(rows, dtype=torch.int64, device=workers.device)
    _receive_share(values, labels)
    own = RowShare(values=values, labels=labels, n_classes=n_classes, n=n, total=add_up)
    for _ in minimise_in_chunks(own, mus, target=target):
        pass


def _serve_search(workers: WorkerGroup, *, n: int, width: int, m: int, k: int, by: Search) -> None:
    values = torch.empty(len(_rows_of(workers, n, workers.group.rank)), width, device=workers.device)
    _receive_share(values)
    _search_shard(workers, values, values.new_empty(0, width), n=n, m=m, k=k, by=by)


def _search_shard(
    workers: WorkerGroup, values: Tensor, queries: Tensor, *, n: int, m: int, k: int, by: Search
) -> list[Neighbours]:
    """Search for rank 0's queries in chunks, and return what it finds of each, on rank 0.

    Args:
        workers: The ranks.
        values: This rank's rows of the bank.
        queries: All queries on rank 0, none on the others.
        n: Rows of the bank, all ranks together.
        m: Number of queries.
        k: Number of neighbours.
        by: Who proposes candidates.
    """
    shard = index_rows(values) if len(values) else None
    first = _rows_of(workers, n, workers.group.rank).start
    found = []
    for chunk in _split(range(m), _QUERIES):
        sent = (
            queries[chunk].to(workers.device)
            if len(queries)
            else values.new_empty(chunk.stop - chunk.start, values.shape[1])
        )
        distributed.broadcast(sent, 0)
        # Padded to k columns, since collectives need equal shapes.
        cosines = torch.full((len(sent), k), -torch.inf, dtype=torch.float64, device=workers.device)
        rows = torch.zeros(len(sent), k, dtype=torch.int64, device=workers.device)
        if shard is not None:
            held = min(k, len(values))
            cosines[:, :held], own_rows = search_nearest(sent, shard, held, by=by)
            rows[:, :held] = own_rows + first
        gathered = []
        for result in (cosines, rows):
            answers = (
                [torch.empty_like(result) for _ in range(workers.group.world)] if workers.group.rank == 0 else None
            )
            distributed.gather(result, answers, dst=0)
            gathered.append(answers or [])
        if workers.group.rank == 0:
            found.append(merge_nearest(list(zip(*gathered, strict=True)), k))
    return found


def _rows_of(workers: WorkerGroup, n: int, rank: int) -> range:
    """Return the rows of n that a rank works on."""
    return split_across_ranks(n, replace(workers.group, rank=rank), block=1)


def _send_shares(workers: WorkerGroup, *tensors: Tensor) -> None:
    """Send every other rank its rows of each tensor."""
    for rank in range(1, workers.group.world):
        for rows in _split(_rows_of(workers, len(tensors[0]), rank), _SENT_ROWS):
            for tensor in tensors:
                distributed.send(tensor[rows].to(workers.device).contiguous(), rank)


def _receive_share(*tensors: Tensor) -> None:
    for rows in _split(range(len(tensors[0])), _SENT_ROWS):
        for tensor in tensors:
            distributed.recv(tensor[rows], 0)


def _split(rows: range, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size))
