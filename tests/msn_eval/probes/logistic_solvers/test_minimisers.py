"""Both of our minimisers, Newton's and L-BFGS, find the one optimum and prove it."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from msn_eval.probes.base import centre_rows
from msn_eval.probes.logistic_solvers import newton
from msn_eval.probes.logistic_solvers.newton import minimise_by_newton, minimise_path
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Solution, certify
from msn_eval.probes.logistic_solvers.reference_solvers import minimise_by_lbfgs

Minimiser = Callable[..., tuple[Solution, int]]


@pytest.fixture(params=[minimise_by_newton, minimise_by_lbfgs], ids=["newton", "lbfgs"])
def minimise(request: pytest.FixtureRequest) -> Minimiser:
    chosen: Minimiser = request.param
    return chosen


def _clusters(n: int, d: int, n_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n_classes, d, dtype=torch.float64, generator=generator)
    labels = torch.arange(n) % n_classes
    noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return centre_rows(centres[labels] + 1.5 * noise), labels


def _problem(rows: torch.Tensor, labels: torch.Tensor, l2: float) -> CrossEntropyProblem:
    return CrossEntropyProblem(rows=rows, labels=labels, n_classes=int(labels.max()) + 1, mu=l2 / len(rows))


def _sklearn_weights(problem: CrossEntropyProblem, *, inverse_l2: float) -> torch.Tensor:
    """Weights of scikit-learn's solution; its one vector w for two classes stands for -w/2 and w/2."""
    model = LogisticRegression(C=inverse_l2, fit_intercept=False, tol=1e-10, max_iter=5_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(problem.rows.numpy(), problem.labels.numpy())
    weights = torch.from_numpy(model.coef_)
    return torch.cat([-weights / 2, weights / 2]) if problem.n_classes == 2 else weights


def _objective(problem: CrossEntropyProblem, weights: torch.Tensor) -> float:
    logits = (problem.rows @ weights.T).numpy()
    own = logits[np.arange(len(logits)), problem.labels.numpy()]
    return float(np.mean(logsumexp(logits, axis=1) - own) + problem.mu / 2 * np.sum(weights.numpy() ** 2))


def _agreement(rows: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> float:
    return ((rows @ one.T).argmax(dim=1) == (rows @ other.T).argmax(dim=1)).double().mean().item()


@pytest.mark.parametrize("l2", [0.0025, 0.075])
def test_optimum_on_digits_is_that_of_scikit_learn(minimise: Minimiser, l2: float) -> None:
    values, digits = load_digits(return_X_y=True)
    rows, labels = centre_rows(torch.from_numpy(values)), torch.from_numpy(digits)
    problem = _problem(rows[:1000], labels[:1000], l2)
    theirs = _sklearn_weights(problem, inverse_l2=1 / l2)

    ours, _ = minimise(problem, target=1e-6)

    assert ours.objective == pytest.approx(_objective(problem, theirs), rel=1e-6)
    assert _agreement(rows[1000:], ours.weights, theirs) >= 0.995


@pytest.mark.parametrize("l2", [0.0025, 0.075, 1.0])
def test_two_classes_are_scikit_learns_binary_form_with_twice_the_inverse_l2(minimise: Minimiser, l2: float) -> None:
    rows, labels = _clusters(600, 16, 2)
    problem = _problem(rows[:200], labels[:200], l2)
    theirs = _sklearn_weights(problem, inverse_l2=2 / l2)

    ours, _ = minimise(problem, target=1e-6)

    assert ours.objective == pytest.approx(_objective(problem, theirs), rel=1e-6)
    assert _agreement(rows[200:], ours.weights, theirs) >= 0.995


@pytest.mark.parametrize("target", [1e-2, 1e-6, 1e-9])
@pytest.mark.parametrize("l2", [1e-4, 0.0025, 0.075, 10.0])
def test_asked_gap_is_reached(minimise: Minimiser, l2: float, target: float) -> None:
    problem = _problem(*_clusters(120, 12, 6), l2)

    point, steps = minimise(problem, target=target)

    assert point.gap <= target
    assert steps > 0


@pytest.mark.parametrize("target", [1e-6, 1e-13])
def test_objective_is_that_of_the_weights_returned(minimise: Minimiser, target: float) -> None:
    problem = _problem(*_clusters(120, 12, 6), 0.0025)

    point, _ = minimise(problem, target=target)

    assert point.objective == pytest.approx(_objective(problem, point.weights), rel=1e-12)


def test_rows_that_are_all_zero_are_solved_without_a_step(minimise: Minimiser) -> None:
    problem = _problem(torch.zeros(6, 4, dtype=torch.float64), torch.arange(6) % 3, 0.0025)

    point, steps = minimise(problem, target=1e-6)

    assert steps == 0
    assert torch.equal(point.weights, torch.zeros(3, 4, dtype=torch.float64))


def test_equal_rows_with_different_labels_are_solved(minimise: Minimiser) -> None:
    rows, _ = _clusters(20, 12, 2)
    problem = _problem(rows.repeat(2, 1), torch.arange(40) // 20, 0.0025)

    point, _ = minimise(problem, target=1e-6)

    assert point.objective == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.parametrize("block_values", [6, 50, 1 << 18])
def test_newtons_path_from_large_to_small_mu_meets_the_target_at_each(
    block_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton, "BLOCK_VALUES", block_values)
    problem = _problem(*_clusters(120, 12, 6), 1.0)
    mus = [l2 / 120 for l2 in (10, 0.075, 0.0025, 1e-4)]

    path = list(minimise_path(problem, mus, target=1e-6))

    for mu, (solution, _) in zip(mus, path, strict=True):
        alone, _ = minimise_by_lbfgs(replace(problem, mu=mu), target=1e-10)
        assert solution.gap <= 1e-6
        assert solution.objective == pytest.approx(alone.objective, rel=1e-6)


def test_warm_starts_along_a_path_save_steps() -> None:
    problem = _problem(*_clusters(120, 12, 6), 1.0)
    mus = [0.075 / 2**halving / 120 for halving in range(6)]

    steps = [result for _, result in minimise_path(problem, mus, target=1e-6)]

    alone = [minimise_by_newton(replace(problem, mu=mu), target=1e-6)[1] for mu in mus]
    assert sum(steps[2:]) <= sum(alone[2:]) / 2


def test_negligible_probabilities_are_zero_in_float32_and_kept_in_float64() -> None:
    logits = torch.tensor([[0.0, -100.0, -40.0]])

    rough, exact = newton._softmax(logits), newton._softmax(logits.double())

    assert 0 < float(torch.softmax(logits, dim=1)[0, 1]) < torch.finfo(torch.float32).tiny  # subnormal
    assert (rough[0, 1], rough[0, 2] > 0) == (0, True)
    assert bool((exact > 0).all())


def test_newton_goes_on_in_float64_where_float32_leads_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem(*_clusters(120, 12, 6), 0.0025)
    stages, take_steps = [], newton._take_steps
    monkeypatch.setattr(newton, "_take_steps", lambda *arguments: stages.append(take_steps(*arguments)) or stages[-1])

    solution, steps = minimise_by_newton(problem, target=1e-13)

    assert solution.gap <= 1e-13
    rough, fine, last = (taken for _, taken in stages)
    assert steps == rough + fine + last
    assert min(rough, fine) > 0


@pytest.mark.parametrize(("n", "d", "n_classes"), [(20, 50, 5), (12, 12, 3)])
def test_newton_is_not_misled_where_float32_takes_every_row_for_certain(n: int, d: int, n_classes: int) -> None:
    problem = _problem(*_clusters(n, d, n_classes), 1e-9)

    solution, _ = minimise_by_newton(problem, target=1e-6)

    proven = certify(problem, solution.weights)
    assert proven.gap <= 1e-6
    assert solution.objective == pytest.approx(proven.objective, rel=1e-8)


@pytest.mark.parametrize("l2", [1e-4, 1e-3])
def test_unevenly_spread_rows_are_solved_from_zero(l2: float) -> None:
    rows, labels = _clusters(300, 24, 10)
    spread = torch.linspace(0, -3, 24, dtype=torch.float64).exp()
    problem = _problem(centre_rows(rows * spread), labels, l2)

    solution, steps = minimise_by_newton(problem, target=1e-6)

    assert solution.gap <= 1e-6
    assert steps < 40


def test_a_target_beyond_float64_ends_where_nothing_improves_any_more(minimise: Minimiser) -> None:
    problem = _problem(*_clusters(30, 8, 3), l2=0.01)

    solution, steps = minimise(problem, target=1e-40)

    assert steps < 200
    assert solution.gap < 1e-12


def test_a_mu_that_underflows_proves_nothing() -> None:
    solution, _ = minimise_by_newton(_problem(*_clusters(20, 50, 5), 1e-300), target=1e-6)

    assert 1e-3 < solution.gap < math.inf
