"""Limited-memory BFGS: what it knows of the curvature, and what that saves."""

from collections import deque

import torch

from msn_eval.probes.logistic_solvers.lbfgs import _inverse_curvature_product, minimise_by_lbfgs
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem
from msn_eval.probes.rows import centred_rows


def test_newest_change_of_the_gradient_leads_back_to_the_move_that_made_it() -> None:
    """The secant equation, which every member of BFGS's family keeps exactly."""
    generator = torch.Generator().manual_seed(0)
    bend = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    moves = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    changes = [(bend @ bend.T @ move.flatten()).view(2, 3) for move in moves]
    history = deque((s, y, 1 / float((s * y).sum())) for s, y in zip(moves, changes, strict=True))

    torch.testing.assert_close(_inverse_curvature_product(changes[-1], history, 0.1), moves[-1])


def test_memory_saves_most_of_the_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = centred_rows(
        torch.randn(6, 12, generator=generator).repeat(20, 1) + torch.randn(120, 12, generator=generator)
    )
    problem = CrossEntropyProblem(rows=rows, labels=torch.arange(120) % 6, n_classes=6, mu=0.0025 / 120)

    solution, steps = minimise_by_lbfgs(problem, target=1e-6)

    assert solution.gap <= 1e-6
    assert steps <= 55  # 45 as it is; 61 where the oldest move sets the scale, 85 with a memory of one
