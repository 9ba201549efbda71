"""The objective, its gradient and its certificate, against finite differences and the dual."""

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.special import entr, logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from msn_eval.probes.logistic_solvers import objective as cross_entropy
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, certify, evaluate_objective


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
    l2 = problem.mu * len(problem.rows)
    model = LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(problem.rows.numpy(), problem.labels.numpy())
    return _objective(problem, model.coef_)


def test_objective_is_mean_cross_entropy_and_half_mu_times_the_squared_norm() -> None:
    problem = _problem()
    weights = _weights(problem)

    point = certify(problem, weights)

    assert point.objective == pytest.approx(_objective(problem, weights.numpy()), rel=1e-13)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_gradient_agrees_with_finite_differences(n_classes: int) -> None:
    problem = _problem(n_classes=n_classes)
    weights = _weights(problem)

    gradient = evaluate_objective(problem, weights)[1].numpy()

    differences = approx_fprime(weights.numpy().ravel(), lambda trial: _objective(problem, trial), 1e-7)
    np.testing.assert_allclose(gradient.ravel(), differences, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_gap_is_primal_minus_dual_over_primal(n_classes: int, size: float) -> None:
    problem = _problem(n_classes=n_classes)
    weights = _weights(problem, size=size)

    point = certify(problem, weights)

    primal = _objective(problem, weights.numpy())
    dual = _dual_objective(problem, problem.rows.numpy() @ weights.numpy().T)
    assert point.gap == pytest.approx((primal - dual) / primal, rel=1e-9)


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("mu", [1e-4, 0.02, 1.0])
def test_gap_is_never_below_the_true_distance_from_the_minimum(mu: float, size: float) -> None:
    problem = _problem(mu=mu)
    minimum = _minimum(problem)

    point = certify(problem, _weights(problem, size=size))

    assert point.gap >= (point.objective - minimum) / point.objective


def test_gap_vanishes_at_the_minimum() -> None:
    problem = _problem()
    model = LogisticRegression(C=1 / (problem.mu * 25), fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(problem.rows.numpy(), problem.labels.numpy())

    point = certify(problem, torch.from_numpy(model.coef_))

    assert 0 <= point.gap < 1e-12


def test_logits_in_the_thousands_do_not_overflow() -> None:
    problem = _problem()

    objective, gradient = evaluate_objective(problem, _weights(problem, size=5000.0))

    assert np.isfinite(objective)
    assert gradient.isfinite().all()


def test_certificate_of_float32_weights_is_that_of_the_same_weights_in_float64() -> None:
    problem = _problem()
    weights = _weights(problem).float()

    solution, expected = certify(problem, weights), certify(problem, weights.double())

    assert solution.weights.dtype == torch.float64
    assert (solution.objective, solution.gap) == (expected.objective, expected.gap)


@pytest.mark.parametrize("rows_per_block", [0, 1, 7, 24])
def test_cutting_the_rows_into_blocks_changes_nothing(rows_per_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem()
    weights = _weights(problem)
    complete = certify(problem, weights)
    monkeypatch.setattr(cross_entropy, "BLOCK_VALUES", 4 * rows_per_block)

    cut = certify(problem, weights)

    assert (cut.objective, cut.gap) == pytest.approx((complete.objective, complete.gap), rel=1e-12)
