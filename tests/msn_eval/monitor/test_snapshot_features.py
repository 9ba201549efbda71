import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msn_eval.monitor import snapshot_features
from msn_eval.monitor.snapshot_features import ExtractionSettings, SnapshotFeatures

_SETTINGS = ExtractionSettings(data_sha256="c" * 64, tap="cls-norm", precision="exact")
_SNAPSHOT = SnapshotFeatures(
    step=40, epoch=2, created="2026-01-31T12:00:00Z", sha256="a" * 64, weights_sha256="b" * 64, seen=_SETTINGS,
    images=200, feature_rank=15.5, feature_spread=0.9, problem="",
)  # fmt: skip


def _noise(rows: int = 200, columns: int = 16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_random_features_fill_every_direction_without_a_problem() -> None:
    rank, spread, problem, alpha = snapshot_features.measure_features(_noise())

    assert (rank > 15, spread, problem) == (True, pytest.approx(1, abs=0.05), "")
    assert alpha is not None
    assert 0 < alpha < 0.5  # near 0: all directions have the same variance


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        (torch.arange(16.0) + 1e-2 * _noise(), "all images look alike: rank 1.0"),
        (torch.arange(16.0).expand(20, -1), "collapsed representation"),
    ],
)
def test_features_that_are_almost_or_exactly_equal_are_a_problem(features: Tensor, problem: str) -> None:
    assert snapshot_features.measure_features(features)[2].startswith(problem)


def test_statistics_are_read_as_they_were_written_and_damaged_files_are_named(tmp_path: Path) -> None:
    snapshot_features.write_snapshot_features(tmp_path, _SNAPSHOT)
    (tmp_path / "step-00000080.00000000.json").write_text('{"schema": 1, "step": "80"}')
    (tmp_path / "step-note.json").write_text("mine")

    snapshots, faults = snapshot_features.read_snapshot_features(tmp_path)

    assert snapshots == [_SNAPSHOT]
    assert len(faults) == 1
    assert "step-00000080.00000000.json: step is of the wrong type" in faults[0]


@pytest.mark.parametrize("change", [{"feature_rank": 1.0}, {"step": 41}, {"schema": 1}, {"seal": "0" * 64}])
def test_changed_statistics_are_not_believed(tmp_path: Path, change: dict[str, object]) -> None:
    snapshot_features.write_snapshot_features(tmp_path, _SNAPSHOT)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    snapshots, faults = snapshot_features.read_snapshot_features(tmp_path)

    assert (snapshots, len(faults)) == ([], 1)


def test_statistics_of_schema_1_have_no_seal_and_are_read(tmp_path: Path) -> None:
    content = {"schema": 1, **dataclasses.asdict(_SNAPSHOT)}
    (tmp_path / "step-00000040.00000000.json").write_text(json.dumps(content))

    assert snapshot_features.read_snapshot_features(tmp_path) == ([_SNAPSHOT], [])


def test_statistics_of_different_images_are_both_kept_and_not_mixed(tmp_path: Path) -> None:
    other = dataclasses.replace(_SNAPSHOT, seen=dataclasses.replace(_SETTINGS, data_sha256="d" * 64))
    for snapshot in (_SNAPSHOT, other):
        snapshot_features.write_snapshot_features(tmp_path, snapshot)

    snapshots, _ = snapshot_features.read_snapshot_features(tmp_path)

    assert len(snapshots) == 2
    assert snapshot_features.select_newest(snapshots, other.seen) == {40: other}


def test_the_newer_snapshot_of_a_step_is_used() -> None:
    newer = dataclasses.replace(_SNAPSHOT, created="2999-01-01T00:00:00Z", weights_sha256="0" * 64)

    assert snapshot_features.select_newest([newer, _SNAPSHOT], _SETTINGS) == {40: newer}
