"""Exact neighbours by products of every dtype: ties, near ties and rounding."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msn_eval.errors import NumericalError, ResourceError
from msn_eval.probes import knn_search as search_module
from msn_eval.probes.base import normalise_rows
from msn_eval.probes.knn import neighbour_vote
from msn_eval.probes.knn_search import GRID, Rows, merge_nearest, search_nearest

_STAGES = [torch.bfloat16, torch.float32, torch.float64, "faiss"]


@pytest.fixture(autouse=True, params=[*_STAGES, None], ids=str)
def _stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test of a search with products of each dtype and of faiss alone, and with none: then all cosines are compared."""
    stages = () if request.param is None else (request.param,)
    monkeypatch.setattr(search_module, "choose_stages", lambda device, n, k, by: stages)


def _unit_rows(n: int, d: int = 8, *, seed: int = 0) -> Tensor:
    return normalise_rows(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def _naive_nearest(queries: Tensor, bank: Tensor, k: int) -> list[list[int]]:
    """Search rows of unit length by the rule: cosines on their grid, ties to the earlier row."""
    nearest = []
    for query in queries.numpy():
        cosines = [round(float(np.sum(query * row)) / GRID) for row in bank.numpy()]
        nearest.append(sorted(range(len(bank)), key=lambda row: (-cosines[row], row))[:k])
    return nearest


@pytest.mark.parametrize("k", [1, 5, 49, 50])
def test_neighbours_are_those_of_a_naive_float64_loop(k: int) -> None:
    queries, bank = _unit_rows(30, seed=1), _unit_rows(50)

    cosines, nearest = search_nearest(queries, bank, k)

    assert nearest.tolist() == _naive_nearest(queries, bank, k)
    torch.testing.assert_close(cosines, (queries @ bank.T).gather(1, nearest), rtol=0, atol=GRID)
    assert (cosines.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("copies", [5, 40, 300])
@pytest.mark.parametrize("k", [1, 5, 24])
def test_equal_rows_are_neighbours_from_the_earliest_on(k: int, copies: int) -> None:
    query = _unit_rows(1, seed=1)
    bank = _unit_rows(400)
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(2))[:copies].sort().values
    bank[rows] = normalise_rows(query + 0.001 * _unit_rows(1, seed=3))

    _, nearest = search_nearest(query.repeat(3, 1), bank, k)

    expected = _naive_nearest(query, bank, k)[0]
    assert expected[: min(k, copies)] == rows[:k].tolist()
    assert nearest.tolist() == [expected] * 3


@pytest.mark.parametrize("k", [1, 2, 5, 24])
def test_of_equal_rows_that_do_not_all_fit_the_earliest_is_the_last_neighbour(k: int) -> None:
    cosine = torch.cat([torch.linspace(0.9, 0.8, k - 1), torch.full((10,), 0.5), torch.linspace(0.4, 0.1, 41 - k)])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(k))
    bank = torch.zeros(50, 8, dtype=torch.float64)
    bank[order, 0], bank[order, 1] = cosine.double(), (1 - cosine.double().square()).sqrt()

    _, nearest = search_nearest(torch.eye(8, dtype=torch.float64)[:1], bank, k)

    assert nearest[0, -1] == order[k - 1 : k + 9].min()


def test_rows_that_float32_cannot_distinguish_are_ordered_by_their_cosines() -> None:
    angles = torch.linspace(2e-4, 1e-4, 300, dtype=torch.float64)  # the later the row, the nearer
    bank = torch.zeros(300, 8, dtype=torch.float64)
    bank[:, 0], bank[:, 1] = angles.cos(), angles.sin()

    _, nearest = search_nearest(torch.eye(8, dtype=torch.float64)[:1], bank, 3)

    assert nearest.tolist() == [[299, 298, 297]]


def test_smaller_k_and_fewer_queries_give_the_same_bits() -> None:
    queries, bank = _unit_rows(20, d=3, seed=1), _unit_rows(120, d=3)
    cosines, nearest = search_nearest(queries, bank, 60)

    alone = [search_nearest(query[None], bank, 7) for query in queries]

    assert torch.equal(torch.cat([rows for _, rows in alone]), nearest[:, :7])
    assert torch.equal(torch.cat([values for values, _ in alone]), cosines[:, :7])


def test_queries_with_too_many_candidates_do_not_disturb_the_others() -> None:
    bank = _unit_rows(1300)
    bank[100:1200] = bank[100].clone()
    queries = torch.cat([bank[100:101], _unit_rows(5, seed=1), bank[100:101]])

    _, nearest = search_nearest(queries, bank, 4)

    assert nearest.tolist() == _naive_nearest(queries, bank, 4)


@pytest.mark.parametrize("d", [3, 8, 64, 384])
def test_equal_rows_tie_exactly_at_any_position(d: int) -> None:
    bank = _unit_rows(150, d)
    copied = torch.cat([torch.arange(20, 100), torch.arange(110, 150)])  # the last ones are at the edge of a product
    bank[copied] = bank[20].clone()
    queries = normalise_rows(bank[20] + 0.1 * _unit_rows(37, d, seed=1))

    cosines, nearest = search_nearest(queries, bank, 120)

    copies = torch.isin(nearest, copied)
    assert copies.sum(dim=1).min() > 50
    assert all(len(row[mask].unique()) == 1 for row, mask in zip(cosines, copies, strict=True))
    assert all(torch.equal(row[mask], row[mask].sort().values) for row, mask in zip(nearest, copies, strict=True))


