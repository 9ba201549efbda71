"""Newton's method: what its directions save. What it finds is tested with the other minimiser's."""

import pytest
import torch
from torch import Tensor

from msn_eval.probes.logistic_solvers import newton
from msn_eval.probes.logistic_solvers.newton import minimise_path
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem
from msn_eval.probes.rows import centred_rows


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
