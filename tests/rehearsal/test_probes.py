"""Probes fitted on the simulated device: the scores and choices of a CPU, with few waits of the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from msn_eval.config.recipes import LinearRecipe
from msn_eval.features.extraction import Features
from msn_eval.probes import logistic
from msn_eval.probes.base import FeatureProbe
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.knn_search import search_nearest
from msn_eval.probes.linear import Linear
from msn_eval.probes.logistic import Logistic, LogisticAutoLambda
from msn_eval.probes.logistic_solvers import newton
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
    "Newton": 6.8,
    "Newton in chunks": 4.7,
    "lambda auto": 6.9,
    "k-NN": 18,
    "linear grid": 19,
    "ridge": 14,
    "ncm": 6,
    "neighbours": 14,
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


@pytest.mark.parametrize("name", PROBES)
def test_scores_and_choices_are_those_of_a_cpu(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    products = 0
    multiply = newton._curvature_product

    def count(*arguments: Any) -> Any:
        nonlocal products
        products += 1
        return multiply(*arguments)

    monkeypatch.setattr(newton, "_curvature_product", count)
    if name == "Newton in chunks":
        monkeypatch.setattr(logistic, "is_large", lambda *sizes: True)
    expected_choices, expected = _fit(PROBES[name], "cpu")
    products = 0

    with simulate_cuda() as device:
        choices, scores = _fit(PROBES[name], "cuda:0")

    device.check_budget(name, BUDGETS, device.waits.total() / max(1, products))
    for chosen, other in zip(choices, expected_choices, strict=True):
        assert chosen.keys() == other.keys()
        assert [chosen[key] for key in chosen] == [
            pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for value in other.values()
        ]
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_neighbours_are_those_of_a_cpu_to_the_last_bit(simulate_cuda: Simulate) -> None:
    bank, queries = (torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (300, 30))
    expected = search_nearest(queries, bank, 10)

    with simulate_cuda() as device:
        on_device = queries.cuda(), bank.cuda()
        spent = device.measure_waits(lambda: search_nearest(*on_device, 10))
        found = [rows.cpu() for rows in search_nearest(*on_device, 10)]

    device.check_budget("neighbours", BUDGETS, spent)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
