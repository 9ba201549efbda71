import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msn_eval.features.extraction import Features
from msn_eval.monitor.snapshot_features import (
    Place,
    Seen,
    look_at,
    newest_of_each_step,
    read_snapshot_features,
    write_snapshot_features,
)

_PLACE = Place(
    step=40, epoch=2, created="2026-01-31T12:00:00Z", sha256="a" * 64, weights_sha256="b" * 64,
    seen=Seen(data_sha256="c" * 64, tap="cls-norm", precision="exact"),
)  # fmt: skip


def _features(values: Tensor) -> Features:
    ids = tuple(f"a/{number}.png" for number in range(len(values)))
    return Features(
        values=values, labels=torch.zeros(len(values), dtype=torch.int64), image_ids=ids, n_classes=2, tap="cls-norm"
    )


def _noise(rows: int = 200, columns: int = 16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_random_features_fill_every_direction_and_are_well() -> None:
    look = look_at(_features(_noise()), _PLACE)

    assert (look.feature_rank or 0) > 15
    assert look.feature_spread == pytest.approx(1, abs=0.05)
    assert (look.images, look.problem) == (200, "")


def test_features_that_hardly_differ_are_told_before_they_are_equal() -> None:
    look = look_at(_features(torch.arange(16.0) + 1e-2 * _noise()), _PLACE)

    assert look.problem.startswith("all images look alike: rank 1.0")


def test_equal_features_are_told() -> None:
    look = look_at(_features(torch.arange(16.0).expand(20, -1)), _PLACE)

    assert look.problem.startswith("collapsed representation")


def test_looks_are_read_as_they_were_written_and_damaged_ones_told(tmp_path: Path) -> None:
    look = look_at(_features(_noise()), _PLACE)
    write_snapshot_features(tmp_path, look)
    (tmp_path / "step-00000080.00000000.json").write_text('{"schema": 1, "step": "80"}')
    (tmp_path / "step-note.json").write_text("mine")

    looks, faults = read_snapshot_features(tmp_path)

    assert looks == [look]
    assert len(faults) == 1
    assert "step-00000080.00000000.json: step is of the wrong type" in faults[0]


def test_looks_at_other_images_stand_beside_each_other_and_are_not_mixed(tmp_path: Path) -> None:
    one = look_at(_features(_noise()), _PLACE)
    other = dataclasses.replace(one, seen=dataclasses.replace(one.seen, data_sha256="d" * 64))
    for look in (one, other):
        write_snapshot_features(tmp_path, look)

    looks, _ = read_snapshot_features(tmp_path)

    assert len(looks) == 2
    assert newest_of_each_step(looks, other.seen) == {40: other}
