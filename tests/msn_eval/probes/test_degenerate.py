"""Degenerate features and labels: refused with what to do, or scored at chance; never NaN."""

from dataclasses import replace

import pytest
import torch

from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes import Probe, degenerate, fit
from msn_eval.probes.degenerate import describe_collapse
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.ncm import NearestClassMean
from msn_eval.probes.ranking import rank_labels
from msn_eval.probes.ridge import Ridge

CPU = torch.device("cpu")
PROBES = [Logistic(lambdas=(0.0025,)), NearestNeighbours(ks=(3,)), Ridge(), NearestClassMean()]


@pytest.fixture(params=PROBES, ids=lambda probe: str(probe.name))
def probe(request: pytest.FixtureRequest) -> Probe:
    chosen: Probe = request.param
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


def _refusal(probe: Probe, train: Features) -> str:
    with pytest.raises(NumericalError) as caught:
        fit(probe, train, CPU)
    return str(caught.value)


def test_single_class_is_refused_by_every_probe(probe: Probe) -> None:
    train = replace(_clusters(), labels=torch.full((20,), 2))

    assert _refusal(probe, train) == (
        "the 20 labelled images are of a single class\nLabel images of at least two classes."
    )


@pytest.mark.parametrize(("label", "count"), [(-1, 1), (4, 1)])
def test_label_out_of_range_is_named_by_every_probe(probe: Probe, label: int, count: int) -> None:
    train = _clusters()
    labels = train.labels.clone()
    labels[7] = label

    told = _refusal(probe, replace(train, labels=labels))

    assert told == f"{count} labels are outside of 0 to 3, first 7.png has {label}\nNumber the classes from 0."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_that_is_not_finite_is_named_by_every_probe(probe: Probe, value: float) -> None:
    train = _clusters()
    train.values[3, 2] = value

    assert _refusal(probe, train) == (
        "features at tap cls are not finite for 1 labelled images, first 3.png\nRetry with --precision fp32."
    )


def test_of_many_rows_that_are_not_finite_the_first_five_are_named() -> None:
    train = _clusters()
    train.values[9:16, 0] = torch.inf

    assert _refusal(PROBES[0], train).startswith(
        "features at tap cls are not finite for 7 labelled images, first 9.png, 10.png, 11.png, 12.png, 13.png\n"
    )


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_constant_features_are_scored_at_chance(probe: Probe, level: float) -> None:
    train = _features(torch.full((20, 6), level), torch.arange(20) % 4)

    (scores,) = fit(probe, train, CPU).scores(torch.full((40, 6), level))

    prediction, _ = rank_labels(scores, torch.arange(40) % 4)  # refuses NaN
    assert int((prediction == torch.arange(40) % 4).sum()) == 10


def test_zero_rows_among_others_do_no_harm(probe: Probe) -> None:
    train = _clusters()
    train.values[5] = 0

    (scores,) = fit(probe, train, CPU).scores(torch.cat([train.values, torch.zeros(1, 6)]))

    prediction, _ = rank_labels(scores[[*range(5), *range(6, 20)]], train.labels[[*range(5), *range(6, 20)]])
    assert not scores.isnan().any()
    assert (prediction == train.labels[[*range(5), *range(6, 20)]]).double().mean() >= 0.9


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_separable_features_of_any_scale_are_separated(probe: Probe, scale: float) -> None:
    train = _features(scale * torch.eye(4, 12).repeat(5, 1), torch.arange(20) % 4)

    fitted = fit(probe, train, CPU)

    (scores,) = fitted.scores(train.values)
    assert fitted.settings[0].converged in (True, None)
    assert scores.argmax(dim=1).tolist() == train.labels.tolist()


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_features_of_one_value_are_told_to_have_collapsed(value: float) -> None:
    told = describe_collapse(torch.full((5000, 8), value))

    zeros = "5,000" if value == 0 else "0"
    assert told == (
        "collapsed representation: all images have the same features, up to scale and offset; "
        f"5,000 of 5,000 images have constant features, {zeros} of them zero"
    )


def test_one_vector_with_float32_noise_is_told_to_have_collapsed() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, generator=generator) + 1e-6 * torch.randn(50, 8, generator=generator)

    assert describe_collapse(values).startswith("collapsed representation")


def test_collapse_is_seen_over_more_rows_than_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(degenerate, "_BLOCK_ROWS", 3)
    values = torch.randn(8, generator=torch.Generator().manual_seed(0)).repeat(50, 1)

    assert describe_collapse(values).startswith("collapsed representation")


def test_features_alike_as_those_of_networks_may_be_have_not_collapsed() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator) + 0.03 * torch.randn(50, 64, generator=generator)

    assert describe_collapse(values) == ""  # what differs is a thousandth of the squared length


def test_one_image_alone_has_not_collapsed() -> None:
    assert describe_collapse(_clusters().values[:1]) == ""


def test_values_at_the_mean_of_their_row_do_not_make_it_constant() -> None:
    assert describe_collapse(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])) == ""


def test_zero_rows_are_counted_where_the_rest_is_sound() -> None:
    train = _clusters()
    train.values[[2, 9]] = 0

    assert describe_collapse(train.values) == "2 of 20 images have constant features, 2 of them zero"


def test_nothing_is_told_of_sound_features() -> None:
    assert describe_collapse(_clusters().values) == ""
