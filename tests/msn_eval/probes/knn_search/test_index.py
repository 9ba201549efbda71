"""Banks: what is checked, measured and found equal before a search."""

import math

import pytest
import torch

from msn_eval.errors import NumericalError
from msn_eval.probes.knn_search import index as bank_module
from msn_eval.probes.knn_search import index as cosine
from msn_eval.probes.knn_search.index import GRID, cosines_of_rows, folded_sum, index_bank, row_lengths


def _values(n: int = 20, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_named(bad: float) -> None:
    values = _values()
    values[3, 5], values[11, 0] = bad, bad

    with pytest.raises(NumericalError) as caught:
        index_bank(values)

    assert str(caught.value) == (
        "2 of 20 labelled rows are not finite: 3, 11\nThe features overflowed; retry with --precision fp32."
    )


def test_a_bank_without_copies_is_kept_as_it_is() -> None:
    values = _values()

    bank = index_bank(values)

    assert bank.copies is None
    assert torch.equal(bank.values, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_are_found_and_listed_from_the_earliest_on(dtype: torch.dtype) -> None:
    values = _values().to(dtype)
    values[[4, 9, 17]] = values[2].clone()
    values[[1, 19]] = values[0].clone()

    bank = index_bank(values)

    assert bank.copies is not None
    assert bank.copies.first.tolist() == [0, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 18]
    assert bank.copies.ids.tolist() == [0, 1, 19, 2, 4, 9, 17, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 18]
    assert bank.copies.starts.tolist() == [0, 3, 7, *range(8, 21)]
    assert bank.rows == 20


def test_minus_zero_is_zero() -> None:
    bank = index_bank(torch.tensor([[0.0, 1.0], [-0.0, 1.0]]))

    assert len(bank.values) == 1


def test_rows_that_only_share_a_hash_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "_hashes", lambda values: torch.zeros(len(values), dtype=torch.int64))
    values = _values()

    assert index_bank(values).copies is None


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_drift_is_how_far_rounding_moved_each_unit_row(kind: str) -> None:
    values = _values(50, 64)
    bank = index_bank(values)

    rounded = getattr(bank, kind)

    unit = values.double() / values.double().norm(dim=1, keepdim=True)
    moved = (rounded.values.double() - unit).norm(dim=1)
    assert (rounded.drift >= moved).all()
    torch.testing.assert_close(rounded.drift, moved, rtol=1e-6, atol=1e-13)


def test_half_precision_rows_are_searched_in_float32() -> None:
    assert index_bank(_values().half()).values.dtype == torch.float32


def test_a_copy_in_float64_is_kept_where_there_is_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _values()

    monkeypatch.setattr(bank_module, "available_bytes", lambda: None)
    kept = index_bank(values).wide
    monkeypatch.setattr(bank_module, "available_bytes", lambda: values.numel() * 8)
    short_of_memory = index_bank(values).wide
    monkeypatch.setattr(bank_module, "available_bytes", lambda: None)
    monkeypatch.setattr(bank_module, "_WIDE_VALUES", values.numel() - 1)
    too_large = index_bank(values).wide

    assert kept is not None
    assert torch.equal(kept, values.double())
    assert short_of_memory is None
    assert too_large is None


def _cosine_values(n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _all_pairs(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(bank)).repeat(len(queries), 1)
    return cosines_of_rows(queries, row_lengths(queries), bank, row_lengths(bank), rows)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 100, 769])
def test_every_term_is_summed_once(width: int) -> None:
    powers = 2.0 ** (torch.arange(width) % 50).double()

    assert folded_sum(powers[None].clone()).item() == math.fsum(powers.tolist())


@pytest.mark.parametrize("width", [96, 97, 385, 769])
def test_sums_are_folded_half_upon_half(width: int) -> None:
    terms = _cosine_values(3, width, dtype=torch.float64)
    expected = terms.tolist()
    for row in expected:
        while len(row) > 1:
            half, odd = len(row) // 2, row[-1] if len(row) % 2 else 0.0
            row[:] = [one + other for one, other in zip(row[:half], row[half:], strict=False)]
            row[0] += odd

    assert folded_sum(terms).tolist() == [row[0] for row in expected]


