"""Exact neighbours by every arithmetic: ties, near ties and rounding."""

import multiprocessing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from msn_eval.errors import NumericalError, ResourceError
from msn_eval.probes.base import normalise_rows
from msn_eval.probes.knn import neighbour_vote
from msn_eval.probes.knn_search import search as search_module
from msn_eval.probes.knn_search.candidates import Candidates, Engine, find_candidates
from msn_eval.probes.knn_search.index import GRID, index_bank
from msn_eval.probes.knn_search.search import merge_nearest, search_nearest, search_sharded

_ENGINES: dict[str, tuple[Engine, ...]] = {
    "bfloat16": ("bfloat16",),
    "float32": ("float32",),
    "faiss": ("faiss",),
    "float64": ("float64",),
    "all cosines": (),
}


@pytest.fixture(autouse=True, params=_ENGINES)
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with each engine alone: what it leaves incomplete falls to the cosines of all rows."""
    monkeypatch.setattr(search_module, "choose_engines", lambda device, search, n: _ENGINES[request.param])


def _unit_rows(n: int, d: int = 8, *, seed: int = 0) -> torch.Tensor:
    return normalise_rows(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def _naive_nearest(queries: torch.Tensor, bank: torch.Tensor, k: int) -> list[list[int]]:
    """Search rows of unit length by the rule: cosines on their grid, ties to the earlier row."""
    found = []
    for query in queries.numpy():
        cosines = [round(float(np.sum(query * row)) / GRID) for row in bank.numpy()]
        found.append(sorted(range(len(bank)), key=lambda row: (-cosines[row], row))[:k])
    return found


@pytest.mark.parametrize("k", [1, 5, 49, 50])
def test_neighbours_are_those_of_a_naive_float64_loop(k: int) -> None:
    queries, bank = _unit_rows(30, seed=1), _unit_rows(50)

    _, nearest = search_nearest(queries, bank, k)

    assert nearest.tolist() == _naive_nearest(queries, bank, k)


def test_cosines_are_float64_and_fall() -> None:
    queries, bank = _unit_rows(30, seed=1), _unit_rows(200)

    cosines, nearest = search_nearest(queries, bank, 20)

    assert (cosines.diff(dim=1) <= 0).all()
    torch.testing.assert_close(cosines, (queries @ bank.T).gather(1, nearest), rtol=0, atol=GRID)


def test_nearest_neighbour_of_a_bank_row_is_itself() -> None:
    bank = _unit_rows(100)

    cosines, nearest = search_nearest(bank, bank, 1)

    assert nearest[:, 0].tolist() == list(range(100))
    torch.testing.assert_close(cosines[:, 0], torch.ones(100, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("copies", [5, 40, 300])
@pytest.mark.parametrize("k", [1, 5, 24])
def test_equal_rows_are_found_from_the_earliest_on_however_many_there_are(k: int, copies: int) -> None:
    query = _unit_rows(1, seed=1)
    bank = _unit_rows(400)
    places = torch.randperm(400, generator=torch.Generator().manual_seed(2))[:copies].sort().values
    bank[places] = normalise_rows(query + 0.001 * _unit_rows(1, seed=3))

    _, nearest = search_nearest(query.repeat(3, 1), bank, k)

    expected = _naive_nearest(query, bank, k)[0]
    assert expected[: min(k, copies)] == places[:k].tolist()
    assert nearest.tolist() == [expected] * 3


@pytest.mark.parametrize("k", [1, 2, 5, 24])
def test_of_equal_rows_that_do_not_all_fit_the_earliest_is_the_last_neighbour(k: int) -> None:
    query = torch.eye(8, dtype=torch.float64)[:1]
    cosine = torch.cat([torch.linspace(0.9, 0.8, k - 1), torch.full((10,), 0.5), torch.linspace(0.4, 0.1, 41 - k)])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(k))
    bank = torch.zeros(50, 8, dtype=torch.float64)
    bank[order, 0], bank[order, 1] = cosine.double(), (1 - cosine.double().square()).sqrt()

    _, nearest = search_nearest(query, bank, k)

    assert nearest[0, -1] == order[k - 1 : k + 9].min()


def test_rows_that_float32_cannot_tell_apart_are_ordered_by_their_cosines() -> None:
    query = torch.zeros(1, 8, dtype=torch.float64)
    query[0, 0] = 1
    angles = torch.linspace(2e-4, 1e-4, 300, dtype=torch.float64)  # the later the row, the nearer
    bank = torch.zeros(300, 8, dtype=torch.float64)
    bank[:, 0], bank[:, 1] = angles.cos(), angles.sin()

    _, nearest = search_nearest(query, bank, 3)

    assert nearest.tolist() == [[299, 298, 297]]


def test_a_zero_query_is_equally_far_from_all_and_gets_the_first_rows() -> None:
    cosines, nearest = search_nearest(torch.zeros(1, 8, dtype=torch.float64), _unit_rows(200), 4)

    assert nearest.tolist() == [[0, 1, 2, 3]]
    assert cosines.tolist() == [[0, 0, 0, 0]]


def test_smaller_k_gives_a_prefix_of_the_larger() -> None:
    queries, bank = _unit_rows(20, d=3, seed=1), _unit_rows(120, d=3)
    cosines, nearest = search_nearest(queries, bank, 60)

    fewer_cosines, fewer = search_nearest(queries, bank, 7)

    assert torch.equal(fewer, nearest[:, :7])
    torch.testing.assert_close(fewer_cosines, cosines[:, :7], rtol=0, atol=1e-15)


def test_a_query_finds_the_same_alone_and_in_a_batch() -> None:
    queries, bank = _unit_rows(40, seed=1), _unit_rows(120)
    cosines, nearest = search_nearest(queries, bank, 9)

    alone = [search_nearest(query[None], bank, 9) for query in queries]

    assert torch.equal(torch.cat([rows for _, rows in alone]), nearest)
    torch.testing.assert_close(torch.cat([values for values, _ in alone]), cosines, rtol=0, atol=1e-15)


def test_queries_that_need_a_longer_shortlist_do_not_disturb_the_others() -> None:
    bank = _unit_rows(300)
    bank[100:200] = bank[100].clone()
    queries = torch.cat([bank[100:101], _unit_rows(5, seed=1), bank[100:101]])

    _, nearest = search_nearest(queries, bank, 4)

    assert nearest.tolist() == _naive_nearest(queries, bank, 4)


@pytest.mark.parametrize("d", [3, 8, 64, 384])
def test_equal_rows_tie_exactly_wherever_they_stand(d: int) -> None:
    bank = _unit_rows(150, d)
    places = torch.cat([torch.arange(20, 100), torch.arange(110, 150)])  # the last ones meet the edge of a product
    bank[places] = bank[20].clone()
    queries = normalise_rows(bank[20] + 0.1 * _unit_rows(37, d, seed=1))

    cosines, nearest = search_nearest(queries, bank, 120)

    copies = torch.isin(nearest, places)
    assert copies.sum(dim=1).min() > 50
    assert all(len(row[mine].unique()) == 1 for row, mine in zip(cosines, copies, strict=True))
    assert all(torch.equal(row[mine], row[mine].sort().values) for row, mine in zip(nearest, copies, strict=True))


def test_near_ties_just_within_and_beyond_each_rounding_are_told_apart() -> None:
    query = torch.zeros(1, 8, dtype=torch.float64)
    query[0, 0] = 1
    apart = torch.cat([torch.full((40,), 10.0**-power, dtype=torch.float64) for power in (14, 12, 9, 7, 5, 3, 2)])
    sine = (1 - (0.9 - apart.cumsum(0) / 40).square()).sqrt()
    bank = torch.zeros(280, 8, dtype=torch.float64)
    order = torch.randperm(280, generator=torch.Generator().manual_seed(4))
    bank[order, 0], bank[order, 1] = 0.9 - apart.cumsum(0) / 40, sine

    _, nearest = search_nearest(query, bank, 200)

    assert nearest.tolist() == _naive_nearest(query, bank, 200)


@pytest.mark.parametrize("where", ["bank", "queries"])
def test_a_row_that_is_nan_is_an_error_before_it_ranks_first(where: str) -> None:
    rows = {"bank": _unit_rows(50), "queries": _unit_rows(5, seed=1)}
    rows[where][3, 2] = torch.nan

    with pytest.raises(NumericalError, match="is not finite: 3"):
        search_nearest(rows["queries"], rows["bank"], 2)


def test_chunks_of_queries_and_one_call_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = _unit_rows(30, seed=1), _unit_rows(90)
    whole = search_nearest(queries, bank, 7)
    monkeypatch.setattr(search_module, "_QUERIES", 4)

    chunked = search_nearest(queries, bank, 7)

    assert all(torch.equal(one, other) for one, other in zip(chunked, whole, strict=True))


def test_equal_and_zero_rows_interleave_by_their_place() -> None:
    bank = torch.tensor([[0.0, 1], [1, 0], [0, 0], [0, -1], [0, 1], [1, 0], [0, 0]])

    cosines, nearest = search_nearest(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), bank, 6)

    assert nearest.tolist() == [[1, 5, 0, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert cosines.tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]


def test_a_device_that_multiplies_wrongly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Candidates:
        found = find_candidates(*arguments, **options)
        return found._replace(product=found.product + 0.1)

    monkeypatch.setattr(search_module, "choose_engines", lambda device, search, n: ("float32",))
    monkeypatch.setattr(search_module, "find_candidates", wrong)

    with pytest.raises(NumericalError, match="products in float32 on cpu are wrong by more than rounding explains"):
        search_nearest(_unit_rows(5, seed=1), _unit_rows(50), 2)


def test_memory_that_gives_out_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = _unit_rows(30, seed=1), _unit_rows(90)
    whole = search_nearest(queries, bank, 7)
    search = search_module._search_chunk

    def scarce(queries: torch.Tensor, *others: Any) -> Any:
        if len(queries) > 3:
            raise torch.OutOfMemoryError
        return search(queries, *others)

    monkeypatch.setattr(search_module, "_search_chunk", scarce)

    assert torch.equal(search_nearest(queries, bank, 7)[1], whole[1])


@pytest.mark.parametrize("shortage", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_memory_too_small_for_one_query_is_a_resource_error(
    shortage: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*given: Any) -> Any:
        raise shortage("can't allocate memory")

    monkeypatch.setattr(search_module, "_search_chunk", scarce)

    with pytest.raises(ResourceError, match="memory of cpu is too small for k-NN among 90 rows: can't allocate"):
        search_nearest(_unit_rows(3, seed=1), _unit_rows(90), 7)


def test_an_error_that_is_no_shortage_of_memory_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(search_module, "_search_chunk", broken)

    with pytest.raises(RuntimeError, match="something else"):
        search_nearest(_unit_rows(3, seed=1), _unit_rows(90), 7)


def test_a_few_near_ties_far_from_all_others_are_ordered_by_their_cosines() -> None:
    query, others = _unit_rows(1, 64, seed=1), _unit_rows(300, 64)
    bank = torch.cat([normalise_rows(query + 3e-4 * others[:12]), others])

    _, nearest = search_nearest(query, bank, 3)

    assert nearest.tolist() == _naive_nearest(query, bank, 3)


def test_unlike_rows_with_one_cosine_are_taken_in_their_order() -> None:
    query = torch.eye(8, dtype=torch.float64)[:1]
    bank = torch.eye(8, dtype=torch.float64)[1:2].repeat(300, 1) + torch.arange(300)[:, None] * torch.eye(8)[2]
    places = torch.randperm(300, generator=torch.Generator().manual_seed(4))[:14]
    for turn, place in enumerate(places.tolist()):
        bank[place] = torch.tensor([4.0, *([3.0, 2, 1, 0, 0, 0, 0][turn % 7 :] + [3.0, 2, 1, 0, 0, 0, 0][: turn % 7])])
        bank[place, 1:] *= 1 if turn < 7 else -1

    _, nearest = search_nearest(query, bank, 5)

    assert nearest[0].tolist() == places.sort().values[:5].tolist()


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
