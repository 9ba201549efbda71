"""Probes fitted on the simulated device: the scores and choices of a CPU, with few waits of the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from msn_eval.config.recipes import LinearRecipe
from msn_eval.features.extraction import Features
from msn_eval.probes import knn_search, linear, logistic
from msn_eval.probes.base import FeatureProbe, centre_rows
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.knn_search import search_nearest
from msn_eval.probes.linear import Linear
from msn_eval.probes.logistic import Logistic, LogisticAutoLambda
from msn_eval.probes.logistic_solvers import newton
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem
from msn_eval.probes.ncm import NearestClassMean
from msn_eval.probes.ridge import Ridge

Simulate = Callable[[], Any]
PROBES: dict[str, FeatureProbe] = {
    "Newton": Logistic(lambdas=(0.0025, 0.075)),
    "Newton in chunks": Logistic(lambdas=(0.0025, 0.075)),
    "lambda auto": LogisticAutoLambda(),
    "k-NN": NearestNeighbours(ks=(5,)),
    "linear grid": Linear(
        LinearRecipe(lr_first=0.1, lr_last=3.0, lrs=2, weight_decays=2, epochs=3, batch_size=16, seeds=1)
    ),
    "ridge": Ridge(),
    "ncm": NearestClassMean(),
}
# Waits of the host per fit with scores; for Newton's method, per curvature product. Numbers may only go down.
BUDGETS = {
    "Newton": 2.1,
    "Newton in chunks": 2.3,
    "lambda auto": 1.8,
    "k-NN": 17,
    "linear grid": 19,
    "ridge": 14,
    "ncm": 6,
    "neighbours": 13,
    "Newton, float64 on the CPU": 2.3,
    "k-NN, float64 on the CPU": 24,
    "neighbours, float64 on the CPU": 20,
    "a product": 0,
    "a product and a check": 1,
}


def _features() -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    values = torch.randn(4, 16, generator=generator)[labels] + torch.randn(60, 16, generator=generator)
    return Features(values=values, labels=labels, image_ids=tuple(map(str, range(60))), n_classes=5, tap="cls")


def _fit(probe: FeatureProbe, device: str) -> tuple[list[dict[str, Any]], list[Tensor]]:
    queries = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    fitted = probe.fit(_features(), torch.device(device))
    return [item.chosen or {} for item in fitted.settings], [scores.cpu() for scores in fitted.scores(queries)]


@pytest.fixture(autouse=True)
def float64_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where float64 products are faster."""
    chosen = torch.device(getattr(request, "param", "cuda:0"))
    for module in (newton, knn_search):
        monkeypatch.setattr(module, "choose_float64_device", lambda device: chosen if device.type == "cuda" else device)
    return chosen


@pytest.mark.parametrize(
    ("name", "float64_device"),
    [*((name, "cuda:0") for name in PROBES), *((name, "cpu") for name in ("Newton", "k-NN"))],
    indirect=["float64_device"],
)
def test_scores_and_choices_are_those_of_a_cpu(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, name: str, float64_device: torch.device
) -> None:
    products = 0
    multiply = newton._curvature_product

    def count(*arguments: Any) -> Any:
        nonlocal products
        products += 1
        return multiply(*arguments)

    monkeypatch.setattr(newton, "_curvature_product", count)
    monkeypatch.setattr(linear, "_SCORED_VALUES", 64)  # several chunks of held-out scores
    if name == "Newton in chunks":
        monkeypatch.setattr(logistic, "is_large", lambda *sizes: True)
    expected_choices, expected = _fit(PROBES[name], "cpu")
    products = 0

    with simulate_cuda() as device:
        choices, scores = _fit(PROBES[name], "cuda:0")

    budget = name if float64_device.type == "cuda" else f"{name}, float64 on the CPU"
    device.check_budget(budget, BUDGETS, device.waits.total() / max(1, products))
    for chosen, other in zip(choices, expected_choices, strict=True):
        assert chosen.keys() == other.keys()
        assert [chosen[key] for key in chosen] == [
            pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for value in other.values()
        ]
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "in_chunks"), [("Newton", False), ("Newton in chunks", True)])
def test_curvature_products_between_checks_do_not_make_the_host_wait(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, name: str, in_chunks: bool
) -> None:
    """In chunks every product is followed by a check."""
    monkeypatch.setattr(logistic, "is_large", lambda *sizes: in_chunks)
    spent: dict[int, list[int]] = {}
    with simulate_cuda() as device:
        numbers, totals = [0], [0]
        direction, multiply = newton._newton_direction, newton._curvature_product

        def start(*arguments: Any) -> Any:
            numbers[0] = 0
            return direction(*arguments)

        def count(*arguments: Any) -> Any:
            if numbers[0]:
                spent.setdefault(numbers[0], []).append(device.waits.total() - totals[0])
            numbers[0], totals[0] = numbers[0] + 1, device.waits.total()
            return multiply(*arguments)

        monkeypatch.setattr(newton, "_newton_direction", start)
        monkeypatch.setattr(newton, "_curvature_product", count)
        _fit(PROBES[name], "cuda:0")

    assert len(spent) >= 8
    for number, waits in spent.items():
        is_checked = in_chunks or number in newton._CHECKED_PRODUCTS
        device.check_budget("a product and a check" if is_checked else "a product", BUDGETS, max(waits))


def test_products_after_the_last_that_is_needed_change_no_weight(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check after every product finds each direction as soon as it is good enough."""
    features = _features()
    rows = centre_rows(features.values)

    def solve() -> list[Tensor]:
        problem = CrossEntropyProblem(rows=rows.cuda(), labels=features.labels.cuda(), n_classes=4, mu=1.0)
        return [solution.weights.cpu() for solution, _ in newton.minimise_path(problem, [1e-3, 1e-5], target=1e-6)]

    with simulate_cuda():
        late = solve()
        monkeypatch.setattr(newton, "_CHECKED_PRODUCTS", range(newton._MOST_PRODUCTS + 1))
        prompt = solve()

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(late, prompt, strict=True))


@pytest.mark.parametrize("float64_device", ["cuda:0", "cpu"], indirect=True)
@pytest.mark.parametrize("ties", [False, True], ids=["random rows", "ties and near-ties"])
def test_neighbours_are_those_of_a_cpu_to_the_last_bit(
    simulate_cuda: Simulate, ties: bool, float64_device: torch.device
) -> None:
    bank, queries = (torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (300, 30))
    if ties:  # rows twice and at half their length, and rows that differ by one unit in the last place of one value
        bank[100:200], bank[200:] = bank[:100], bank[:100] / 2
        bank[200:250, 0] = bank[200:250, 0].nextafter(torch.tensor(torch.inf))
    expected = search_nearest(queries, bank, 10)

    with simulate_cuda() as device:
        on_device = queries.cuda(), bank.cuda()
        spent = device.measure_waits(lambda: search_nearest(*on_device, 10))
        found = [rows.cpu() for rows in search_nearest(*on_device, 10)]

    budget = "neighbours" if float64_device.type == "cuda" else "neighbours, float64 on the CPU"
    device.check_budget(budget, BUDGETS, spent)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
