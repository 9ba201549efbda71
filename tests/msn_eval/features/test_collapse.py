"""The spectrum of features against singular values by NumPy and against spectra with a known exponent."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from msn_eval.features import collapse
from msn_eval.features.collapse import Spectrum, effective_rank, is_collapsed, measure_spectrum


def _noise(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n)) + 0.5


@pytest.mark.parametrize(("n", "d"), [(300, 20), (20, 300), (40, 40)])
def test_rankme_is_the_exponential_of_the_entropy_of_singular_values(n: int, d: int) -> None:
    singular = np.linalg.svd(_noise(n, d).double().numpy(), compute_uv=False)
    shares = singular / singular.sum()

    spectrum = measure_spectrum(_noise(n, d))

    assert spectrum.rankme == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=1e-4)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("d", [13, 60, 200])
def test_alpha_is_the_exponent_of_the_eigenvalues_of_the_covariance(exponent: float, d: int) -> None:
    left = torch.linalg.qr(_noise(400, d).double() - _noise(400, d).double().mean(dim=0))[0]
    right = torch.linalg.qr(_noise(d, d).double())[0]
    features = left * torch.arange(1, d + 1).double() ** (-exponent / 2) @ right.T + 3  # the offset is not part of it

    assert measure_spectrum(features).alpha == pytest.approx(exponent, abs=2e-4)


@pytest.mark.parametrize(
    ("features", "spectrum"),
    [
        (_noise(1, 30), Spectrum(images=1, rankme=None, alpha=None)),
        (torch.zeros(50, 30), Spectrum(images=50, rankme=None, alpha=None)),
        (_noise(1, 30).expand(50, -1), Spectrum(images=50, rankme=1.0, alpha=None)),
    ],
)
def test_degenerate_features_have_no_spectrum(features: Tensor, spectrum: Spectrum) -> None:
    assert measure_spectrum(features) == spectrum


def test_twelve_eigenvalues_are_too_few_for_an_exponent() -> None:
    assert measure_spectrum(_noise(100, 12)).alpha is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_rank_and_are_not_collapsed(value: float) -> None:
    features = torch.randn(6, 4).index_fill_(0, torch.tensor([2]), value)

    rank = effective_rank(features)

    assert math.isnan(rank)
    assert not is_collapsed({"feature_rank": rank})


def test_many_features_are_represented_by_rows_at_equal_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    features = _noise(100, 20)
    expected = measure_spectrum(features[[row * 100 // 30 for row in range(30)]])
    monkeypatch.setattr(collapse, "SPECTRUM_ROWS", 30)

    assert measure_spectrum(features) == expected
    assert expected.images == 30


def test_blocks_of_rows_do_not_change_the_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measure_spectrum(_noise(100, 20))
    monkeypatch.setattr(collapse, "_BLOCK_ROWS", 7)

    assert measure_spectrum(_noise(100, 20)) == expected
