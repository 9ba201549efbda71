"""Leaderboard: intervals and ranks of cells from the stored predictions."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_eval.results import leaderboard
from msn_eval.results.folder import scan_results
from msn_eval.results.leaderboard import make_leaderboard
from msn_eval.results.record import Predictions, Result, read_predictions, read_result, result_id, write_result
from msn_eval.results.statistics import accuracy_interval, compute_metrics
from msn_eval.results.table import CellStatistics, get_cell_key

_RECORD = Path(__file__).parents[2] / "golden" / "records" / "schema-1" / "b39361b67149d6c5.json"


def _write(folder: Path, name: str, draw: int, right: int) -> Result:
    """Write a record whose first `right` of 200 images are right."""
    base = read_result(_RECORD)
    stored = read_predictions(_RECORD.with_suffix(".npz"))
    ranks = np.where(np.arange(200) < right, 1, 2)
    weights = name * 64
    identity = result_id(weights_sha256=weights, key=None, protocol_id=base.protocol_id, draw=draw)
    result = replace(
        base,
        id=identity,
        checkpoint=replace(base.checkpoint, name=name, weights_sha256=weights),
        split=replace(base.split, draw=draw),
        metrics=compute_metrics(ranks),
        predictions=f"{identity}.npz",
    )
    return write_result(folder, result, Predictions(**vars(stored) | {"rank_of_label": ranks}))


def test_checkpoints_that_are_not_separable_share_a_rank(tmp_path: Path) -> None:
    results = [_write(tmp_path, name, 1, right) for name, right in (("a", 150), ("b", 149), ("c", 100))]

    board = make_leaderboard(scan_results([tmp_path]))

    assert [board.standings[get_cell_key(result)].rank for result in results] == [1, 1, 3]


def test_interval_is_recorded_for_one_draw_and_computed_for_several(tmp_path: Path) -> None:
    one = _write(tmp_path, "a", 1, 100)
    several = [_write(tmp_path, "b", draw, right) for draw, right in ((1, 90), (2, 110))]

    standings = make_leaderboard(scan_results([tmp_path])).standings

    scores = np.array([2] * 90 + [1] * 20 + [0] * 90)
    expected = accuracy_interval(scores, draws=2)
    assert one.metrics is not None
    assert standings[get_cell_key(one)].interval == one.metrics.top1_ci95
    assert standings[get_cell_key(several[0])].interval == (expected.low, expected.high)


def test_checkpoint_without_all_draws_has_no_rank(tmp_path: Path) -> None:
    results = [_write(tmp_path, name, draw, 100) for name in "ab" for draw in (1, 2)]
    partly = _write(tmp_path, "c", 1, 100)

    standings = make_leaderboard(scan_results([tmp_path])).standings

    assert [standings[get_cell_key(one)].rank for one in (results[0], results[2], partly)] == [1, 1, None]


def test_cell_with_a_failed_draw_has_no_interval_and_no_rank(tmp_path: Path) -> None:
    _write(tmp_path, "a", 1, 100)
    result = _write(tmp_path, "b", 1, 100)
    write_result(tmp_path, replace(result, status="failed", error="NaN", metrics=None, predictions=None), None)

    board = make_leaderboard(scan_results([tmp_path]))

    assert board.standings.get(get_cell_key(result), CellStatistics()) == CellStatistics()
    assert board.notices == ()


def test_missing_predictions_are_reported_and_keep_the_recorded_interval(tmp_path: Path) -> None:
    result = _write(tmp_path, "a", 1, 100)
    (tmp_path / f"{result.id}.npz").unlink()

    board = make_leaderboard(scan_results([tmp_path]))

    assert result.metrics is not None
    assert board.standings[get_cell_key(result)] == CellStatistics(interval=result.metrics.top1_ci95)
    assert board.notices == ("No rank for 1 cell, whose predictions are missing.",)


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_damaged_draw_leaves_its_cell_without_interval_and_rank(tmp_path: Path, damage: str) -> None:
    whole = _write(tmp_path, "a", 2, 100)
    result = _write(tmp_path, "a", 1, 100)
    other = _write(tmp_path, "b", 1, 101)
    path = tmp_path / f"{result.id}.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        shutil.copy(tmp_path / f"{other.id}.npz", path)

    scan = scan_results([tmp_path])

    assert [fault.where for fault in scan.faults] == [str(path.with_suffix(".json"))]
    assert get_cell_key(whole) not in make_leaderboard(scan).standings


def test_large_table_has_no_ranks_unless_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [_write(tmp_path, name, 1, 100) for name in "ab"]
    monkeypatch.setattr(leaderboard, "_MAX_COST", 1000)
    scan = scan_results([tmp_path])

    default, requested = make_leaderboard(scan), make_leaderboard(scan, ranked=True)

    assert [board.standings[get_cell_key(results[0])].rank for board in (default, requested)] == [None, 1]
    assert "--ranks adds them" in default.notices[0]
