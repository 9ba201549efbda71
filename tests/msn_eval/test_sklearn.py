"""The probes as scikit-learn estimators: its own checks, and the numbers of the protocols."""

import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any
from unittest import SkipTest

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import estimator_checks_generator

from msn_eval import sklearn as estimators
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, centre_rows, fit_probe
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.linear import Recipe, train_heads
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.logistic_solvers.objective import Solution, certify
from msn_eval.probes.ncm import NearestClassMean as MeanProbe
from msn_eval.probes.ridge import Ridge, solve_ridge
from msn_eval.sklearn import LinearProbe, LogisticProbe, NearestClassMean, NearestNeighbourProbe, RidgeProbe

_ESTIMATORS = [LogisticProbe(), NearestNeighbourProbe(), NearestClassMean(), RidgeProbe(), LinearProbe(epochs=20)]
_IDS = [type(item).__name__ for item in _ESTIMATORS]
_EVERY = pytest.mark.parametrize("estimator", _ESTIMATORS, ids=_IDS)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X[:300], y[:300], X[300:500], y[300:500]


@pytest.mark.filterwarnings("ignore:k = 20 neighbours among", "ignore:the relative duality gap is")
@_EVERY
def test_scikit_learns_own_checks_pass(estimator: Any) -> None:
    failed = []
    for item, check in estimator_checks_generator(estimator):
        try:
            check(item)
        except SkipTest as skipped:  # of array libraries beside NumPy, which torch tensors are tested as below
            assert "SCIPY_ARRAY_API" in str(skipped)  # noqa: PT017
        except Exception as error:
            failed.append(f"{check.func.__name__}: {error!r}")

    assert failed == []


@_EVERY
def test_only_probes_that_centre_rows_may_score_badly_in_two_dimensions(estimator: Any) -> None:
    tags = estimator.__sklearn_tags__()

    assert tags.classifier_tags.poor_score == isinstance(estimator, LogisticProbe | RidgeProbe | LinearProbe)


@pytest.mark.parametrize(
    ("estimator", "probe"),
    [
        (LogisticProbe(lam=0.0025), Logistic(lambdas=(0.0025,))),
        (NearestNeighbourProbe(k=10, temperature=0.1), NearestNeighbours(ks=(10,), temperatures=(0.1,))),
        (NearestClassMean(), MeanProbe()),
        (RidgeProbe(), Ridge()),
    ],
    ids=["logistic", "knn", "ncm", "ridge"],
)
def test_predictions_are_those_of_the_protocol(estimator: Any, probe: FeatureProbe, digits: Any) -> None:
    X, y, queries, _ = digits
    train = Features(
        values=torch.from_numpy(X),
        labels=torch.from_numpy(y),
        image_ids=tuple(map(str, range(len(X)))),
        n_classes=10,
        tap="cls",
    )
    (scores,) = fit_probe(probe, train, torch.device("cpu")).scores(torch.from_numpy(queries))

    predicted = estimator.fit(X, y).predict(queries)

    assert predicted.tolist() == scores.argmax(dim=1).tolist()


@_EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_tensors_give_what_numpy_arrays_give(estimator: Any, dtype: torch.dtype, digits: Any) -> None:
    X, y, queries, _ = digits
    expected = clone(estimator).fit(X.astype(np.float32), y).decision_function(queries.astype(np.float32))

    fitted = clone(estimator).fit(torch.from_numpy(X).to(dtype).requires_grad_(), torch.from_numpy(y))

    result = fitted.decision_function(torch.from_numpy(queries).to(dtype))
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)  # grey levels are exact in bfloat16


@_EVERY
def test_pickled_estimators_score_as_before(estimator: Any, digits: Any) -> None:
    X, y, queries, labels = digits
    fitted = clone(estimator).fit(X, y)

    again = pickle.loads(pickle.dumps(fitted))

    assert np.array_equal(again.decision_function(queries), fitted.decision_function(queries))
    assert again.score(queries, labels) == fitted.score(queries, labels) > 0.75


