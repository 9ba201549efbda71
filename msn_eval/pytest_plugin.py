"""Plug-in of pytest with the fixture `low_shot_gate`. Every run of pytest loads it, so it imports nothing large.

def test_not_worse(low_shot_gate):
    low_shot_gate("baseline.json", "model.pth", margin=0.02)
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from msn_eval.results.gate import GateReport


@pytest.fixture
def low_shot_gate(tmp_path_factory: pytest.TempPathFactory) -> "Callable[..., GateReport]":
    """Return a function that fails the test unless a checkpoint passes `msn-eval check` against a baseline.

    Its arguments are the baseline file, the checkpoint, and by keyword `margin` (a fraction, default 0.01) and the options of
    `msn-eval check --checkpoint`, such as `data`, `device` or `arch`. Results go to a temporary folder unless `out` is given.
    It returns the `GateReport`.
    """

    def check(
        baseline: str | Path, checkpoint: str | Path, *, margin: float | None = None, **options: object
    ) -> "GateReport":
        from dataclasses import fields

        from msn_eval.config.request import EvaluationConfig
        from msn_eval.errors import ComparisonError, UsageError, named_as_arguments
        from msn_eval.evaluation.baseline_plan import plan_check
        from msn_eval.evaluation.evaluate import evaluate_all
        from msn_eval.reports.gate import render_gate_text
        from msn_eval.results.baseline import read_baseline
        from msn_eval.results.gate import DEFAULT_MARGIN, check_results

        __tracebackhide__ = True
        margin = DEFAULT_MARGIN if margin is None else margin
        if not 0 <= margin < 1:
            raise UsageError(f"margin {margin:g}: not a fraction in [0, 1)", hint="0.01 is one point.")
        given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        given.setdefault("out", str(tmp_path_factory.mktemp("low_shot_gate")))
        try:
            with named_as_arguments([field.name for field in fields(EvaluationConfig)]):
                expected = read_baseline(Path(baseline))
                plans = plan_check(expected, str(checkpoint), given)
                results = [result for plan in plans for result in evaluate_all(plan).results]
            report = check_results(expected, results, [Path(plan.config.out) for plan in plans], margin=margin)
        except ComparisonError as error:
            pytest.fail(f"NOT COMPARABLE: {error}", pytrace=False)
        if report.exit_code:
            pytest.fail(render_gate_text(report), pytrace=False)
        return report

    return check