@pytest.mark.parametrize("d", [1, 3, 64, 385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_are_within_the_stated_distance_of_correctly_rounded_sums(d: int, dtype: torch.dtype) -> None:
    queries, bank = _cosine_values(4, d, dtype=dtype), _cosine_values(9, d, seed=1, dtype=dtype)

    found = _all_pairs(queries, bank)

    for query, mine in zip(queries.tolist(), found.tolist(), strict=True):
        for row, one in zip(bank.tolist(), mine, strict=True):
            true = math.sumprod(query, row) if hasattr(math, "sumprod") else _dot(query, row)
            assert abs(one - true / math.hypot(*query) / math.hypot(*row)) <= GRID / 2 + (d + 16) * 2.0**-53


def _dot(left: list[float], right: list[float]) -> float:
    from fractions import Fraction

    return float(sum(Fraction(one) * Fraction(other) for one, other in zip(left, right, strict=True)))


@pytest.mark.parametrize("copy", [True, False], ids=["float64 copy", "gathered"])
@pytest.mark.parametrize("d", [1, 5, 384, 769])
def test_cosines_are_the_folded_ones_on_their_grid(d: int, copy: bool) -> None:
    queries, bank = _cosine_values(30, d), _cosine_values(200, d, seed=1)
    rows = torch.arange(200).repeat(30, 1)

    found = cosines_of_rows(
        queries, row_lengths(queries), bank, row_lengths(bank), rows, wide=bank.double() if copy else None
    )

    folded = torch.stack([folded_sum(bank.double() * query.double()) for query in queries])
    expected = (folded / (row_lengths(queries)[:, None] * row_lengths(bank)) / GRID).round() * GRID
    assert torch.equal(found, expected)


def test_pairs_near_the_middle_between_two_multiples_go_where_the_folded_sum_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One long axis makes cosines of a wanted size: these lie next to the middles, to either side.
    middles = (torch.arange(400) * 977 + 0.5) * GRID + torch.linspace(-3e-15, 3e-15, 400, dtype=torch.float64)
    bank = torch.stack([middles, (1 - middles.square()).sqrt()], dim=1)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    exact = _all_pairs(query, bank)
    library = cosine._sampled_dots
    monkeypatch.setattr(cosine, "_sampled_dots", lambda *given: library(*given) + 1e-15)

    assert torch.equal(_all_pairs(query, bank), exact)
    monkeypatch.setattr(cosine, "_distance", lambda d: 0.0)
    assert not torch.equal(_all_pairs(query, bank), exact)


def test_a_sum_that_loses_every_later_term_is_within_the_distance() -> None:
    terms = torch.cat([torch.ones(1), torch.full((768,), 2.0**-54)]).double()
    one_by_one = 0.0
    for term in terms.tolist():
        one_by_one += term

    lost = folded_sum(terms[None].clone()).item() - one_by_one

    assert 700 * 2.0**-54 < lost < cosine._distance(769)


@pytest.mark.parametrize("d", [5, 384])
@pytest.mark.parametrize("pairs", [3, 100])
def test_a_pair_has_the_same_bits_in_every_company(d: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = _cosine_values(6, d), _cosine_values(40, d, seed=1)
    whole = _all_pairs(queries, bank)
    for room in ("_CPU_VALUES", "_GATHERED_VALUES"):
        monkeypatch.setattr(cosine, room, pairs * d)

    in_parts = _all_pairs(queries, bank)

    alone = torch.stack([torch.cat([_all_pairs(query[None], row[None])[0] for row in bank]) for query in queries])
    assert torch.equal(in_parts, whole)
    assert torch.equal(alone, whole)


@pytest.mark.parametrize("copy", [True, False], ids=["float64 copy", "gathered"])
def test_no_more_than_the_first_rows_wanted_are_taken(copy: bool) -> None:
    queries, bank = _cosine_values(4, 20), _cosine_values(30, 20, seed=1)
    rows = torch.arange(30).repeat(4, 1)
    counts = torch.tensor([3, 0, 30, 1])
    lengths = row_lengths(queries), row_lengths(bank)

    found = cosines_of_rows(
        queries, lengths[0], bank, lengths[1], rows, counts=counts, wide=bank.double() if copy else None
    )

    wanted = torch.arange(30) < counts[:, None]
    assert torch.equal(found, _all_pairs(queries, bank).masked_fill(~wanted, -torch.inf))


def test_a_row_twice_as_long_has_the_same_bits() -> None:
    queries, bank = _cosine_values(6, 50), _cosine_values(40, 50, seed=1)

    assert torch.equal(_all_pairs(queries, 2 * bank), _all_pairs(queries, bank))


@pytest.mark.parametrize("size", [1e-44, 1e-20, 3e37])
def test_rows_of_any_float32_size_have_cosines(size: float) -> None:
    values = torch.tensor([[1.0, -1.0, 2.0]]) * size

    assert _all_pairs(values, values).item() == pytest.approx(1, abs=1e-15)


def test_equal_cosines_of_unlike_rows_are_ties() -> None:
    # Mathematically one cosine, sums of other terms: in float64 alone they differ in their last bits.
    query = torch.full((1, 100), 0.1, dtype=torch.float64)
    bank = torch.stack([_cosine_values(1, 100, dtype=torch.float64)[0][_order(seed)] for seed in range(50)])

    assert len(_all_pairs(query, bank).unique()) == 1


def _order(seed: int) -> torch.Tensor:
    return torch.randperm(100, generator=torch.Generator().manual_seed(seed))


def test_a_zero_row_has_the_cosine_zero() -> None:
    found = _all_pairs(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]]))

    assert found.tolist() == [[0, 0], [0, 1]]
