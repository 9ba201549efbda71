"""Shortlists: the bound on what a coarse product loses, and which library makes them."""

import sys

import pytest
import torch

from msn_eval.errors import UsageError
from msn_eval.probes.knn_search import candidates as shortlist
from msn_eval.probes.knn_search.candidates import Arithmetic, By, Shortlist, arithmetics, find_shortlist
from msn_eval.probes.knn_search.index import index_bank, row_lengths

_WAYS: list[tuple[Arithmetic, By]] = [
    ("bfloat16", "torch"),
    ("float32", "torch"),
    ("float32", "faiss"),
    ("float64", "torch"),
]


def _rows(n: int, d: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _listed(queries: torch.Tensor, bank: torch.Tensor, k: int, arithmetic: Arithmetic, by: By) -> Shortlist:
    return find_shortlist(queries, row_lengths(queries), index_bank(bank), k, arithmetic=arithmetic, by=by)


def _cosines(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(bank.double()).T


@pytest.mark.parametrize(("arithmetic", "by"), _WAYS)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_no_coarse_product_is_further_from_its_cosine_than_the_bound(
    arithmetic: Arithmetic, by: By, offset: float
) -> None:
    queries, bank = _rows(20, 96) + offset, _rows(300, 96, seed=1) + offset

    found = _listed(queries, bank, 300, arithmetic, by)

    off = (found.coarse - _cosines(queries, bank).gather(1, found.rows)).abs()
    assert (off <= found.bound).all()


@pytest.mark.parametrize(("arithmetic", "by", "most"), [(*_WAYS[0], 0.02), (*_WAYS[1], 1e-4), (*_WAYS[3], 1e-11)])
def test_the_bound_is_small_enough_to_prove_something(arithmetic: Arithmetic, by: By, most: float) -> None:
    assert _listed(_rows(5, 768), _rows(40, 768, seed=1), 4, arithmetic, by).bound.max() < most


def test_the_bound_holds_where_every_rounding_goes_the_same_way() -> None:
    # 1 + 2^-8 lies half-way between two bfloat16 numbers: just below it, rounding takes all that it can take.
    row = torch.full((1, 251), (1 + 2.0**-8 - 2.0**-20) / 16, dtype=torch.float64)
    row[0, 250] = (1 - row[0, :250].square().sum()).sqrt()

    found = _listed(row, row, 1, "bfloat16", "torch")

    off = (found.coarse[0, 0] - 1).abs()
    assert 0.006 < off <= found.bound[0, 0]


def test_the_bound_covers_an_answer_that_is_rounded_to_bfloat16() -> None:
    query = torch.full((1, 1024), 1 / 32)  # of unit length and exact in bfloat16, as the row is
    row = query.clone()
    row[0, 0] *= -1

    found = _listed(query, row, 1, "bfloat16", "torch")

    off = (found.coarse[0, 0] - 511 / 512).abs()
    assert 0.001 < off <= found.bound[0, 0]


@pytest.mark.parametrize(("drift", "bank_drift"), [(0.01, 0.0), (0.0, 0.01), (0.01, 0.02)])
def test_the_bound_covers_what_rounding_did_to_queries_and_to_the_bank(drift: float, bank_drift: float) -> None:
    loss = shortlist._Loss(width=8, arithmetic="float64", device="cpu", faiss=False)

    none = torch.zeros(1, 1, dtype=torch.float64)
    assert (
        shortlist.error_bound(none, torch.tensor([drift], dtype=torch.float64), bank_drift, loss) >= drift + bank_drift
    )


@pytest.mark.parametrize(("arithmetic", "by"), [_WAYS[0], _WAYS[1]])
@pytest.mark.parametrize("k", [1, 20])
def test_no_row_outside_of_a_list_exceeds_its_last_by_more_than_the_bound(
    arithmetic: Arithmetic, by: By, k: int
) -> None:
    queries, bank = _rows(20, 96), _rows(3_003, 96, seed=1)  # many times as long as the list, and not of whole groups

    found = _listed(queries, bank, k, arithmetic, by)

    outside = _cosines(queries, bank).scatter(1, found.rows, -torch.inf)
    assert found.rows.shape[1] < 500
    assert (outside.amax(dim=1) <= found.coarse[:, -1] + found.bound[:, -1]).all()


def test_the_largest_are_found_in_every_column() -> None:
    products = torch.randperm(20 * 1_003, generator=torch.Generator().manual_seed(0)).view(20, 1_003).float()

    values, places = shortlist._largest(products, 60)

    assert torch.equal(values, products.topk(60, dim=1).values)
    assert torch.equal(products.gather(1, places), values)
    assert places.max() > 1_000  # 1,003 are no whole groups


def test_lists_are_the_same_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = _rows(20, 16), _rows(300, 16, seed=1)
    whole = _listed(queries, bank, 10, "float32", "torch")
    monkeypatch.setattr(shortlist, "_TILE_ROWS", 7)

    tiled = _listed(queries, bank, 10, "float32", "torch")

    assert torch.equal(tiled.rows, whole.rows)


def test_faiss_that_is_asked_for_and_not_there_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)

    with pytest.raises(UsageError, match="faiss is not installed\npip install faiss-gpu"):
        _listed(_rows(2, 4), _rows(9, 4), 1, "float32", "faiss")


def test_torch_stands_in_for_faiss_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = _rows(5, 8), _rows(90, 8, seed=1)
    by_faiss = _listed(queries, bank, 3, "float32", "faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)

    assert torch.equal(_listed(queries, bank, 3, "float32", "auto").rows, by_faiss.rows)


@pytest.mark.parametrize(("pays", "first"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_comes_first_where_it_was_measured_to_pay(
    pays: bool, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortlist, "bfloat16_pays", lambda: pays)

    assert arithmetics(torch.device("cpu"), "auto")[0] == first
    assert arithmetics(torch.device("cpu"), "auto")[-1] == "float64"