def test_near_ties_within_and_beyond_each_rounding_are_ordered_by_the_rule() -> None:
    apart = torch.cat([torch.full((40,), 10.0**-power, dtype=torch.float64) for power in (14, 12, 9, 7, 5, 3, 2)])
    cosines = 0.9 - apart.cumsum(0) / 40
    order = torch.randperm(280, generator=torch.Generator().manual_seed(4))
    query, bank = torch.eye(8, dtype=torch.float64)[:1], torch.zeros(280, 8, dtype=torch.float64)
    bank[order, 0], bank[order, 1] = cosines, (1 - cosines.square()).sqrt()

    _, nearest = search_nearest(query, bank, 200)

    assert nearest.tolist() == _naive_nearest(query, bank, 200)


def test_different_rows_with_one_cosine_are_in_their_order() -> None:
    bank = torch.eye(8, dtype=torch.float64)[1:2].repeat(300, 1) + torch.arange(300)[:, None] * torch.eye(8)[2]
    near = torch.randperm(300, generator=torch.Generator().manual_seed(4))[:14]
    for turn, row in enumerate(near.tolist()):
        bank[row] = torch.tensor([4.0, *([3.0, 2, 1, 0, 0, 0, 0][turn % 7 :] + [3.0, 2, 1, 0, 0, 0, 0][: turn % 7])])
        bank[row, 1:] *= 1 if turn < 7 else -1

    _, nearest = search_nearest(torch.eye(8, dtype=torch.float64)[:1], bank, 5)

    assert nearest[0].tolist() == near.sort().values[:5].tolist()


def test_zero_rows_and_zero_queries_have_the_cosine_zero() -> None:
    bank = torch.tensor([[0.0, 1], [1, 0], [0, 0], [0, -1], [0, 1], [1, 0], [0, 0]])

    cosines, nearest = search_nearest(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), bank, 6)

    assert nearest.tolist() == [[1, 5, 0, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert cosines.tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["bank", "queries"])
def test_a_row_that_is_nan_is_an_error_before_it_ranks_first(name: str) -> None:
    rows = {"bank": _unit_rows(50), "queries": _unit_rows(5, seed=1)}
    rows[name][3, 2] = torch.nan

    with pytest.raises(NumericalError, match="is not finite: 3"):
        search_nearest(rows["queries"], rows["bank"], 2)


@pytest.mark.parametrize(("name", "value"), [("_QUERIES", 4), ("_PRODUCTS", 300)])
def test_chunks_of_queries_give_the_same_bits(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = _unit_rows(30, seed=1), _unit_rows(90)
    expected = search_nearest(queries, bank, 7)
    monkeypatch.setattr(search_module, name, value)

    chunked = search_nearest(queries, bank, 7)

    assert all(map(torch.equal, chunked, expected))


def test_out_of_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = _unit_rows(30, seed=1), _unit_rows(90)
    expected = search_nearest(queries, bank, 7)
    search = search_module._search_chunk

    def refuse_many(queries: Rows, *arguments: Any) -> Any:
        if len(queries.values) > 3:
            raise torch.OutOfMemoryError
        return search(queries, *arguments)

    monkeypatch.setattr(search_module, "_search_chunk", refuse_many)

    assert torch.equal(search_nearest(queries, bank, 7)[1], expected[1])


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (torch.OutOfMemoryError("no"), ResourceError, "memory of cpu is too small for k-NN among 90 rows: no"),
        (RuntimeError("can't allocate memory"), ResourceError, "too small for k-NN among 90 rows: can't allocate"),
        (RuntimeError("something else"), RuntimeError, "something else"),
    ],
    ids=repr,
)
def test_memory_too_small_for_one_query_is_a_resource_error(
    raised: Exception, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise raised

    monkeypatch.setattr(search_module, "_search_chunk", fail)

    with pytest.raises(expected, match=message):
        search_nearest(_unit_rows(3, seed=1), _unit_rows(90), 7)


@pytest.mark.parametrize("k", [1, 9, 60])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_any_number_of_shards_gives_the_same_neighbours_and_votes_to_the_last_bit(shards: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(60, 12, generator=generator), torch.randint(4, (60,), generator=generator)
    values[torch.arange(3, 60, 7)] = values[1].clone()
    values[[20, 41, 58]] = values[5] * 2
    queries = torch.cat([torch.randn(10, 12, generator=generator), values[[1, 5, 20]], torch.zeros(1, 12)])
    expected = search_nearest(queries, values, k)
    parts = []
    for start, end in pairwise(60 * shard // shards for shard in range(shards + 1)):
        cosines, rows = search_nearest(queries, values[start:end], min(k, end - start))
        parts.append((cosines, rows + start))

    merged = merge_nearest(parts, k)

    assert all(map(torch.equal, merged, expected))
    votes = [
        neighbour_vote(nearest[0], labels[nearest[1]], n_classes=4, temperature=0.07) for nearest in (merged, expected)
    ]
    assert torch.equal(*votes)


def test_chunks_on_several_threads_find_the_same_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = _unit_rows(100, seed=1), _unit_rows(300)
    whole = search_nearest(queries, bank, 5)
    before = torch.get_num_threads()
    monkeypatch.setattr(search_module, "_QUERIES", 7)

    torch.set_num_threads(4)
    try:
        chunked = search_nearest(queries, bank, 5)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)

    assert torch.equal(chunked[0], whole[0])
    assert torch.equal(chunked[1], whole[1])
