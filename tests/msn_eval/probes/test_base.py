"""What probes share: each row is normalised alone, bad labelled images are refused, and labels are ranked."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes import base
from msn_eval.probes.base import (
    FeatureProbe,
    centre_rows,
    describe_collapse,
    fit_probe,
    normalise_rows,
    rank_labels,
    summarise_probabilities,
)
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.ncm import NearestClassMean
from msn_eval.probes.ridge import Ridge

RowsOf = Callable[[torch.Tensor], torch.Tensor]


def _values(n: int = 7, d: int = 12) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 3


def test_normalised_rows_have_unit_length_and_their_direction() -> None:
    values = _values()

    rows = normalise_rows(values)

    torch.testing.assert_close(rows.norm(dim=1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(rows * values.double().norm(dim=1, keepdim=True), values.double())


def test_centred_rows_have_zero_mean_and_unit_length() -> None:
    rows = centre_rows(_values())

    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_centred_rows_ignore_the_scale_and_the_offset_of_each_row() -> None:
    values = _values().double()
    scale = torch.linspace(0.5, 20, len(values), dtype=torch.float64)[:, None]

    rows = centre_rows(scale * values - 5 * scale)

    torch.testing.assert_close(rows, centre_rows(values))


@pytest.mark.parametrize("rows_of", [normalise_rows, centre_rows])
def test_a_zero_row_stays_zero(rows_of: RowsOf) -> None:
    values = _values()
    values[2] = 0

    rows = rows_of(values)

    assert torch.equal(rows[2], torch.zeros(12, dtype=torch.float64))
    assert rows.isfinite().all()


@pytest.mark.parametrize("level", [1e-30, 0.1, -1 / 3, 12345.678, 3e38])
@pytest.mark.parametrize("d", [3, 384, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_row_becomes_zero_whatever_the_rounding_of_its_mean(
    level: float, d: int, dtype: torch.dtype
) -> None:
    rows = centre_rows(torch.full((2, d), level, dtype=dtype))

    assert torch.equal(rows, torch.zeros(2, d, dtype=torch.float64))


def test_a_row_with_a_value_at_its_mean_is_not_constant() -> None:
    rows = centre_rows(torch.tensor([[1.0, 2.0, 3.0]]))

    torch.testing.assert_close(rows, torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64) / 2**0.5)


def test_a_row_one_float32_step_from_constant_is_not_constant() -> None:
    values = torch.full((1, 384), 0.1)
    values[0, 5] = torch.nextafter(values[0, 5], torch.tensor(1.0))

    rows = centre_rows(values)

    assert rows.norm().item() == pytest.approx(1)
    assert rows.argmax().item() == 5


@pytest.mark.parametrize("size", [1e-44, 1e-20, 1e38])
def test_rows_of_any_float32_size_reach_unit_length(size: float) -> None:
    values = torch.tensor([[1.0, -1.0, 2.0]]) * size

    assert normalise_rows(values).norm().item() == pytest.approx(1)
    assert centre_rows(values).norm().item() == pytest.approx(1)


@pytest.mark.parametrize("rows_of", [normalise_rows, centre_rows])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows_of: RowsOf) -> None:
    values = _values()

    together = rows_of(values)

    torch.testing.assert_close(torch.cat([rows_of(row[None]) for row in values]), together, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("rows_of", [normalise_rows, centre_rows])
def test_the_features_themselves_are_unchanged(rows_of: RowsOf) -> None:
    values = _values().double()
    before = values.clone()

    rows_of(values)

    assert torch.equal(values, before)


CPU = torch.device("cpu")
PROBES = [Logistic(lambdas=(0.0025,)), NearestNeighbours(ks=(3,)), Ridge(), NearestClassMean()]


@pytest.fixture(params=PROBES, ids=lambda probe: str(probe.name))
def probe(request: pytest.FixtureRequest) -> FeatureProbe:
    chosen: FeatureProbe = request.param
    return chosen


def _features(values: torch.Tensor, labels: torch.Tensor, n_classes: int = 4) -> Features:
    ids = tuple(f"{row}.png" for row in range(len(values)))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=n_classes, tap="cls")


def _clusters(n: int = 20, d: int = 6) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    return _features(
        3 * torch.randn(4, d, generator=generator)[labels] + torch.randn(n, d, generator=generator), labels
    )


def _change(name: str, train: Features) -> Features:
    match name:
        case "single class":
            return replace(train, labels=torch.full((20,), 2))
        case "negative label" | "large label":
            labels = train.labels.clone()
            labels[7] = -1 if name == "negative label" else 4
            return replace(train, labels=labels)
        case _:
            train.values[range(9, 16) if name == "many rows" else 3, 0] = torch.nan if name == "nan" else torch.inf
            return train


_NOT_FINITE = "features at tap cls are not finite for"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("single class", "the 20 labelled images are of a single class\nLabel images of at least two classes."),
        ("negative label", "1 label is outside of 0 to 3, first 7.png has -1\nNumber the classes from 0."),
        ("large label", "1 label is outside of 0 to 3, first 7.png has 4\nNumber the classes from 0."),
        ("nan", f"{_NOT_FINITE} 1 labelled image, first 3.png\nRetry with --precision fp32."),
        ("inf", f"{_NOT_FINITE} 1 labelled image, first 3.png\nRetry with --precision fp32."),
        ("many rows", f"{_NOT_FINITE} 7 labelled images, first 9.png, 10.png, 11.png, 12.png, 13.png\nRetry"),
    ],
)
def test_labelled_images_that_cannot_be_learnt_from_are_refused(probe: FeatureProbe, name: str, message: str) -> None:
    with pytest.raises(NumericalError) as caught:
        fit_probe(probe, _change(name, _clusters()), CPU)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_constant_features_are_scored_at_chance(probe: FeatureProbe, level: float) -> None:
    train = _features(torch.full((20, 6), level), torch.arange(20) % 4)

    (scores,) = fit_probe(probe, train, CPU).scores(torch.full((40, 6), level))

    prediction, _ = rank_labels(scores, torch.arange(40) % 4)  # refuses NaN
    assert int((prediction == torch.arange(40) % 4).sum()) == 10


def test_zero_rows_among_others_are_harmless(probe: FeatureProbe) -> None:
    train = _clusters()
    train.values[5] = 0

    (scores,) = fit_probe(probe, train, CPU).scores(torch.cat([train.values, torch.zeros(1, 6)]))

    prediction, _ = rank_labels(scores[[*range(5), *range(6, 20)]], train.labels[[*range(5), *range(6, 20)]])
    assert not scores.isnan().any()
    assert (prediction == train.labels[[*range(5), *range(6, 20)]]).double().mean() >= 0.9


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_separable_features_of_any_scale_are_separated(probe: FeatureProbe, scale: float) -> None:
    train = _features(scale * torch.eye(4, 12).repeat(5, 1), torch.arange(20) % 4)

    fitted = fit_probe(probe, train, CPU)

    (scores,) = fitted.scores(train.values)
    assert fitted.settings[0].converged in (True, None)
    assert scores.argmax(dim=1).tolist() == train.labels.tolist()


@pytest.mark.parametrize(("value", "zeros"), [(0.0, "5,000"), (0.7, "0")])
def test_features_of_one_value_have_collapsed(value: float, zeros: str) -> None:
    assert describe_collapse(torch.full((5000, 8), value)) == (
        "collapsed representation: all images have the same features, up to scale and offset; "
        f"5,000 of 5,000 images have constant features, {zeros} of them zero"
    )


def _noisy(noise: float, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(d, generator=generator) + noise * torch.randn(50, d, generator=generator)


@pytest.mark.parametrize("block_rows", [4096, 3])
def test_one_vector_with_float32_noise_has_collapsed(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_BLOCK_ROWS", block_rows)

    assert describe_collapse(_noisy(1e-6, 8)).startswith("collapsed representation")


@pytest.mark.parametrize(
    "values",
    [_noisy(0.03, 64), _clusters().values, _clusters().values[:1], torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])],
    ids=[
        "similar rows",
        "clusters",
        "one row",
        "values at the mean",
    ],  # similar: a thousandth of the squared length differs
)
def test_good_features_have_not_collapsed(values: torch.Tensor) -> None:
    assert describe_collapse(values) == ""


def test_zero_rows_among_good_ones_are_counted() -> None:
    values = _clusters().values
    values[[2, 9]] = 0

    assert describe_collapse(values) == "2 of 20 images have constant features, 2 of them zero"


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_predictions_and_ranks_are_those_of_a_stable_sort(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (300, 7), generator=generator).double()
    labels = torch.randint(7, (300,), generator=generator)

    prediction, rank = rank_labels(scores, labels)

    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    assert prediction.tolist() == order[:, 0].tolist()
    assert rank.tolist() == [row.tolist().index(label) + 1 for row, label in zip(order, labels.tolist(), strict=True)]


def test_equal_scores_rank_by_smaller_class_index() -> None:
    scores = torch.tensor([[0.2, 0.7, 0.7, 0.7]]).repeat(4, 1)

    prediction, rank = rank_labels(scores, torch.arange(4))

    assert prediction.tolist() == [1, 1, 1, 1]
    assert rank.tolist() == [4, 1, 2, 3]


def test_classes_that_cannot_be_predicted_rank_last() -> None:
    scores = torch.tensor([[-torch.inf, -1e300, -torch.inf, 0.5]], dtype=torch.float64).repeat(4, 1)

    prediction, rank = rank_labels(scores, torch.arange(4))

    assert prediction.tolist() == [3, 3, 3, 3]
    assert rank.tolist() == [3, 2, 4, 1]


def test_float64_scores_are_not_rounded_into_ties() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)

    prediction, _ = rank_labels(scores, torch.tensor([0]))

    assert prediction.tolist() == [1]


def test_nan_is_refused() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan

    with pytest.raises(NumericalError) as caught:
        rank_labels(scores, torch.zeros(3, dtype=torch.int64))

    assert str(caught.value) == ("scores are NaN\nThe features or the fit overflowed; retry with --precision fp32.")


def test_probabilities_are_summed_up_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    scores[:, 3] = -torch.inf
    labels = torch.arange(50) % 7
    monkeypatch.setattr(base, "_BLOCK_VALUES", 25)  # blocks of three rows

    confidence, of_label, squares = summarise_probabilities(scores, labels)

    expected = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    assert torch.allclose(confidence, expected.amax(dim=1).float(), atol=1e-7)
    assert torch.allclose(of_label, expected[torch.arange(50), labels].float(), atol=1e-7)
    assert torch.allclose(squares, expected.square().sum(dim=1).float(), atol=1e-7)
    assert (of_label[labels == 3] == 0).all()


def test_infinite_scores_are_no_probabilities() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.inf

    with pytest.raises(NumericalError, match="scores are infinite"):
        summarise_probabilities(scores, torch.zeros(3, dtype=torch.int64))