@pytest.mark.parametrize("estimator", [LogisticProbe(), NearestNeighbourProbe(), LinearProbe(epochs=20)], ids=str)
def test_probabilities_sum_to_one_and_agree_with_predictions(estimator: Any, digits: Any) -> None:
    X, y, queries, _ = digits
    names = np.array([f"digit {label}" for label in y])

    fitted = clone(estimator).fit(X, names)

    shares = fitted.predict_proba(queries)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert fitted.classes_[shares.argmax(axis=1)].tolist() == fitted.predict(queries).tolist()


def test_a_grid_search_chooses_among_strengths(digits: Any) -> None:
    X, y, _, _ = digits

    search = GridSearchCV(LogisticProbe(), {"lam": [0.0025, 1000.0]}, cv=3).fit(X, y)

    assert search.best_params_ == {"lam": 0.0025}
    assert search.best_score_ == pytest.approx(cross_val_score(LogisticProbe(lam=0.0025), X, y, cv=3).mean())


@pytest.mark.parametrize("solver", ["auto", "newton", "lbfgs", "sklearn"])
def test_a_logistic_fit_states_its_certificate(solver: str, digits: Any) -> None:
    X, y, _, _ = digits

    probe = LogisticProbe(solver=solver).fit(X, y)

    rows = X - X.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    logits = rows @ probe.coef_.T
    loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(X)), y])
    assert probe.coef_.shape == (10, 64)
    assert probe.objective_ == pytest.approx(loss + 0.0025 / len(X) / 2 * np.square(probe.coef_).sum(), rel=1e-9)
    assert probe.certificate_ <= 1e-6
    assert probe.converged_


def test_fewer_rows_than_features_are_fitted_in_as_many_coordinates(
    digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y, *_ = digits
    rows, labels, seen, minimise = X[:30] / 50, y[:30], [], estimators.MINIMISERS["auto"]
    monkeypatch.setitem(
        estimators.MINIMISERS,
        "auto",
        lambda *arguments, **target: seen.append(arguments[0]) or minimise(*arguments, **target),
    )

    probe = LogisticProbe(preprocess=False).fit(np.pad(rows, ((0, 0), (0, 3))), labels)

    problem = replace(seen[0], rows=torch.from_numpy(rows))
    complete, _ = minimise(problem, target=1e-6)
    assert seen[0].rows.shape == (30, 30)
    assert probe.objective_ == pytest.approx(complete.objective, rel=2e-6)
    assert np.abs(probe.coef_[:, 64:]).max() < 1e-12
    assert certify(problem, torch.from_numpy(probe.coef_[:, :64])).gap <= 1.01e-6


def test_a_coarser_tolerance_stops_earlier(digits: Any) -> None:
    X, y, _, _ = digits

    coarse, fine = LogisticProbe(tol=9e-4).fit(X, y), LogisticProbe(tol=1e-9).fit(X, y)

    assert fine.certificate_ <= 1e-9 < coarse.certificate_ <= 9e-4


def test_rows_are_taken_as_they_are_without_preprocessing(digits: Any) -> None:
    X, y, queries, _ = digits

    plain = LogisticProbe(preprocess=False).fit(X / 200, y)

    np.testing.assert_allclose(plain.decision_function(queries), queries @ plain.coef_.T)


def test_a_k_above_the_number_of_rows_is_lowered_with_a_warning() -> None:
    probe = NearestNeighbourProbe(k=7)

    with pytest.warns(UserWarning, match="k = 7 neighbours among 3 rows: all 3 vote"):
        probe.fit([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0, 1, 1])

    assert (probe.k_, probe.k) == (3, 7)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (LogisticProbe(lam=0), "lam is 0, but must be above 0."),
        (LogisticProbe(tol=-1), "tol is -1, but must be above 0."),
        (LogisticProbe(solver="sgd"), "solver is 'sgd', not one of auto, newton, lbfgs, cyanure, sklearn."),
        (NearestNeighbourProbe(k=0), "k is 0, but must be above 0."),
        (NearestNeighbourProbe(temperature=0.0), "temperature is 0.0, but must be above 0."),
        (NearestNeighbourProbe(metric="l2"), "metric is 'l2'; the protocol has only cosine."),
        (LinearProbe(batch_size=0), "batch_size is 0, but must be above 0."),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value),
)
def test_parameters_out_of_range_are_named(estimator: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        estimator.fit([[1.0, 0.0], [0.0, 1.0]], [0, 1])

    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("estimator", "defaults"),
    [
        (LogisticProbe(), {"lam": 0.0025, "solver": "auto", "tol": 1e-6, "preprocess": True}),
        (NearestNeighbourProbe(), {"k": 20, "temperature": 0.07, "metric": "cosine"}),
        (NearestClassMean(), {}),
        (RidgeProbe(), {"preprocess": True}),
        (
            LinearProbe(),
            {"lr": 3.0, "weight_decay": 0.0, "epochs": 100, "batch_size": 256, "seed": 0, "preprocess": True},
        ),
    ],
    ids=_IDS,
)
def test_defaults_are_those_of_record(estimator: Any, defaults: dict[str, object]) -> None:
    assert estimator.get_params() == defaults


