"""The probes against trusted libraries on features of real photographs: 100 classes of Tiny ImageNet."""

import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from msn_eval import extract, load_encoder
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FittedProbe, centre_rows, fit_probe, normalise_rows
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.logistic import Logistic, Solver
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, certify

_CPU = torch.device("cpu")
_LAMBDA = 0.0025
_PER_CLASS = {"train": 5, "val": 10}


@pytest.fixture(scope="module")
def splits(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Features, Features]:
    """Return features of 500 labelled and 1,000 validation images at the CLS token of a small untrained network."""
    folder = tmp_path_factory.mktemp("tiny")
    taken: Counter[str] = Counter()
    with tarfile.open(shared_data / "tinyimagenet100.tar.gz") as archive:
        for member in archive:
            place = os.path.dirname(member.name)  # noqa: PTH120
            split = place.partition("/")[0]
            if taken[place] < _PER_CLASS.get(split, 0):
                taken[place] += 1
                archive.extract(member, folder, filter="data")
    encoder = load_encoder("random:vit_tiny_patch16_224?img_size=64&depth=3", device="cpu")
    train, val = (extract(encoder, str(folder), split=split, tap="cls") for split in ("train", "val"))
    return train, val


def _predictions(fitted: FittedProbe, values: Tensor) -> Tensor:
    (scores,) = fitted.scores(values)
    return scores.argmax(dim=1)


@pytest.fixture(scope="module")
def scikit_learn(splits: tuple[Features, Features]) -> tuple[Tensor, float]:
    """Return scikit-learn's predictions and its objective, driven to a gradient of 1e-10."""
    train, val = splits
    rows = centre_rows(train.values)
    model = LogisticRegression(C=1 / _LAMBDA, fit_intercept=False, tol=1e-10, max_iter=20_000)
    model.fit(rows.numpy(), train.labels.numpy())
    problem = CrossEntropyProblem(rows=rows, labels=train.labels, n_classes=100, mu=_LAMBDA / len(rows))
    objective = certify(problem, torch.from_numpy(model.coef_)).objective
    return torch.from_numpy(model.predict(centre_rows(val.values).numpy())), objective


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_our_solvers_find_scikit_learns_minimum(
    solver: Solver, splits: tuple[Features, Features], scikit_learn: tuple[Tensor, float]
) -> None:
    fitted = fit_probe(Logistic(lambdas=(_LAMBDA,), solver=solver), splits[0], _CPU)

    assert fitted.settings[0].objective == pytest.approx(scikit_learn[1], rel=1e-6)


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_our_solvers_predict_what_scikit_learn_predicts(
    solver: Solver, splits: tuple[Features, Features], scikit_learn: tuple[Tensor, float]
) -> None:
    fitted = fit_probe(Logistic(lambdas=(_LAMBDA,), solver=solver), splits[0], _CPU)

    same = (_predictions(fitted, splits[1].values) == scikit_learn[0]).double().mean()

    assert same >= 0.995


def test_cyanure_is_within_three_tenths_of_a_point(splits: tuple[Features, Features]) -> None:
    train, val = splits

    accuracies = [
        (
            _predictions(fit_probe(Logistic(lambdas=(_LAMBDA,), solver=solver), train, _CPU), val.values) == val.labels
        ).double()
        for solver in ("newton", "cyanure")
    ]

    assert abs(float(accuracies[0].mean() - accuracies[1].mean())) <= 0.003


@pytest.mark.parametrize("k", [1, 10, 100])
def test_neighbours_vote_as_scikit_learns_do(k: int, splits: tuple[Features, Features]) -> None:
    train, val = splits
    bank, queries = normalise_rows(train.values).numpy(), normalise_rows(val.values).numpy()
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=_weights)
    expected = model.fit(bank, train.labels.numpy()).predict(queries)

    result = _predictions(fit_probe(NearestNeighbours(ks=(k,)), train, _CPU), val.values)

    assert (result == torch.from_numpy(expected)).all()


def _weights(distances):  # type: ignore[no-untyped-def]
    return torch.from_numpy((1 - distances) / 0.07).exp().numpy()
