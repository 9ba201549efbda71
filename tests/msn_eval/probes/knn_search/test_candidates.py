"""Candidates: the bound on what fast products lose, and their dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from msn_eval.errors import NumericalError, UsageError
from msn_eval.probes import knn_search as search_module
from msn_eval.probes.knn_search import Candidates, Stage, choose_stages, find_candidates, index_rows, search_nearest

_EVERY_STAGE = pytest.mark.parametrize("stage", [torch.bfloat16, torch.float32, torch.float64, "faiss"], ids=str)


def _rows(n: int, d: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _find(queries: Tensor, bank: Tensor, k: int, stage: Stage) -> Candidates:
    return find_candidates(index_rows(queries), index_rows(bank), k, stage)


def _cosines(queries: Tensor, bank: Tensor) -> Tensor:
    return normalize(queries.double()) @ normalize(bank.double()).T


@_EVERY_STAGE
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_no_product_is_further_from_its_cosine_than_the_bound(stage: Stage, offset: float) -> None:
    queries, bank = _rows(20, 96) + offset, _rows(300, 96, seed=1) + offset

    result = _find(queries, bank, 300, stage)

    assert result.complete.all()
    assert len(result.row) == 20 * 300
    assert ((result.product - _cosines(queries, bank)[result.query, result.row]).abs() <= result.bound).all()


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.bfloat16, 0.02), (torch.float32, 1e-4), (torch.float64, 1e-11)], ids=str
)
def test_the_bound_is_small_enough_to_prove_something(dtype: torch.dtype, largest: float) -> None:
    assert _find(_rows(5, 768), _rows(40, 768, seed=1), 4, dtype).bound.max() < largest


def test_the_bound_holds_where_every_rounding_goes_the_same_way() -> None:
    # 1 + 2^-8 lies half-way between two bfloat16 numbers: just below it, rounding is as large as it can be.
    row = torch.full((1, 251), (1 + 2.0**-8 - 2.0**-20) / 16, dtype=torch.float64)
    row[0, 250] = (1 - row[0, :250].square().sum()).sqrt()

    result = _find(row, row, 1, torch.bfloat16)

    assert 0.006 < (result.product[0] - 1).abs() <= result.bound[0]


def test_the_bound_covers_a_result_that_is_rounded_to_bfloat16() -> None:
    query = torch.full((1, 1024), 1 / 32)  # of length 1 and exact in bfloat16, as the row is
    row = query.clone()
    row[0, 0] *= -1

    result = _find(query, row, 1, torch.bfloat16)

    assert 0.001 < (result.product[0] - 511 / 512).abs() <= result.bound[0]


@_EVERY_STAGE
@pytest.mark.parametrize("k", [1, 20])
def test_candidates_hold_every_row_that_rounding_cannot_rule_out(stage: Stage, k: int) -> None:
    queries, bank = _rows(20, 96), _rows(3_003, 96, seed=1)  # many times k, and not a multiple of a group

    result = _find(queries, bank, k, stage)

    listed = torch.zeros(20, 3_003, dtype=torch.bool)
    listed[result.query, result.row] = True
    assert listed.gather(1, _cosines(queries, bank).topk(k, dim=1).indices).all()
    assert listed.sum(dim=1).max() < k + 120
    assert torch.equal(result.row, result.row.sort().values)


def test_a_query_with_too_many_candidates_is_left_incomplete() -> None:
    bank = torch.eye(8, dtype=torch.float64)[0] + 1e-9 * _rows(2_000, 8).double()

    result = _find(torch.cat([bank[:1], -bank[:1]]), torch.cat([bank, -bank[:40]]), 2, torch.float32)

    assert result.complete.tolist() == [False, True]
    assert set(result.query.tolist()) == {1}


def test_a_device_that_multiplies_wrongly_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_wrongly(*arguments: Any) -> Candidates:
        result = find_candidates(*arguments)
        return result._replace(product=result.product + 0.1)

    monkeypatch.setattr(search_module, "find_candidates", find_wrongly)
    monkeypatch.setattr(search_module, "choose_stages", lambda device, n, k, by: (torch.float32,))

    with pytest.raises(NumericalError, match="products in float32 on cpu are wrong by more than rounding explains"):
        search_nearest(_rows(5, 8, seed=1), _rows(50, 8), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_that_measures_fastest_comes_first_for_a_large_bank(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_is_bfloat16_fast", lambda: dtype == torch.bfloat16)
    cpu = torch.device("cpu")

    assert choose_stages(cpu, 4_096, 5, "torch")[0] == dtype
    assert choose_stages(cpu, 4_096, 5)[0] == (dtype if dtype == torch.bfloat16 else "faiss")
    assert choose_stages(cpu, 4_095, 5, "torch") == (torch.float32, torch.float64)
    assert isinstance(search_module._is_bfloat16_fast(), bool)


def test_search_by_faiss_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "find_spec", lambda name: None)

    assert choose_stages(torch.device("cpu"), 4_096, 5)[0] != "faiss"
    with pytest.raises(UsageError, match="faiss is not installed") as caught:
        search_nearest(_rows(2, 8), _rows(50, 8), 2, by="faiss")
    assert "faiss-cpu" in caught.value.hint
