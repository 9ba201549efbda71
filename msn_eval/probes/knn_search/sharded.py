"""Neighbours among a bank that lies in shards: queries travel, banks stay, the owner of a query chooses.

Every cosine has the same bits wherever it is computed (`cosine.py`), and a row among the k nearest of all is among the k
nearest of its own shard. So any number of shards gives the neighbours, cosines and order that one bank gives.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msn_eval.probes.knn_search.index import Bank
from msn_eval.probes.knn_search.search import Found, search_nearest

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
