"""Plans that measure as a baseline was measured, recipes included."""

from pathlib import Path

import pytest

from msn_eval import evaluate
from msn_eval.config.request import EvaluationConfig
from msn_eval.evaluation.baseline_plan import make_baseline_plans
from msn_eval.results.baseline import make_baseline
from msn_eval.results.record import Result


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], Path]:
    """Return records of linear layers by two grids and on augmented images at two learning rates, and their folder."""
    out = tmp_path_factory.mktemp("linear")
    augmented = {"lr": [1.0, 2.0], "epochs": 1, "batch_size": 8, "seed": 3}
    results = [
        result
        for probe, section, recipe in (
            ("linear", "linear", {"lrs": 2, "epochs": 2}),
            ("linear", "linear", {"taps": ["pixels"], "lr": 1.0, "epochs": 2}),
            ("linear", "linear", {"lr": 0.5, "epochs": 3, "seed": 1}),
            ("linear-augmented", "linear_augmented", augmented),
        )
        for result in evaluate(
            "pixels", data="digits", subsets="2imgs@1", probes=probe, device="cpu", no_cache=True, out=out,
            **{section: recipe},
        )
    ]  # fmt: skip
    return results, out


def test_recipes_are_the_baselines(measured: tuple[list[Result], Path]) -> None:
    results, out = measured
    config = EvaluationConfig(checkpoint=["pixels"], data="digits", device="cpu", no_cache=True)

    plans = make_baseline_plans(make_baseline(results, [out]), config)

    tasks = [task for plan in plans for task in plan.tasks]
    assert sorted(task.protocol_id for task in tasks) == sorted(result.protocol_id for result in results)
    assert len(tasks) == 5