def test_a_linear_fit_is_that_of_its_parameters(digits: Any) -> None:
    X, y, _, _ = digits
    heads = train_heads(
        centre_rows(torch.from_numpy(X)),
        torch.from_numpy(y),
        [Recipe(learning_rate=0.7, weight_decay=0.01)],
        n_classes=10,
        epochs=7,
        batch_size=50,
        generator=torch.Generator().manual_seed(3),
    )

    probe = LinearProbe(lr=0.7, weight_decay=0.01, epochs=7, batch_size=50, seed=3).fit(X, y)

    assert np.array_equal(probe.coef_, heads.weights[0].double().numpy())
    assert np.array_equal(probe.intercept_, heads.biases[0].double().numpy())
    assert probe.objective_ == float(heads.losses[0])


def test_a_ridge_fit_states_its_strength_and_error(digits: Any) -> None:
    X, y, _, _ = digits
    fit = solve_ridge(centre_rows(torch.from_numpy(X)), torch.from_numpy(y), n_classes=10)

    probe = RidgeProbe().fit(X, y)

    assert (probe.alpha_, probe.objective_) == (fit.alpha, float(fit.errors.min()))


@pytest.mark.parametrize(
    ("gap", "warned"), [(9e-4, []), (1.1e-3, ["the relative duality gap is 1.1e-03, above 0.001"])]
)
def test_a_fit_that_has_not_converged_warns(gap: float, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    solution = Solution(weights=torch.zeros(2, 2), objective=0.5, gap=gap)
    monkeypatch.setitem(estimators.MINIMISERS, "auto", lambda problem, target: (solution, 1))

    with warnings.catch_warnings(record=True, action="always") as told:
        probe = LogisticProbe().fit([[1.0, 0.0], [0.0, 1.0]], [0, 1])

    assert probe.converged_ == (not warned)
    assert [(str(item.message), item.category) for item in told] == [(text, ConvergenceWarning) for text in warned]


@pytest.mark.parametrize("solver", ["newton", "lbfgs", "sklearn", "cyanure"])
def test_the_solver_that_is_named_solves(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solution = Solution(weights=torch.zeros(2, 2), objective=0.123, gap=0.0)
    monkeypatch.setitem(estimators.MINIMISERS, solver, lambda problem, target: (solution, 3))

    probe = LogisticProbe(solver=solver).fit([[1.0, 0.0], [0.0, 1.0]], [0, 1])

    assert (probe.objective_, probe.n_iter_) == (0.123, 3)


@pytest.mark.parametrize("estimator", [LogisticProbe(), RidgeProbe(), LinearProbe()], ids=repr)
def test_a_single_class_is_refused_by_name(estimator: Any) -> None:
    with pytest.raises(ValueError, match=rf"{type(estimator).__name__} needs labelled rows of at least two classes"):
        estimator.fit([[1.0, 0.0], [0.0, 1.0]], [1, 1])


def test_importing_the_package_does_not_load_the_estimators() -> None:
    code = "import sys, msn_eval; print('msn_eval.sklearn' in sys.modules, 'sklearn' in sys.modules)"

    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert output == "False False\n"
