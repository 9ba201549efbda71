"""The objective, its gradient and its certificate, against finite differences and the dual."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.special import entr, logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from msn_eval.probes.logistic_solvers import objective as cross_entropy
from msn_eval.probes.logistic_solvers import objective as line_search
from msn_eval.probes.logistic_solvers.objective import (
    CrossEntropyProblem,
    certify,
    evaluate_point,
    search_line,
    zero_point,
)


def _problem(*, n_classes: int = 4, mu: float = 0.02, seed: int = 0) -> CrossEntropyProblem:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(25, 6, dtype=torch.float64, generator=generator)
    labels = torch.arange(25) % n_classes
    return CrossEntropyProblem(rows=rows, labels=labels, n_classes=n_classes, mu=mu)


def _weights(problem: CrossEntropyProblem, *, size: float = 1.0, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(problem.n_classes, problem.rows.shape[1], dtype=torch.float64, generator=generator)


def _objective(problem: CrossEntropyProblem, weights: np.ndarray) -> float:
    weights = weights.reshape(problem.n_classes, -1)
    logits = problem.rows.numpy() @ weights.T
    own = logits[np.arange(len(logits)), problem.labels.numpy()]
    return float(np.mean(logsumexp(logits, axis=1) - own) + problem.mu / 2 * np.sum(weights**2))


def _dual_objective(problem: CrossEntropyProblem, logits: np.ndarray) -> float:
    """Value of the Fenchel dual at softmax(logits) - Y: mean entropy - ||(P - Y)' X / n||^2 / (2 mu)."""
    probabilities = softmax(logits, axis=1)
    residual = probabilities - np.eye(problem.n_classes)[problem.labels.numpy()]
    pulled = residual.T @ problem.rows.numpy() / len(logits)
    return float(entr(probabilities).sum(axis=1).mean() - np.sum(pulled**2) / (2 * problem.mu))


