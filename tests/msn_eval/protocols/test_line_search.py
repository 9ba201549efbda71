"""The line search ends where the objective along the line is all but lowest."""

import pytest
import torch

from msn_eval.protocols.cross_entropy import CrossEntropyProblem, evaluate_point
from msn_eval.protocols.line_search import search_line


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
