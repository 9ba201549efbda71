"""Newton's method: what its directions save. What it finds is tested with the other minimiser's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from msn_eval.probes.base import centred_rows
from msn_eval.probes.logistic_solvers import newton
from msn_eval.probes.logistic_solvers import newton as warm_start
from msn_eval.probes.logistic_solvers.newton import combined_point, minimise_path
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Point, evaluate_point, zero_point


def _drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 6
    centres = torch.randn(6, 12, generator=generator)
    return centred_rows(centres[labels] + 1.5 * torch.randn(120, 12, generator=generator)), labels


def _problem(mu: float) -> CrossEntropyProblem:
    rows, labels = _drawn()
    return CrossEntropyProblem(rows=rows, labels=labels, n_classes=6, mu=mu)


def test_conjugate_directions_save_most_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, product = [], newton._curvature_product
    monkeypatch.setattr(
        newton, "_curvature_product", lambda *given, **wanted: taken.append(1) or product(*given, **wanted)
    )

    list(minimise_path(_problem(1.0), [strength / 120 for strength in (10, 0.075, 0.0025, 1e-4)], target=1e-6))

    assert len(taken) <= 400  # 185 as it is; thousands where the steps of the inner solver are not conjugate


def _warm_problem(*, mu: float = 0.02, dtype: torch.dtype = torch.float64) -> CrossEntropyProblem:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    rows = torch.randn(4, 6, dtype=torch.float64, generator=generator)[labels]
    rows += 0.7 * torch.randn(40, 6, dtype=torch.float64, generator=generator)
    return CrossEntropyProblem(rows=rows.to(dtype), labels=labels, n_classes=4, mu=mu)


def _points(problem: CrossEntropyProblem, n: int, *, size: float = 1.0) -> list[Point]:
    generator = torch.Generator().manual_seed(1)
    return [
        evaluate_point(problem, size * torch.randn(4, 6, dtype=problem.rows.dtype, generator=generator))
        for _ in range(n)
    ]


def _least(problem: CrossEntropyProblem, points: list[Point]) -> float:
    def objective(shares: list[float]) -> float:
        weights = sum(share * one.weights for share, one in zip(shares, points, strict=True))
        assert isinstance(weights, torch.Tensor)
        return evaluate_point(problem, weights).objective

    tight = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 5000}
    return float(minimize(objective, [0.1] * len(points), method="Nelder-Mead", options=tight).fun)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_combination_is_better(n: int, size: float) -> None:
    problem = _warm_problem()
    points = _points(replace(problem, mu=0.5), n, size=size)

    found = combined_point(problem, points, enough=1e-12)

    assert found.objective == pytest.approx(_least(problem, points), rel=1e-9)


def test_what_is_given_is_the_point_of_its_weights() -> None:
    problem = _warm_problem()

    found = combined_point(problem, _points(problem, 2), enough=1e-12)

    expected = evaluate_point(problem, found.weights)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)
    assert found.gap == pytest.approx(expected.gap, rel=1e-9)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _warm_problem()
    whole = combined_point(problem, _points(problem, 2), enough=1e-12)
    monkeypatch.setattr(warm_start, "_BLOCK_VALUES", 7 * 4)

    in_blocks = combined_point(problem, _points(problem, 2), enough=1e-12)

    torch.testing.assert_close(in_blocks.weights, whole.weights, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_that_are_all_but_parallel_do_no_harm(dtype: torch.dtype) -> None:
    problem = _warm_problem(dtype=dtype)
    (point,) = _points(problem, 1)
    beside = evaluate_point(problem, point.weights * (1 + 2 * torch.finfo(dtype).eps))

    found = combined_point(problem, [point, beside], enough=1e-6)

    assert found.weights.isfinite().all()
    assert found.objective <= point.objective


def test_points_that_are_all_but_parallel_do_no_harm_where_no_look_follows_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warm_start, "_SOME_ROWS", 20)
    problem = _warm_problem(dtype=torch.float32)
    (point,) = _points(problem, 1)
    beside = evaluate_point(problem, point.weights + 1e-6 * _points(problem, 2)[1].weights)

    found = combined_point(problem, [point, beside], enough=1e-6)

    assert found.objective < point.objective


def test_points_without_weights_give_the_point_without_weights() -> None:
    problem = _warm_problem()

    found = combined_point(problem, [zero_point(problem)] * 2, enough=1e-6)

    assert found.objective == pytest.approx(zero_point(problem).objective)


def test_a_start_is_no_worse_than_the_last_point_where_newtons_steps_overshoot() -> None:
    # Far out the objective is all but straight: a step by its curvature there leads far beyond the minimum.
    problem = _warm_problem(mu=1e-9)
    points = _points(problem, 1, size=-200.0)

    found = combined_point(problem, points, enough=1e-9)

    assert found.objective < 0.5 * points[0].objective


def test_a_point_that_is_good_enough_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _warm_problem()
    best = combined_point(problem, _points(problem, 1), enough=1e-12)
    looks: list[torch.Tensor] = []
    look_at = warm_start._look_at

    def counted(*given: Any) -> Any:
        looks.append(given[1])
        return look_at(*given)

    monkeypatch.setattr(warm_start, "_look_at", counted)

    combined_point(problem, [*_points(problem, 1), best], enough=1e-6)

    assert len(looks) == 1


def test_of_many_rows_some_lead_there_and_all_take_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _warm_problem()
    points = _points(problem, 2)
    monkeypatch.setattr(warm_start, "_SOME_ROWS", 20)

    found = combined_point(problem, points, enough=1e-12)

    monkeypatch.setattr(warm_start, "_SOME_ROWS", 40)
    best = combined_point(problem, points, enough=1e-12)
    assert best.objective < found.objective < best.objective * 1.01 < points[-1].objective


def test_a_last_step_that_leads_uphill_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _warm_problem()
    points = _points(problem, 2)
    monkeypatch.setattr(warm_start, "_SOME_ROWS", 20)
    best_shares = torch.tensor([0.3, 0.6], dtype=torch.float64)
    monkeypatch.setattr(warm_start, "_best_shares", lambda span, enough: best_shares)
    monkeypatch.setattr(warm_start, "_newton_step", lambda look: torch.full((2,), 50.0, dtype=torch.float64))

    found = combined_point(problem, points, enough=1e-6)

    torch.testing.assert_close(found.weights, 0.3 * points[0].weights + 0.6 * points[1].weights)
