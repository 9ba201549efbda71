import math
from typing import Any

import pytest

from msn_eval.monitor.alarms import Alarm, find_alarms
from msn_eval.monitor.snapshot_features import ExtractionSettings, SnapshotFeatures

_LOG_K = math.log(64)
_HEALTHY = {
    "loss": 2.9, "cross_entropy": 2.85, "me_max": 0.02, "target_entropy": 1.7, "prototypes_in_use": 50.0,
    "feature_rank": 3.5, "feature_spread": 0.1, "output_spread": 0.8, "gradient_norm": 1.2, "epoch": 9.0,
}  # fmt: skip


def _run(*sick: dict[str, float | None], healthy: int = 5) -> list[dict[str, float | None]]:
    """Return healthy lines and then sick ones, 10 steps apart."""
    lines: list[dict[str, Any]] = [_HEALTHY] * healthy + [{**_HEALTHY, **numbers} for numbers in sick]
    return [{**line, "step": 10.0 * number} for number, line in enumerate(lines, start=1)]


def _alarms(lines: list[dict[str, float | None]], snapshots: list[SnapshotFeatures] | None = None) -> tuple[Alarm, ...]:
    return find_alarms(lines, snapshots or [], prototypes=64, first_epochs=3)


def _snapshot(step: int, problem: str) -> SnapshotFeatures:
    settings = ExtractionSettings(data_sha256="d", tap="cls-norm", precision="exact")
    return SnapshotFeatures(
        step=step, epoch=1, created="", sha256="f", weights_sha256=f"{step}", seen=settings,
        images=9, feature_rank=1.0, feature_spread=0.0, problem=problem,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sick", "what"),
    [
        ({"feature_spread": 0.009}, "collapse: all images look alike"),
        ({"output_spread": 0.009}, "collapse: all images look alike"),
        ({"feature_rank": 1.04}, "collapse: all images look alike"),
        ({"me_max": 0.91 * _LOG_K}, "collapse: all images are on one prototype"),
        ({"prototypes_in_use": 1.0}, "collapse: all images are on one prototype"),
        ({"target_entropy": 0.98 * _LOG_K}, "collapse: targets prefer no prototype (entropy near log k = 4.16)"),
        ({"cross_entropy": _LOG_K}, "no learning: cross-entropy at log k = 4.16 after epoch 3"),
    ],
)
def test_ten_consecutive_sick_lines_are_an_alarm_and_nine_are_not(sick: dict[str, float | None], what: str) -> None:
    (alarm,) = _alarms(_run(*[sick] * 10))

    assert (alarm.what.startswith(what), alarm.first, alarm.last, alarm.is_active) == (True, 60, 150, True)
    assert _alarms(_run(*[sick] * 9)) == ()


def test_three_lines_without_a_finite_loss_are_an_alarm_and_two_are_not() -> None:
    (alarm,) = _alarms(_run(*[{"loss": None}] * 3))

    assert str(alarm) == "loss or gradient is not finite, since step 60"
    assert _alarms(_run(*[{"loss": None}] * 2)) == ()


def test_a_past_alarm_has_its_first_and_last_step() -> None:
    (alarm,) = _alarms(_run(*[{"me_max": 4.0}] * 12, {}))

    assert str(alarm) == "collapse: all images are on one prototype, from step 60 to 170"


def test_a_healthy_line_between_sick_ones_restarts_the_count() -> None:
    assert _alarms(_run(*[{"me_max": 4.0}] * 6, {}, *[{"me_max": 4.0}] * 6)) == ()


def test_a_loss_of_log_k_is_not_an_alarm_in_the_first_epochs() -> None:
    assert _alarms(_run(*[{"cross_entropy": _LOG_K, "epoch": 2.0}] * 20)) == ()


def test_a_method_without_prototypes_has_no_alarms_about_them() -> None:
    lines = _run(*[{"cross_entropy": _LOG_K, "me_max": 4.0, "target_entropy": 4.1}] * 20)

    assert find_alarms(lines, [], prototypes=None, first_epochs=0) == ()


def test_one_degenerate_snapshot_is_an_alarm() -> None:
    problems = {30: "", 40: "constant", 50: "constant", 60: ""}

    (alarm,) = _alarms(_run(), [_snapshot(step, problem) for step, problem in problems.items()])

    assert str(alarm) == "features of a snapshot: constant, from step 40 to 50"
