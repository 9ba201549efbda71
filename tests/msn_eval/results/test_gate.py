"""Gate: verdicts follow from the images, and invalid or doubtful results never pass."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from msn_eval.files.json_records import add_seal
from msn_eval.reports.gate import render_gate_json, render_gate_junit, render_gate_markdown, render_gate_text
from msn_eval.results.baseline import Baseline, make_baseline
from msn_eval.results.folder import list_results
from msn_eval.results.gate import LEVEL, GateReport, check_results, judge_differences
from msn_eval.results.record import Result
from msn_eval.results.statistics import difference_interval

RunWriter = Callable[..., list[Result]]
Right = NDArray[np.bool_]
_N = 10_000


def _right(n: int = _N, *, lost: int = 0, gained: int = 0, draws: int = 1) -> Right:
    """Return whether each image is right, where the first `lost` and the last `gained` differ from the baseline."""
    right = np.zeros((draws, n), dtype=bool)
    right[:, : 7 * n // 10] = True
    right[:, :lost] = False
    right[:, n - gained :] |= gained > 0
    return right


@pytest.fixture(scope="module")
def baseline(write_run: RunWriter, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    folder = tmp_path_factory.mktemp("baseline")
    write_run(folder, _right())
    return make_baseline(list_results([folder]), [folder])


def _check(baseline: Baseline, folder: Path, **options: float) -> GateReport:
    return check_results(baseline, list_results([folder]), [folder], **options)


@pytest.mark.parametrize(
    ("lost", "gained", "margin", "verdict"),
    [
        (0, 0, 0.01, "pass"),
        (60, 55, 0.01, "pass"),
        (200, 0, 0.01, "regression"),
        (250, 50, 0.01, "regression"),
        (70, 0, 0.01, "pass"),  # significant, and surely smaller than the margin
        (99, 0, 0.01, "regression"),  # significant, and perhaps as large as the margin
        (100, 0, 0.01, "regression"),
        (150, 50, 0.002, "regression"),
        (60, 55, 0.002, "inconclusive"),  # a drop of 0.2 points is within the interval
        (650, 600, 0.0101, "inconclusive"),  # 1,250 that differ hide a drop of a point
        (650, 650, 0.0101, "pass"),
        (0, 400, 0.01, "pass"),
        (0, 600, 0.01, "too good"),
        (0, 0, 0.0, "pass"),  # no prediction differs, whatever the margin
    ],
)
def test_verdict_follows_from_what_was_lost_and_gained(
    baseline: Baseline, write_run: RunWriter, tmp_path: Path, lost: int, gained: int, margin: float, verdict: str
) -> None:
    write_run(tmp_path, _right(lost=lost, gained=gained), weights="b" * 64)

    report = _check(baseline, tmp_path, margin=margin)

    codes = {"regression": 10, "too good": 11, "inconclusive": 11, "pass": 0}
    assert (report.verdict, report.exit_code) == (verdict, codes[verdict])


def test_equal_scores_with_different_predictions_are_inconclusive(
    baseline: Baseline, write_run: RunWriter, tmp_path: Path
) -> None:
    write_run(tmp_path, _right(), weights="b" * 64, wrong_class=2)

    assert _check(baseline, tmp_path, margin=0.0001).verdict == "inconclusive"


def _drop_record(results: list[Result], folder: Path) -> None:
    (folder / f"{results[0].id}.json").unlink()


def _drop_predictions(results: list[Result], folder: Path) -> None:
    (folder / str(results[0].predictions)).unlink()


def _edit(**fields: object) -> Callable[[list[Result], Path], None]:
    """Return a function that changes the first record's JSON and seals it; `__` separates the keys."""

    def edit(results: list[Result], folder: Path) -> None:
        path = folder / f"{results[0].id}.json"
        content = json.loads(path.read_text())
        for name, value in fields.items():
            target = content
            *outer, last = name.split("__")
            for one in outer:
                target = target[one]
            target[last] = value
        path.write_text(json.dumps(add_seal(content)))

    return edit


_MALFORMED: dict[str, tuple[Callable[[list[Result], Path], None], str, str]] = {
    "a better metric": (_edit(metrics__top1=0.99), "not comparable", "metrics.top1: recorded 0.99, computed from"),
    "failed": (_edit(status="failed", metrics=None, error="broken"), "not comparable", "FAILED: broken"),
    "not converged": (_edit(status="not_converged"), "inconclusive", "did not converge"),
    "a missing draw": (_drop_record, "not comparable", "draws [2, 3] instead of [1, 2, 3]"),
    "no predictions": (_drop_predictions, "not comparable", "No such file"),
    "fewer images": (_edit(data__val_images=2999), "not comparable", "2,999, stored predictions of 3,000 images"),
    "other data": (_edit(data__sha256="e" * 64), "not comparable", "not that of its protocol"),
    "different labelled images": (_edit(split__sha256="e" * 64), "not comparable", "different labelled images"),
    "fewer labelled images": (_edit(split__images=14), "not comparable", "different labelled images"),
    "more overlap": (_edit(split__overlap=3), "inconclusive", "3 test images are also among its labelled images"),
    "an image of overlap": (_edit(split__overlap=1), "inconclusive", "1 test image is also among its labelled images"),
    "a draw of another number": (_edit(split__draw=4), "not comparable", "draws [2, 3, 4] instead of [1, 2, 3]"),
    "a draw twice": (_edit(split__draw=2), "not comparable", "a draw occurs twice"),
}


