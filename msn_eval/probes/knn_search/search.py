"""Exact nearest neighbours by cosine: every search gives the same rows in the same order.

A coarse product proposes, the float64 cosine of `cosine.py` decides. The shortlist's last member says how large the cosine of
a row outside can be at most: its coarse product plus the bound of `shortlist.py`. Where the k-th cosine inside is above
that, no row outside can be among the k nearest, nor tie with them, and the answer is proved; where it is not, the query
is searched again in finer arithmetic, at last by the cosines of all rows. A coarse product that is further from its cosine than
the bound allows ends the search: then the device does not compute what the bound was proved for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msn_eval.errors import NumericalError, ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.probes.knn_search.candidates import Arithmetic, By, Shortlist, arithmetics, find_shortlist, tile_rows
from msn_eval.probes.knn_search.index import (
    Bank,
    Copies,
    as_searched,
    check_finite,
    cosines_of_rows,
    index_bank,
    row_lengths,
)
from msn_eval.process import available_bytes

Found = tuple[Tensor, Tensor]  # cosines (m, k) float64, falling, and rows (m, k) int64

_VALUE_BYTES = 16  # of a coarse product while it is made, widened and sorted
_CPU_BYTES = 1 << 28
_CUDA_BYTES = 1 << 34
_FLAT = 1 << 22  # pairs that are sorted at once


def search_nearest(queries: Tensor, bank: Tensor | Bank, k: int, *, by: By = "auto") -> Found:
    """Give the k rows of `bank` with the largest cosine to each query, ties to the earlier row.

    queries: (m, d) floating, rows of any length; a zero row has the cosine 0 to all
    bank:    (n, d) likewise, n >= k, or what `index_bank` made of it, for more than one search
    by:      what proposes: `auto` takes what is fastest here (on a GPU torch's bfloat16 products, on a processor those where
             they pay, else faiss); `faiss` on a GPU takes a GPU index of faiss. It changes seconds, never the answer
    returns: (m, k) float64 cosines, falling; (m, k) int64 rows of the bank
    Raises NumericalError for rows that are not finite or a device that miscalculates, ResourceError where memory gives out,
    UsageError where faiss was asked for and cannot be used.
    """
    indexed = bank if isinstance(bank, Bank) else index_bank(bank)
    rows = as_searched(queries)
    check_finite(rows, "query")
    start, step = 0, _queries_at_once(rows.device)
    parts: list[Found] = []
    while start < len(rows):
        try:
            part = _search_chunk(rows[start : start + step], indexed, k, by)
        except OUT_OF_MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            if step == 1:
                raise ResourceError(
                    f"memory of {rows.device} is too small for k-NN among {indexed.rows:,} rows: {error}",
                    hint="Use --device cpu for this probe." if rows.is_cuda else "Use a machine with more memory.",
                ) from error
            part = None
        if part is None:  # out of the handler, whose traceback holds what did not fit
            step = (step + 1) // 2
            torch.cuda.empty_cache()
            continue
        parts.append(part)
        start += step
    if not parts:
        return rows.new_empty(0, k, dtype=torch.float64), torch.empty(0, k, dtype=torch.int64, device=rows.device)
    return torch.cat([cosines for cosines, _ in parts]), torch.cat([places for _, places in parts])


def _queries_at_once(device: torch.device) -> int:
    """Give how many queries a chunk holds, by the memory that is free now."""
    if device.type == "cuda":
        room = min(_CUDA_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    else:
        free = available_bytes()
        room = _CPU_BYTES if free is None else min(_CPU_BYTES, free // 4)
    return max(1, room // (_VALUE_BYTES * tile_rows(device)))


def _search_chunk(queries: Tensor, bank: Bank, k: int, by: By) -> Found:
    """Search for one chunk of queries, coarse first, and repeat the rows that the bank holds more than once."""
    lengths = row_lengths(queries)
    kinds = min(k, len(bank.values))
    cosines = queries.new_zeros(len(queries), kinds, dtype=torch.float64)
    rows = torch.arange(kinds, device=queries.device).repeat(len(queries), 1)  # what a zero row gets
    open_ones = lengths.nonzero()[:, 0]
    for arithmetic in arithmetics(queries.device, by):
        if not len(open_ones):
            break
        some, scale = queries[open_ones], lengths[open_ones]
        proposed = find_shortlist(some, scale, bank, kinds, arithmetic=arithmetic, by=by)
        found, proved = _decide(some, scale, bank, kinds, proposed, arithmetic)
        cosines[open_ones[proved]], rows[open_ones[proved]] = found[0][proved], found[1][proved]
        open_ones = open_ones[~proved]
    for one in open_ones.tolist():
        cosines[one], rows[one] = _search_all(queries[one : one + 1], lengths[one : one + 1], bank, kinds)
    return (cosines, rows) if bank.copies is None else _with_copies(cosines, rows, bank.copies, k)


def _decide(
    queries: Tensor, lengths: Tensor, bank: Bank, k: int, proposed: Shortlist, arithmetic: Arithmetic
) -> tuple[Found, Tensor]:
    """Order a shortlist by exact cosines; and say for which queries it proves to hold the k nearest.

    The first k are taken at once. Of the others only those that can be as near as the farthest of these can be among the k
    nearest; they come next in the list.
    """
    coarse, highest = proposed.coarse, proposed.coarse + proposed.bound
    cosines = torch.full_like(coarse, -torch.inf)
    cosines[:, :k] = cosines_of_rows(queries, lengths, bank.values, bank.lengths, proposed.rows[:, :k], wide=bank.wide)
    members = (highest >= cosines[:, :k].amin(dim=1, keepdim=True)).sum(dim=1)
    cosines[:, k:] = cosines_of_rows(
        queries,
        lengths,
        bank.values,
        bank.lengths,
        proposed.rows[:, k:],
        counts=(members - k).clamp(min=0),
        wide=bank.wide,
    )
    off = (coarse - cosines).abs().masked_fill(cosines == -torch.inf, 0)
    if not bool((off <= proposed.bound).all()):
        raise NumericalError(
            f"products in {arithmetic} on {queries.device} are wrong by more than rounding explains",
            hint="Another library changed how this process computes (cyanure's fit does): use a process of its own.",
        )
    earliest, order = proposed.rows.sort(dim=1)
    ordered = cosines.gather(1, order).sort(dim=1, descending=True, stable=True)
    found = ordered.values[:, :k], earliest.gather(1, ordered.indices[:, :k])
    if coarse.shape[1] == len(bank.values):
        return found, torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    return found, found[0][:, -1] > highest[:, -1]


def _search_all(query: Tensor, length: Tensor, bank: Bank, k: int) -> Found:
    """Search by the cosines of all rows."""
    rows = torch.arange(len(bank.values), device=query.device)
    cosines = cosines_of_rows(query, length, bank.values, bank.lengths, rows[None], wide=bank.wide)[0]
    ordered = cosines.sort(descending=True, stable=True)
    return ordered.values[:k], ordered.indices[:k]


def _with_copies(cosines: Tensor, kinds: Tensor, copies: Copies, k: int) -> Found:
    """Put the rows in place of their kinds, and keep the first k in the order of cosine and row.

    A row among the k nearest is of one of the first k kinds: each kind before its own has a row before it.
    """
    most = (copies.starts[kinds + 1] - copies.starts[kinds]).clamp(max=k)  # (m, kinds)
    step = max(1, _FLAT // max(1, int(most.sum(dim=1).max())))
    parts = [
        _expanded(*part, copies, k)
        for part in zip(torch.split(cosines, step), torch.split(kinds, step), torch.split(most, step), strict=True)
    ]
    return torch.cat([values for values, _ in parts]), torch.cat([rows for _, rows in parts])


def _expanded(cosines: Tensor, kinds: Tensor, most: Tensor, copies: Copies, k: int) -> Found:
    device, counts = kinds.device, most.flatten()
    ends = counts.cumsum(0)
    within = torch.arange(int(ends[-1]), device=device) - (ends - counts).repeat_interleave(counts)
    rows = copies.ids[copies.starts[kinds.flatten()].repeat_interleave(counts) + within]
    values = cosines.flatten().repeat_interleave(counts)
    query = torch.arange(len(kinds), device=device).repeat_interleave(most.sum(dim=1))
    # Sorted by the last key first; each sort keeps what the one before left.
    order = rows.argsort(stable=True)
    order = order[values[order].argsort(descending=True, stable=True)]
    order = order[query[order].argsort(stable=True)]
    begins = most.sum(dim=1).cumsum(0) - most.sum(dim=1)
    chosen = order[begins[:, None] + torch.arange(k, device=device)]
    return values[chosen], rows[chosen]


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def merge_nearest(parts: Sequence[Found], k: int) -> Found:
    """Choose the k nearest of what shards found, ties to the earlier row.

    parts: of each shard (m, k_i) cosines and (m, k_i) rows, numbered as in the whole bank; the k nearest of the shard, or
           all of its rows where it has fewer, and any number of cosines of -inf; k at most the rows of all shards
    """
    cosines, rows = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    earliest, order = rows.sort(dim=1)
    ordered = cosines.gather(1, order).sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], earliest.gather(1, ordered.indices[:, :k])


def search_sharded(
    queries: Tensor, shard: Bank | None, first: int, k: int, *, group: "ProcessGroup | None" = None
) -> Found:
    """Search among the shards of all ranks of a torch.distributed group for this rank's queries. Every rank calls it.

    queries: (m, d) floating, this rank's own, of the same width and dtype on every rank; none where m = 0
    shard:   this rank's rows; None where it has none
    first:   the number of its first row in the whole bank; shards follow each other
    k:       at most the rows of all shards
    returns: as `search_nearest` on the whole bank, for this rank's queries
    Raises what `search_nearest` raises. A rank that fails leaves the others waiting in a collective, until the
    group's time-out: a job that must notice at once watches its ranks as `msn_eval.distributed.group` does.
    """
    from torch import distributed

    rank, world = distributed.get_rank(group), distributed.get_world_size(group)
    counts = [torch.empty(1, dtype=torch.int64, device=queries.device) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor([len(queries)], device=queries.device), group=group)
    own: list[Found] = []
    for owner in range(world):
        asked = int(counts[owner])
        if not asked:
            continue
        travelling = queries.contiguous() if owner == rank else queries.new_empty(asked, queries.shape[1])
        distributed.broadcast(travelling, group=group, group_src=owner)
        found = _padded(travelling, shard, first, k)
        gathered: list[list[Tensor]] = []
        for one in found:
            answers = [torch.empty_like(one) for _ in range(world)] if owner == rank else None
            distributed.gather(one, answers, group=group, group_dst=owner)
            if answers is not None:
                gathered.append(answers)
        if gathered:
            own = [(values, places) for values, places in zip(*gathered, strict=True)]
    if own:
        return merge_nearest(own, k)
    nothing = torch.empty(0, k, dtype=torch.int64, device=queries.device)
    return nothing.to(torch.float64), nothing


def _padded(queries: Tensor, shard: Bank | None, first: int, k: int) -> Found:
    """Give k columns whatever the shard holds: collectives want equal shapes. What is not there is farther than any row."""
    cosines = torch.full((len(queries), k), -torch.inf, dtype=torch.float64, device=queries.device)
    rows = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    if shard is not None:
        held = min(k, shard.rows)
        cosines[:, :held], places = search_nearest(queries, shard, held)
        rows[:, :held] = places + first
    return cosines, rows
