"""Rows are centred and normalised each by itself."""

from collections.abc import Callable

import pytest
import torch

from msn_eval.probes.rows import centred_rows, normalised_rows

RowsOf = Callable[[torch.Tensor], torch.Tensor]


def _values(n: int = 7, d: int = 12) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 3


def test_normalised_rows_have_unit_length_in_float64() -> None:
    lengths = normalised_rows(_values()).norm(dim=1)

    torch.testing.assert_close(lengths, torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_normalised_rows_keep_their_direction() -> None:
    values = _values()

    rows = normalised_rows(values)

    torch.testing.assert_close(rows * values.double().norm(dim=1, keepdim=True), values.double())


def test_centred_rows_have_zero_mean_and_unit_length() -> None:
    rows = centred_rows(_values())

    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_centred_rows_forget_the_scale_and_the_offset_of_each_row() -> None:
    values = _values().double()
    scale = torch.linspace(0.5, 20, len(values), dtype=torch.float64)[:, None]

    rows = centred_rows(scale * values - 5 * scale)

    torch.testing.assert_close(rows, centred_rows(values))


@pytest.mark.parametrize("rows_of", [normalised_rows, centred_rows])
def test_a_zero_row_stays_zero(rows_of: RowsOf) -> None:
    values = _values()
    values[2] = 0

    rows = rows_of(values)

    assert torch.equal(rows[2], torch.zeros(12, dtype=torch.float64))
    assert rows.isfinite().all()


@pytest.mark.parametrize("level", [1e-30, 0.1, -1 / 3, 12345.678, 3e38])
@pytest.mark.parametrize("d", [3, 384, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_row_becomes_zero_whatever_rounding_its_mean_suffers(
    level: float, d: int, dtype: torch.dtype
) -> None:
    rows = centred_rows(torch.full((2, d), level, dtype=dtype))

    assert torch.equal(rows, torch.zeros(2, d, dtype=torch.float64))


def test_a_row_with_values_at_its_mean_is_not_taken_for_constant() -> None:
    rows = centred_rows(torch.tensor([[1.0, 2.0, 3.0]]))

    torch.testing.assert_close(rows, torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64) / 2**0.5)


def test_a_row_one_float32_step_from_constant_is_not_taken_for_constant() -> None:
    values = torch.full((1, 384), 0.1)
    values[0, 5] = torch.nextafter(values[0, 5], torch.tensor(1.0))

    rows = centred_rows(values)

    assert rows.norm().item() == pytest.approx(1)
    assert rows.argmax().item() == 5


@pytest.mark.parametrize("size", [1e-44, 1e-20, 1e38])
def test_rows_of_any_float32_size_reach_unit_length(size: float) -> None:
    values = torch.tensor([[1.0, -1.0, 2.0]]) * size

    assert normalised_rows(values).norm().item() == pytest.approx(1)
    assert centred_rows(values).norm().item() == pytest.approx(1)


@pytest.mark.parametrize("rows_of", [normalised_rows, centred_rows])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows_of: RowsOf) -> None:
    values = _values()

    together = rows_of(values)

    torch.testing.assert_close(torch.cat([rows_of(row[None]) for row in values]), together, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("rows_of", [normalised_rows, centred_rows])
def test_the_features_themselves_are_left_as_they_were(rows_of: RowsOf) -> None:
    values = _values().double()
    before = values.clone()

    rows_of(values)

    assert torch.equal(values, before)