@pytest.mark.parametrize("fault", _MALFORMED)
def test_invalid_or_doubtful_results_never_pass(write_run: RunWriter, tmp_path: Path, fault: str) -> None:
    """Without its fault each of these passes."""
    spoil, verdict, reason = _MALFORMED[fault]
    before, after = tmp_path / "before", tmp_path / "after"
    write_run(before, _right(3000, draws=3))
    results = write_run(after, _right(3000, draws=3), weights="b" * 64)
    baseline = make_baseline(list_results([before]), [before])
    assert _check(baseline, after).verdict == "pass"

    spoil(results, after)
    report = _check(baseline, after)

    assert report.verdict == verdict
    assert reason in report.protocols[0].reason


@pytest.mark.parametrize(
    "metrics", [{"top1": math.nan}, {"top1_ci95": (math.nan, math.nan)}, {"top1": math.inf}, {"top1": 70.0}], ids=str
)
def test_metrics_outside_their_range_never_pass(write_run: RunWriter, tmp_path: Path, metrics: dict[str, Any]) -> None:
    write_run(tmp_path / "before", _right(3000))
    write_run(tmp_path / "after", _right(3000), weights="b" * 64)
    baseline = make_baseline(list_results([tmp_path / "before"]), [tmp_path / "before"])
    (result,) = list_results([tmp_path / "after"])
    assert result.metrics is not None
    broken = replace(result, metrics=replace(result.metrics, **metrics))

    report = check_results(baseline, [broken], [tmp_path / "after"])

    assert report.verdict == "not comparable"
    assert "metrics.top1" in report.protocols[0].reason


@pytest.mark.parametrize(
    ("options", "difference"),
    [({"limit": 50}, "limit: None -> 50"), ({"precision": "reduced"}, "precision: exact -> reduced")],
)
def test_other_protocol_is_not_comparable_and_lists_the_fields(
    baseline: Baseline, write_run: RunWriter, tmp_path: Path, options: dict[str, object], difference: str
) -> None:
    write_run(tmp_path, _right(), weights="b" * 64, **options)

    report = _check(baseline, tmp_path)

    assert report.exit_code == 12
    assert report.protocols[0].reason == f"another protocol was measured: {difference}"
    assert report.protocols[1].reason.startswith("no baseline for key knn k=")


def test_partial_results_are_not_comparable_even_with_a_partial_baseline(
    baseline: Baseline, write_run: RunWriter, tmp_path: Path
) -> None:
    (result,) = write_run(tmp_path, _right(), weights="b" * 64, limit=50)
    entry = replace(baseline.protocols[0], protocol_id=result.protocol_id, protocol=result.protocol)

    report = _check(replace(baseline, protocols=(entry,)), tmp_path)

    assert (report.exit_code, report.protocols[0].reason) == (12, "scored on a part of the images (--limit 50)")


def test_no_results_or_fewer_images_are_not_comparable(
    baseline: Baseline, write_run: RunWriter, tmp_path: Path
) -> None:
    write_run(tmp_path, _right(_N - 1), weights="b" * 64)

    report = _check(baseline, tmp_path)

    assert (report.exit_code, report.protocols[0].reason) == (12, "9,999 test images instead of 10,000")
    assert check_results(baseline, [], []).exit_code == 12


def test_baselines_own_weights_read_differently_are_not_comparable(
    baseline: Baseline, write_run: RunWriter, tmp_path: Path
) -> None:
    def renormalise(result: Result) -> Result:
        transform = replace(result.features.transform, mean=(0.4,), mean_std_from="--mean")
        return replace(result, features=replace(result.features, transform=transform))

    write_run(tmp_path, _right(), changed=renormalise)

    report = _check(baseline, tmp_path)

    reason = "the baseline's weights were read differently: transform.mean: [0.5] -> [0.4]"
    assert (report.exit_code, [one.reason for one in report.protocols]) == (12, [reason])


def test_regression_outranks_not_comparable(baseline: Baseline, write_run: RunWriter, tmp_path: Path) -> None:
    write_run(tmp_path, _right(lost=300), weights="b" * 64)
    write_run(tmp_path, _right(), weights="b" * 64, k=9)

    assert [one.verdict for one in _check(baseline, tmp_path).protocols] == ["regression", "not comparable"]
    assert _check(baseline, tmp_path).exit_code == 10


