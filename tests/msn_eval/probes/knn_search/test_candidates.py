"""Candidates: the bound on what fast products lose, and which library computes them."""

import sys

import pytest
import torch
from torch.nn.functional import normalize

from msn_eval.errors import UsageError
from msn_eval.probes.knn_search import candidates
from msn_eval.probes.knn_search.candidates import Candidates, Engine, choose_engines, find_candidates
from msn_eval.probes.knn_search.index import index_bank, row_lengths
from msn_eval.probes.knn_search.search import search_nearest

_ENGINES: list[Engine] = ["bfloat16", "float32", "faiss", "float64"]


def _rows(n: int, d: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _find(queries: torch.Tensor, bank: torch.Tensor, k: int, engine: Engine) -> Candidates:
    return find_candidates(queries, row_lengths(queries), index_bank(bank), k, engine=engine)


def _cosines(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return normalize(queries.double()) @ normalize(bank.double()).T


@pytest.mark.parametrize("engine", _ENGINES)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_no_product_is_further_from_its_cosine_than_the_bound(engine: Engine, offset: float) -> None:
    queries, bank = _rows(20, 96) + offset, _rows(300, 96, seed=1) + offset

    found = _find(queries, bank, 300, engine)

    assert found.complete.all()
    assert len(found.row) == 20 * 300
    assert ((found.product - _cosines(queries, bank)[found.query, found.row]).abs() <= found.bound).all()


@pytest.mark.parametrize(("engine", "most"), [("bfloat16", 0.02), ("float32", 1e-4), ("float64", 1e-11)])
def test_the_bound_is_small_enough_to_prove_something(engine: Engine, most: float) -> None:
    assert _find(_rows(5, 768), _rows(40, 768, seed=1), 4, engine).bound.max() < most


def test_the_bound_holds_where_every_rounding_goes_the_same_way() -> None:
    # 1 + 2^-8 lies half-way between two bfloat16 numbers: just below it, rounding takes all that it can take.
    row = torch.full((1, 251), (1 + 2.0**-8 - 2.0**-20) / 16, dtype=torch.float64)
    row[0, 250] = (1 - row[0, :250].square().sum()).sqrt()

    found = _find(row, row, 1, "bfloat16")

    assert 0.006 < (found.product[0] - 1).abs() <= found.bound[0]


def test_the_bound_covers_a_result_that_is_rounded_to_bfloat16() -> None:
    query = torch.full((1, 1024), 1 / 32)  # of length 1 and exact in bfloat16, as the row is
    row = query.clone()
    row[0, 0] *= -1

    found = _find(query, row, 1, "bfloat16")

    assert 0.001 < (found.product[0] - 511 / 512).abs() <= found.bound[0]


@pytest.mark.parametrize("engine", _ENGINES)
@pytest.mark.parametrize("tile", [700, 1 << 15])
@pytest.mark.parametrize("k", [1, 20])
def test_candidates_hold_every_row_that_rounding_cannot_rule_out(
    engine: Engine, k: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_TILE_ROWS", tile)
    queries, bank = _rows(20, 96), _rows(3_003, 96, seed=1)  # many times k, and no multiple of a group

    found = _find(queries, bank, k, engine)

    listed = torch.zeros(20, 3_003, dtype=torch.bool)
    listed[found.query, found.row] = True
    cosines = _cosines(queries, bank)
    assert listed.gather(1, cosines.topk(k, dim=1).indices).all()
    assert listed.sum(dim=1).max() < k + 120
    assert torch.equal(found.row, found.row.sort().values)


def test_only_the_first_k_of_equal_rows_are_candidates() -> None:
    bank = _rows(900, 16)
    bank[100:] = bank[7].clone()

    found = _find(bank[7:8], bank, 5, "float32")

    assert found.row.tolist() == [7, 100, 101, 102, 103]


def test_a_query_with_too_many_candidates_is_left_incomplete() -> None:
    bank = torch.eye(8, dtype=torch.float64)[0] + 1e-9 * _rows(2_000, 8).double()

    found = _find(torch.cat([bank[:1], -bank[:1]]), torch.cat([bank, -bank[:40]]), 2, "float32")

    assert found.complete.tolist() == [False, True]
    assert set(found.query.tolist()) == {1}


def test_faiss_that_is_asked_for_and_missing_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)

    with pytest.raises(UsageError, match="faiss is not installed\npip install faiss-gpu"):
        _find(_rows(2, 4), _rows(9, 4), 1, "faiss")


@pytest.mark.parametrize("fastest", ["bfloat16", "float32", "faiss"])
def test_the_engine_that_measures_fastest_comes_first_for_a_large_bank(
    fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_fastest_engine", lambda search: fastest)
    cpu = torch.device("cpu")

    assert choose_engines(cpu, "auto", 4_096)[0] == fastest
    assert choose_engines(cpu, "auto", 4_095) == ("float32", "float64")
    assert choose_engines(cpu, "faiss", 10) == ("faiss", "float32", "float64")


def test_measuring_needs_no_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "find_spec", lambda name: None)

    assert candidates._fastest_engine.__wrapped__("auto") in ("bfloat16", "float32")


@pytest.mark.parametrize("k", [1, 20, 200])
def test_the_result_is_the_same_whoever_proposes(k: int) -> None:
    queries, bank = _rows(40, 48), _rows(1_500, 48, seed=1)
    bank[700:760] = bank[3].clone()
    expected = search_nearest(queries, bank, k, search="torch")

    found = search_nearest(queries, bank, k, search="faiss")

    assert all(torch.equal(*parts) for parts in zip(found, expected, strict=True))
