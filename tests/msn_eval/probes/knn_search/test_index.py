"""Banks: what is checked, measured and found equal before a search."""

import pytest
import torch

from msn_eval.errors import NumericalError
from msn_eval.probes.knn_search import index as bank_module
from msn_eval.probes.knn_search.index import index_bank


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
