"""The rows to search among: what is checked and measured, and the exact cosines with them."""

import math
from fractions import Fraction

import pytest
import torch

from msn_eval.errors import NumericalError
from msn_eval.probes import knn_search as index
from msn_eval.probes.knn_search import GRID, exact_cosines, index_rows


def _values(n: int = 20, d: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _all_pairs(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    row, query = (
        part.flatten() for part in torch.meshgrid(torch.arange(len(bank)), torch.arange(len(queries)), indexing="ij")
    )
    cosines = exact_cosines(index_rows(queries), index_rows(bank), query, row)
    return cosines.view(len(bank), len(queries)).T


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_named(bad: float) -> None:
    values = _values()
    values[3, 5], values[11, 0] = bad, bad

    with pytest.raises(NumericalError) as caught:
        index_rows(values)

    assert str(caught.value) == (
        "2 of 20 labelled rows are not finite: 3, 11\nThe features overflowed; retry with --precision fp32."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_moves_by_at_most_the_bound(dtype: torch.dtype) -> None:
    values = _values(50, 64)

    rounded, moved = index_rows(values).round(dtype)

    true = (rounded.double() - values.double() / values.double().norm(dim=1, keepdim=True)).norm(dim=1)
    assert (moved >= true).all()
    torch.testing.assert_close(moved, true, rtol=1e-6, atol=1e-13)


def test_half_precision_rows_are_searched_in_float32() -> None:
    assert index_rows(_values().half()).values.dtype == torch.float32


@pytest.mark.parametrize("d", [1, 3, 64, 385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_are_within_the_stated_distance_of_exact_ones(d: int, dtype: torch.dtype) -> None:
    queries, bank = _values(4, d, dtype=dtype), _values(9, d, seed=1, dtype=dtype)

    cosines = _all_pairs(queries, bank)

    for query, result in zip(queries.tolist(), cosines.tolist(), strict=True):
        for row, cosine in zip(bank.tolist(), result, strict=True):
            dot = float(sum(Fraction(one) * Fraction(other) for one, other in zip(query, row, strict=True)))
            assert abs(cosine - dot / math.hypot(*query) / math.hypot(*row)) <= GRID / 2 + (d + 16) * 2.0**-53
            assert cosine / GRID == round(cosine / GRID)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 100, 769])
def test_folding_sums_every_term_once(width: int) -> None:
    powers = 2.0 ** (torch.arange(width) % 50).double()

    assert index._folded_sum(powers[None].clone()).item() == math.fsum(powers.tolist())


@pytest.mark.parametrize("d", [5, 384])
@pytest.mark.parametrize("wide", [0, 1 << 26], ids=["gathered", "kept in float64"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_pair_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    d: int, wide: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, bank = _values(6, d), _values(40, d, seed=1)
    together = _all_pairs(queries, bank)
    monkeypatch.setattr(index, "_WIDE_VALUES", wide)
    monkeypatch.setattr(index, "_STEP_VALUES", 7 * d)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    in_parts = _all_pairs(queries, bank)
    alone = torch.stack([torch.cat([_all_pairs(query[None], row[None])[0] for row in bank]) for query in queries])

    torch.set_num_threads(before)
    assert torch.equal(in_parts, together)
    assert torch.equal(alone, together)


def test_a_row_twice_as_long_has_the_same_bits() -> None:
    queries, bank = _values(6, 50), _values(40, 50, seed=1)

    assert torch.equal(_all_pairs(queries, 2 * bank), _all_pairs(queries, bank))


@pytest.mark.parametrize("size", [1e-44, 1e-20, 3e37])
def test_rows_of_any_float32_size_have_cosines(size: float) -> None:
    values = torch.tensor([[1.0, -1.0, 2.0]]) * size

    assert _all_pairs(values, values).item() == pytest.approx(1, abs=1e-15)


def test_equal_cosines_of_unlike_rows_are_ties() -> None:
    # Mathematically one cosine, sums of different terms: in float64 alone they differ in their last bits.
    query = torch.full((1, 100), 0.1, dtype=torch.float64)
    row = _values(1, 100, dtype=torch.float64)[0]
    orders = [torch.randperm(100, generator=torch.Generator().manual_seed(seed)) for seed in range(50)]

    assert len(_all_pairs(query, torch.stack([row[order] for order in orders])).unique()) == 1


def test_a_zero_row_has_the_cosine_zero() -> None:
    result = _all_pairs(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]]))

    assert result.tolist() == [[0, 0], [0, 1]]
