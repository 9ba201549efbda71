"""Exact search: fast products find candidates, float64 cosines decide; every search gives the same rows in the same order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msn_eval.errors import NumericalError, ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.probes.knn_search.candidates import Engine, Search, choose_engines, find_candidates
from msn_eval.probes.knn_search.index import Bank, as_searched, check_finite, exact_cosines, index_bank, row_lengths

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Neighbours = tuple[Tensor, Tensor]  # cosines (m, k) float64, descending, and rows (m, k) int64
_QUERIES, _QUERIES_CUDA = 512, 4096  # per chunk


def search_nearest(queries: Tensor, bank: Tensor | Bank, k: int, *, search: Search = "auto") -> Neighbours:
    """Find the k rows of `bank` with the largest cosine to each query; ties go to the earlier row.

    Args:
        queries: (m, d) floating, rows of any length; a zero row has the cosine 0 to all.
        bank: (n, d) floating, n >= k, or what `index_bank` returns for it.
        k: Number of neighbours.
        search: What proposes candidates; `auto` takes what is fastest here. It changes seconds, never the result.

    Returns:
        (m, k) float64 cosines, descending, and (m, k) int64 rows of the bank.

    Raises:
        NumericalError: Rows are not finite, or the device computes wrong products.
        ResourceError: There is not enough memory.
        UsageError: faiss was asked for and cannot be used.
    """
    bank = bank if isinstance(bank, Bank) else index_bank(bank)
    queries = as_searched(queries)
    if not len(queries):
        return queries.new_empty(0, k, dtype=torch.float64), queries.new_empty(0, k, dtype=torch.int64)
    check_finite(queries, "query")
    engines = choose_engines(queries.device, search, len(bank.values))
    start, step, parts = 0, _QUERIES_CUDA if queries.is_cuda else _QUERIES, []
    while start < len(queries):
        try:
            parts.append(_search_chunk(queries[start : start + step], bank, k, engines))
            start += step
            continue
        except OUT_OF_MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            if step == 1:
                raise ResourceError(
                    f"memory of {queries.device} is too small for k-NN among {len(bank.values):,} rows: {error}",
                    hint="Use --device cpu for this probe." if queries.is_cuda else "Use a machine with more memory.",
                ) from error
        # Outside of the handler, whose traceback keeps the tensors that did not fit.
        step = (step + 1) // 2
        torch.cuda.empty_cache()
    return torch.cat([cosines for cosines, _ in parts]), torch.cat([rows for _, rows in parts])


def _search_chunk(queries: Tensor, bank: Bank, k: int, engines: Sequence[Engine]) -> Neighbours:
    lengths = row_lengths(queries)
    cosines = lengths.new_zeros(len(queries), k)
    rows = torch.arange(k, device=queries.device).repeat(len(queries), 1)  # the neighbours of a zero query
    remaining = lengths.nonzero()[:, 0]
    for engine in engines:
        some, scale = queries[remaining], lengths[remaining]
        if not len(some):
            break
        query, row, product, bound, complete = find_candidates(some, scale, bank, k, engine=engine)
        exact = exact_cosines(some, scale, bank, query, row)
        if bool(((product - exact).abs() > bound).any()):
            raise NumericalError(
                f"products in {engine} on {queries.device} are wrong by more than rounding explains",
                hint="Another library changed how this process computes (cyanure's fit does): use a process of its own.",
            )
        done, query = remaining[complete], (complete.cumsum(0) - 1)[query]
        cosines[done], rows[done] = _select_nearest(exact, query, row, len(done), k)
        remaining = remaining[~complete]
    row = torch.arange(len(bank.values), device=queries.device)
    for index in remaining.tolist():  # so many rows are nearly equal that all are compared
        one = slice(index, index + 1)
        exact = exact_cosines(queries[one], lengths[one], bank, torch.zeros_like(row), row)
        cosines[one], rows[one] = _select_nearest(exact, torch.zeros_like(row), row, 1, k)
    return cosines, rows


def _select_nearest(cosines: Tensor, query: Tensor, row: Tensor, m: int, k: int) -> Neighbours:
    """Select the k nearest of each of m queries from pairs that are sorted by row."""
    counts = query.bincount(minlength=m)
    starts = counts.cumsum(0) - counts
    order = query.argsort(stable=True)
    column = torch.arange(len(query), device=query.device) - starts.repeat_interleave(counts)
    table = cosines.new_full((m, int(counts.max())), -torch.inf) if m else cosines.new_empty(0, k)
    table[query[order], column] = cosines[order]
    nearest, position = table.sort(dim=1, descending=True, stable=True)  # of equal cosines the earlier row comes first
    return nearest[:, :k], row[order[starts[:, None] + position[:, :k]]]


def merge_nearest(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """Select the k nearest of what shards found; ties go to the earlier row.

    Args:
        parts: Per shard (m, k_i) cosines and (m, k_i) rows, numbered as in the complete bank: the k nearest of the shard,
            or all of its rows where it has fewer, padded with any number of cosines of -inf.
        k: At most the number of rows of all shards.
    """
    cosines, rows = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    rows, order = rows.sort(dim=1)
    nearest, column = cosines.gather(1, order).sort(dim=1, descending=True, stable=True)
    return nearest[:, :k], rows.gather(1, column[:, :k])


def search_sharded(
    queries: Tensor, shard: Bank | None, first: int, k: int, *, group: "ProcessGroup | None" = None
) -> Neighbours:
    """Search the shards of all ranks of a torch.distributed group for this rank's queries. Every rank calls it.

    Args:
        queries: (m, d) floating, this rank's own, of the same width and dtype on every rank.
        shard: This rank's rows; None if it has none.
        first: Index of its first row in the complete bank; shards follow each other in the order of ranks.
        k: At most the number of rows of all shards.
        group: The process group, None for the default one.

    Returns:
        What `search_nearest` returns for the complete bank and this rank's queries.

    Raises:
        Exception: What `search_nearest` raises. The other ranks then wait until the group's time-out, unless
            `msn_eval.distributed` watches them.
    """
    from torch import distributed

    rank, world = distributed.get_rank(group), distributed.get_world_size(group)
    counts = [torch.empty(1, dtype=torch.int64, device=queries.device) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor([len(queries)], device=queries.device), group=group)
    own: Neighbours = queries.new_empty(0, k, dtype=torch.float64), queries.new_empty(0, k, dtype=torch.int64)
    for owner in range(world):
        if not int(counts[owner]):
            continue
        sent = queries.contiguous() if owner == rank else queries.new_empty(int(counts[owner]), queries.shape[1])
        distributed.broadcast(sent, group=group, group_src=owner)
        gathered = []
        for result in _search_shard(sent, shard, first, k):
            answers = [torch.empty_like(result) for _ in range(world)] if owner == rank else None
            distributed.gather(result, answers, group=group, group_dst=owner)
            gathered.append(answers or [])
        if owner == rank:
            own = merge_nearest(list(zip(*gathered, strict=True)), k)
    return own


def _search_shard(queries: Tensor, shard: Bank | None, first: int, k: int) -> Neighbours:
    """Search one shard, and pad to k columns, since collectives need equal shapes."""
    cosines = torch.full((len(queries), k), -torch.inf, dtype=torch.float64, device=queries.device)
    rows = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    if shard is not None:
        held = min(k, len(shard.values))
        cosines[:, :held], found = search_nearest(queries, shard, held)
        rows[:, :held] = found + first
    return cosines, rows
