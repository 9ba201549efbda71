"""The cross-checks solve our objective, and cyanure leaves this process alone."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from msn_eval.errors import ResourceError, UsageError
from msn_eval.probes.base import centre_rows
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Solution
from msn_eval.probes.logistic_solvers.reference_solvers import (
    minimise_by_cyanure,
    minimise_by_sklearn,
)


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    values, labels = load_digits(return_X_y=True)
    return centre_rows(torch.from_numpy(values)), torch.from_numpy(labels)


def _clusters(labels: torch.Tensor, d: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(int(labels.max()) + 1, d, dtype=torch.float64, generator=generator)
    noise = torch.randn(len(labels), d, dtype=torch.float64, generator=generator)
    return centre_rows(centres[labels] + 1.5 * noise)


def _problem(labels: torch.Tensor, *, n_classes: int, l2: float = 0.075) -> CrossEntropyProblem:
    return CrossEntropyProblem(rows=_clusters(labels), labels=labels, n_classes=n_classes, mu=l2 / len(labels))


@pytest.fixture(scope="module")
def digits_by_cyanure() -> Solution:
    rows, labels = _digits()
    problem = CrossEntropyProblem(rows=rows[:1000], labels=labels[:1000], n_classes=10, mu=0.0025 / 1000)
    return minimise_by_cyanure(problem, target=1e-6)[0]


@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_scikit_learn_finds_the_minimum_of_our_objective(n_classes: int) -> None:
    problem = _problem(torch.arange(140) % n_classes, n_classes=n_classes)

    point, steps = minimise_by_sklearn(problem, target=1e-6)

    assert point.gap < 1e-8
    assert steps > 2


def test_cyanure_finds_the_minimum_of_our_objective(digits_by_cyanure: Solution) -> None:
    assert digits_by_cyanure.gap < 1e-4


def test_cyanures_binary_form_finds_the_minimum_of_our_objective() -> None:
    problem = _problem(torch.arange(80) % 2, n_classes=2)

    point, _ = minimise_by_cyanure(problem, target=1e-6)

    assert point.gap < 1e-4


@pytest.mark.usefixtures("digits_by_cyanure")
def test_bf16_products_of_this_process_are_right_after_cyanure() -> None:
    generator = torch.Generator().manual_seed(0)
    item, other = (torch.randn(512, 512, generator=generator).to(torch.bfloat16) for _ in range(2))

    product = (item @ other).float()

    torch.testing.assert_close(product, item.float() @ other.float(), rtol=1e-2, atol=0.1)


def test_cyanure_that_is_not_installed_is_a_usage_error_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cyanure.py").write_text("""raise ModuleNotFoundError("No module named 'cyanure'")""")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(UsageError) as caught:
        minimise_by_cyanure(_problem(torch.arange(8) % 2, n_classes=2), target=1e-6)

    assert str(caught.value) == (
        "--solver cyanure: the package cyanure is not installed\n"
        "pip install cyanure (wheels: Python 3.11 and 3.12, none for Linux on ARM), or use --solver auto."
    )


def test_cyanure_that_dies_is_reported_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cyanure.py").write_text("raise MemoryError('no memory for the Gram matrix')")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ResourceError) as caught:
        minimise_by_cyanure(_problem(torch.arange(8) % 2, n_classes=2), target=1e-6)

    assert str(caught.value) == (
        "cyanure ended with code 1: MemoryError: no memory for the Gram matrix\nUse --solver auto."
    )