def test_different_versions_are_noted_and_pass(baseline: Baseline, write_run: RunWriter, tmp_path: Path) -> None:
    def newer(result: Result) -> Result:
        features = replace(result.features, decoder="pillow 14.0")
        return replace(result, features=features, environment=replace(result.environment, torch="2.15"))

    write_run(tmp_path, _right(), weights="b" * 64, changed=newer)

    report = _check(baseline, tmp_path)

    assert report.verdict == "pass"
    assert report.protocols[0].notes == ("torch: 2.14 -> 2.15", "decoder: pillow 13.0 -> pillow 14.0")


def test_protocols_are_judged_together() -> None:
    """A drop that is significant alone is not significant among twelve, and the detectable drop is larger."""
    drop = np.repeat([-1, 0, 1], [75, 4875, 40])
    (alone,) = judge_differences([drop], [1], margin=0.005)
    together = judge_differences([drop, *[np.zeros(5000, dtype=np.int64)] * 11], [1] * 12, margin=0.005)

    assert (alone.verdict, together[0].verdict) == ("regression", "inconclusive")
    assert together[0].worse == pytest.approx(12 * alone.worse)
    assert together[0].detectable > alone.detectable


@given(st.integers(20, 3000), st.integers(0, 300), st.integers(0, 300), st.floats(0, 0.1))
@settings(max_examples=200, deadline=None)
def test_pass_and_regression_follow_from_the_interval(n: int, lost: int, gained: int, margin: float) -> None:
    differences = np.repeat([-1, 0, 1], [lost, max(0, n - lost - gained), gained])

    (one,) = judge_differences([differences], [1], margin=margin)

    low = difference_interval(differences, draws=1).low
    assert one.verdict != "pass" or low > -margin
    assert one.verdict != "regression" or (low <= -margin and one.worse <= LEVEL)
    assert one.verdict != "inconclusive" or low <= -margin


def test_equal_input_gives_equal_bytes(baseline: Baseline, write_run: RunWriter, tmp_path: Path) -> None:
    write_run(tmp_path, _right(lost=90, gained=40), weights="b" * 64)
    renderers = (render_gate_text, render_gate_markdown, render_gate_json, render_gate_junit)

    outputs = {tuple(render(_check(baseline, tmp_path)) for render in renderers) for _ in range(4)}

    assert len(outputs) == 1


def _load_simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "exact" / "simulate_gate.py"
    loader = SourceFileLoader("simulate_gate", str(path))
    module = ModuleType(loader.name)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("n", [2_500, 10_000])
@pytest.mark.parametrize("share", [0.02, 0.04, 0.08])
def test_drop_of_the_margin_rarely_passes_and_no_change_is_rarely_a_regression(n: int, share: float) -> None:
    """With one draw the rates are computed, so no sampling error is allowed for."""
    simulation = _load_simulation()

    passed, _ = simulation.exact_rates(share, 0.01, n, margin=0.01)
    _, regression = simulation.exact_rates(share, 0.0, n, margin=0.01)

    assert 0.015 < passed <= 0.025  # not far below either: the interval is no wider than it must be
    assert regression <= LEVEL


@pytest.mark.parametrize("n", [200, 2_500])
def test_drop_of_the_margin_rarely_passes_with_three_draws(n: int) -> None:
    """Simulated: at a rate of 2.5 %, more than 23 of 500 samples pass with a probability of 0.2 %."""
    simulation = _load_simulation()

    counts = simulation.verdict_counts(simulation.World.of(3, 0.04, 0.01), n, 500, margin=0.01, seed=14)

    assert counts["pass"] <= 23


@pytest.mark.parametrize(("n", "share"), [(1_000, 0.08), (10_000, 0.002)])
def test_no_change_in_twelve_protocols_is_rarely_a_regression(n: int, share: float) -> None:
    """A sample of `make exact`. 8 of 250 have a probability of 1 in 20,000 at the stated level."""
    simulation = _load_simulation()

    regressions, _ = simulation.families_called(simulation.World(1, share, 0.0), n, 250, margin=0.01, seed=11)

    assert regressions <= 6 * 250 * LEVEL


@pytest.mark.parametrize(("drop", "margin"), [(0.02, 0.01), (0.01, 0.002)])
def test_a_true_drop_is_a_regression(drop: float, margin: float) -> None:
    simulation = _load_simulation()
    world = simulation.World.of(1, 0.02, drop)

    assert simulation.regressions_found(world, 10_000, 40, margin=margin, seed=12) >= 38


def test_paired_intervals_have_their_stated_coverage() -> None:
    simulation = _load_simulation()

    held = [simulation.coverage(simulation.World(3, 0.08, tilt), 2_000, 300, seed=13) for tilt in (0.0, 0.5, 1.0)]

    assert 0.925 < np.mean(held) < 0.975
