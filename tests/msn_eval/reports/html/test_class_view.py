import shutil
from pathlib import Path

import numpy as np
import pytest

import msn_eval.reports.html.class_view
from msn_eval.reports.html.class_view import make_class_views
from msn_eval.results.folder import scan_results
from msn_eval.results.record import Result, read_predictions
from msn_eval.results.table import Table, make_table

Records = dict[str, tuple[Result, Path]]


@pytest.fixture
def runs(digits_runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits_runs, tmp_path / "runs")
    return tmp_path / "runs"


def _read(runs: Path) -> tuple[Table, Records]:
    scan = scan_results([runs])
    pairs = zip(scan.results, scan.paths, strict=True)
    return make_table(scan.results), {result.id: (result, path) for result, path in pairs}


def test_classes_are_counted_over_all_draws(runs: Path) -> None:
    table, records = _read(runs)

    views, notices = make_class_views(table, records)

    assert ([view.column for view in views], notices) == (list(table.columns), ())
    for view in views:
        ids = table.cells[table.rows[0], view.column].results
        stored = [read_predictions(runs / f"{identity}.npz") for identity in ids]
        right = [
            sum(int(np.sum(draw.prediction[draw.label == label] == label)) for draw in stored) for label in range(10)
        ]
        assert (view.right, view.draws) == ((tuple(right),), 3)
        assert view.names == tuple("0123456789")
        assert sum(view.images) == 797


def test_wordnet_ids_are_shown_with_their_words(runs: Path) -> None:
    table, records = _read(runs)
    for path in runs.glob("*.npz"):
        with np.load(path) as stored:
            arrays = dict(stored)
        arrays["image"] = np.array([b"n0144353" + bytes(name) for name in arrays["image"]])  # n01443530 to n01443539
        np.savez(path, **arrays)

    views, _ = make_class_views(table, records)

    assert {(view.names[0], view.names[7]) for view in views} == {("n01443530", "goldfish (n01443537)")}


def test_a_cell_without_all_of_its_predictions_is_not_shown(runs: Path) -> None:
    table, records = _read(runs)
    (runs / f"{table.cells[table.rows[0], table.columns[0]].results[1]}.npz").unlink()

    views, _ = make_class_views(table, records)

    assert [view.column for view in views] == list(table.columns[1:])


def test_damaged_predictions_are_named(runs: Path) -> None:
    table, records = _read(runs)
    broken = runs / f"{table.cells[table.rows[0], table.columns[0]].results[0]}.npz"
    broken.write_bytes(b"PK")

    views, notices = make_class_views(table, records)

    assert [view.column for view in views] == list(table.columns[1:])
    assert str(broken) in notices[0]


def test_views_beyond_the_limit_are_counted_in_a_notice(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, records = _read(runs)
    monkeypatch.setattr(msn_eval.reports.html.class_view, "_MOST_COUNTS", 25)

    views, notices = make_class_views(table, records)

    assert len(views) == 2
    assert notices == (
        f"Accuracy per class is not shown for {len(table.columns) - 2} protocols, to limit the size of the page.",
    )


def test_reliability_is_counted_over_all_draws_where_there_are_probabilities(runs: Path) -> None:
    table, records = _read(runs)

    views, _ = make_class_views(table, records)

    for view in views:
        if view.column.probe == "ncm":
            assert view.bins == ()
            continue
        ids = table.cells[table.rows[0], view.column].results
        stored = [read_predictions(runs / f"{identity}.npz") for identity in ids]
        confidence = np.concatenate([draw.confidence for draw in stored if draw.confidence is not None])
        right = np.concatenate([draw.prediction == draw.label for draw in stored])
        highest = confidence >= 14 / 15
        (bins,) = view.bins
        assert sum(count for count, _, _ in bins) == 3 * 797
        if highest.any():
            expected = (highest.sum(), confidence[highest].mean(dtype=float), right[highest].mean())
            assert bins[-1] == pytest.approx(expected, abs=1e-4)
