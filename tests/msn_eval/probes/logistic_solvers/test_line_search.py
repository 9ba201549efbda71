"""The line search ends where the objective along the line is all but lowest."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from msn_eval.probes.logistic_solvers import line_search
from msn_eval.probes.logistic_solvers.line_search import search_line
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, evaluate_point


def _problem() -> CrossEntropyProblem:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return CrossEntropyProblem(rows=rows, labels=torch.arange(40) % 4, n_classes=4, mu=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 0.01, 1.0, 100.0, 1e4])
def test_slope_at_the_step_found_is_a_small_share_of_the_first(scale: float) -> None:
    problem = _problem()
    point = evaluate_point(problem, torch.zeros(4, 6, dtype=torch.float64))
    direction = -scale * point.gradient

    along = problem.rows @ direction.T
    length = search_line(problem, point, direction, along)

    moved = evaluate_point(problem, point.weights + length * direction, point.logits + length * along)
    first, last = (float((one.gradient * direction).sum()) for one in (point, moved))
    assert abs(last) <= 0.2 * abs(first)


def test_newtons_steps_that_swing_between_both_ends_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(_problem(), mu=1e-12)
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
