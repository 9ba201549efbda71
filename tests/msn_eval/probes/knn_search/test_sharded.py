"""Banks in shards: any number of them finds what one bank finds."""

import multiprocessing
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from msn_eval.probes.knn import neighbour_vote
from msn_eval.probes.knn_search.index import index_bank
from msn_eval.probes.knn_search.search import search_nearest
from msn_eval.probes.knn_search.sharded import merge_nearest, search_sharded

_K = 9
_RANKS = 4


def _bank() -> tuple[Tensor, Tensor]:
    """Give 60 rows, many of them equal to others far away, and their labels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 12, generator=generator)
    values[torch.arange(3, 60, 7)] = values[1].clone()
    values[[20, 41, 58]] = values[5] * 2
    return values, torch.randint(4, (60,), generator=generator)


def _queries() -> Tensor:
    values, _ = _bank()
    noise = torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    return torch.cat([noise, values[[1, 5, 20]], torch.zeros(1, 12)])


@pytest.mark.parametrize("k", [1, _K, 60])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5])
def test_any_number_of_shards_gives_the_same_neighbours_and_votes_to_the_last_bit(shards: int, k: int) -> None:
    values, labels = _bank()
    whole = search_nearest(_queries(), values, k)
    edges = [60 * place // shards for place in range(shards + 1)]
    parts = []
    for start, end in pairwise(edges):
        cosines, rows = search_nearest(_queries(), values[start:end], min(k, end - start))
        parts.append((cosines, rows + start))

    merged = merge_nearest(parts, k)

    assert torch.equal(merged[0], whole[0])
    assert torch.equal(merged[1], whole[1])
    votes = [neighbour_vote(one[0], labels[one[1]], n_classes=4, temperature=0.07) for one in (merged, whole)]
    assert torch.equal(*votes)


def _be_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=_RANKS)
    values, _ = _bank()
    # Uneven on purpose: rank 1 holds fewer rows than k, rank 2 asks nothing, rank 3 holds nothing.
    start, end = [(0, 50), (50, 54), (54, 60), (60, 60)][rank]
    mine = [slice(0, 5), slice(5, 11), slice(14, 14), slice(11, 14)][rank]
    shard = index_bank(values[start:end]) if end > start else None
    found = search_sharded(_queries()[mine], shard, start, _K)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_ranks_find_for_each_other_what_one_process_finds_alone(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_be_rank, args=(rank, tmp_path)) for rank in range(_RANKS)]

    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0] * _RANKS
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(_RANKS)]
    whole = search_nearest(_queries(), _bank()[0], _K)
    assert torch.equal(torch.cat([cosines for cosines, _ in found]), whole[0])
    assert torch.equal(torch.cat([rows for _, rows in found]), whole[1])
    assert [(part.shape, part.dtype) for part in found[2]] == [((0, _K), part.dtype) for part in whole]