def _minimum(problem: CrossEntropyProblem) -> float:
    strength = problem.mu * len(problem.rows)
    model = LogisticRegression(C=1 / strength, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(problem.rows.numpy(), problem.labels.numpy())
    return _objective(problem, model.coef_)


def test_objective_is_mean_cross_entropy_and_half_mu_times_the_squared_norm() -> None:
    problem = _problem()
    weights = _weights(problem)

    point = evaluate_point(problem, weights)

    assert point.objective == pytest.approx(_objective(problem, weights.numpy()), rel=1e-13)


def test_objective_of_zero_weights_is_the_logarithm_of_the_number_of_classes() -> None:
    problem = _problem(n_classes=5)

    point = evaluate_point(problem, torch.zeros(5, 6, dtype=torch.float64))

    assert point.objective == pytest.approx(np.log(5), rel=1e-14)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_gradient_agrees_with_finite_differences(n_classes: int) -> None:
    problem = _problem(n_classes=n_classes)
    weights = _weights(problem)

    gradient = evaluate_point(problem, weights).gradient.numpy()

    differences = approx_fprime(weights.numpy().ravel(), lambda trial: _objective(problem, trial), 1e-7)
    np.testing.assert_allclose(gradient.ravel(), differences, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_gap_is_primal_minus_dual_over_primal(n_classes: int, size: float) -> None:
    problem = _problem(n_classes=n_classes)
    weights = _weights(problem, size=size)

    point = evaluate_point(problem, weights)

    primal = _objective(problem, weights.numpy())
    dual = _dual_objective(problem, problem.rows.numpy() @ weights.numpy().T)
    assert point.gap == pytest.approx((primal - dual) / primal, rel=1e-9)


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("mu", [1e-4, 0.02, 1.0])
def test_gap_is_never_below_the_true_distance_from_the_minimum(mu: float, size: float) -> None:
    problem = _problem(mu=mu)
    minimum = _minimum(problem)

    point = evaluate_point(problem, _weights(problem, size=size))

    assert point.gap >= (point.objective - minimum) / point.objective


def test_gap_vanishes_at_the_minimum() -> None:
    problem = _problem()
    model = LogisticRegression(C=1 / (problem.mu * 25), fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(problem.rows.numpy(), problem.labels.numpy())

    point = evaluate_point(problem, torch.from_numpy(model.coef_))

    assert 0 <= point.gap < 1e-12


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    problem = _problem()

    point = evaluate_point(problem, _weights(problem))

    np.testing.assert_allclose(point.probabilities.numpy(), softmax(point.logits.numpy(), axis=1), rtol=1e-12)


def test_logits_that_are_already_known_change_nothing() -> None:
    problem = _problem()
    weights = _weights(problem)
    plain = evaluate_point(problem, weights)

    told = evaluate_point(problem, weights, plain.logits)

    assert told.objective == plain.objective
    assert torch.equal(told.gradient, plain.gradient)


def test_logits_in_the_thousands_do_not_overflow() -> None:
    problem = _problem()

    point = evaluate_point(problem, _weights(problem, size=5000.0))

    assert np.isfinite(point.objective)
    assert point.gradient.isfinite().all()


def test_permuting_the_classes_permutes_the_gradient() -> None:
    problem = _problem()
    weights = _weights(problem)
    order = torch.tensor([2, 0, 3, 1])
    renamed = CrossEntropyProblem(rows=problem.rows, labels=order.argsort()[problem.labels], n_classes=4, mu=problem.mu)

    point = evaluate_point(renamed, weights[order])

    torch.testing.assert_close(point.gradient, evaluate_point(problem, weights).gradient[order])


def test_point_of_zero_weights_is_the_one_evaluated() -> None:
    problem = _problem()

    point = zero_point(problem)

    expected = evaluate_point(problem, torch.zeros(4, 6, dtype=torch.float64))
    assert (point.objective, point.gap) == pytest.approx((expected.objective, expected.gap), rel=1e-13)
    torch.testing.assert_close(point.gradient, expected.gradient)
    torch.testing.assert_close(point.probabilities, expected.probabilities)


def test_certificate_of_float32_weights_is_that_of_the_same_weights_in_float64() -> None:
    problem = _problem()
    weights = _weights(problem).float()

    solution = certify(problem, weights)

    expected = evaluate_point(problem, weights.double())
    assert solution.weights.dtype == torch.float64
    assert (solution.objective, solution.gap) == pytest.approx((expected.objective, expected.gap), rel=1e-13)


@pytest.mark.parametrize("rows_a_block", [0, 1, 7, 24], ids=lambda rows: str(rows) if rows else "too many classes")
def test_cutting_the_rows_into_blocks_changes_nothing(rows_a_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem()
    weights = _weights(problem)
    whole = evaluate_point(problem, weights)
    monkeypatch.setattr(cross_entropy, "_BLOCK_VALUES", 4 * rows_a_block)

    cut, certified = evaluate_point(problem, weights), certify(problem, weights)

    assert cut.gap == pytest.approx(whole.gap, rel=1e-12)
    assert certified.objective == pytest.approx(whole.objective, rel=1e-13)
    torch.testing.assert_close(cut.gradient, whole.gradient)
    torch.testing.assert_close(cut.probabilities, whole.probabilities)


def _search_problem() -> CrossEntropyProblem:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return CrossEntropyProblem(rows=rows, labels=torch.arange(40) % 4, n_classes=4, mu=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 0.01, 1.0, 100.0, 1e4])
def test_slope_at_the_step_found_is_a_small_share_of_the_first(scale: float) -> None:
    problem = _search_problem()
    point = evaluate_point(problem, torch.zeros(4, 6, dtype=torch.float64))
    direction = -scale * point.gradient

    along = problem.rows @ direction.T
    length = search_line(problem, point, direction, along)

    moved = evaluate_point(problem, point.weights + length * direction, point.logits + length * along)
    first, last = (float((one.gradient * direction).sum()) for one in (point, moved))
    assert abs(last) <= 0.2 * abs(first)


def test_newtons_steps_that_swing_between_both_ends_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(_search_problem(), mu=1e-12)
    point = evaluate_point(problem, torch.zeros(4, 6, dtype=torch.float64))
    direction = -point.gradient
    far = float(point.gradient.square().sum())
    trials = []

    def slope(*given: Any) -> tuple[float, float]:
        trials.append(given[3])
        steep, other_end = far * (given[3] - 0.4), 1 - given[3] / 2 if given[3] < 0.4 else 0.55 - given[3] / 2
        return steep, steep / (given[3] - other_end)  # so little curved that a step leads to the other end

    monkeypatch.setattr(line_search, "_slope", slope)

    length = search_line(problem, point, direction, problem.rows @ direction.T)

    assert 0.2 <= length <= 0.6
    assert len(trials) <= 4
