"""Table: records become rows, columns and cells."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval.results.folder import list_results
from msn_eval.results.record import Result, protocol_id
from msn_eval.results.row_names import RefusedCheckpoint
from msn_eval.results.table import Table, make_table


@pytest.fixture
def results(digits_runs: Path) -> list[Result]:
    return list_results([digits_runs])


def _other_protocol(result: Result, **changes: object) -> Result:
    protocol = {**result.protocol, **changes}
    return replace(result, protocol=protocol, protocol_id=protocol_id(protocol))


def test_cell_is_mean_and_sample_deviation_over_draws(results: list[Result]) -> None:
    table = make_table(results)

    for (_, column), cell in table.cells.items():
        draws = [r for d in (1, 2, 3) for r in results if (r.protocol_id, r.split.draw) == (column.protocol_id, d)]
        scores = [result.metrics.top1 for result in draws if result.metrics]
        assert (cell.mean, cell.std) == pytest.approx((statistics.fmean(scores), statistics.stdev(scores)))
        assert (cell.draws, cell.results) == (3, tuple(result.id for result in draws))


def test_every_protocol_has_its_own_column(results: list[Result]) -> None:
    reduced = [_other_protocol(result, precision="reduced") for result in results]

    table = make_table([*results, *reduced])

    assert len(table.columns) == len({result.protocol_id for result in [*results, *reduced]})


@pytest.mark.parametrize("status", ["failed", "not_converged"])
def test_cell_has_the_status_of_its_worst_draw_and_no_mean_if_one_failed(results: list[Result], status: str) -> None:
    same = [r for r in results if r.protocol_id == results[0].protocol_id]
    worst = replace(same[0], status=status, metrics=None if status == "failed" else same[0].metrics)

    (cell,) = make_table([worst, *same[1:]]).cells.values()

    assert (cell.mean is None, cell.status) == (status == "failed", status)


def test_checkpoints_of_one_name_are_distinguished_by_hash(results: list[Result]) -> None:
    other = replace(results[0], checkpoint=replace(results[0].checkpoint, weights_sha256="f" * 64))

    table = make_table([results[0], other])

    assert sorted(row.name for row in table.rows) == ["pixels [e3b0c442]", "pixels [ffffffff]"]


def test_rows_are_ordered_best_first_and_failed_last(results: list[Result]) -> None:
    def named(name: str, top1: float | None) -> Result:
        checkpoint = replace(results[0].checkpoint, name=name, weights_sha256=name)
        metrics = results[0].metrics and replace(results[0].metrics, top1=top1 or 0.0)
        status = "failed" if top1 is None else "ok"
        return replace(results[0], checkpoint=checkpoint, status=status, metrics=metrics if top1 is not None else None)

    table = make_table([named("worse", 0.1), named("broken", None), named("better", 0.9)])

    assert [row.name for row in table.rows] == ["better", "worse", "broken"]


def test_refused_checkpoint_has_a_row_without_numbers_after_the_others(results: list[Result]) -> None:
    refused = (RefusedCheckpoint(name="best", path="a/best.pth"), RefusedCheckpoint(name="best", path="b/best.pth"))

    table = make_table(results, refused=refused)

    assert [row.name for row in table.rows] == ["pixels", "a/best", "b/best"]
    assert {table.cells[row, column].status for row in table.rows[1:] for column in table.columns} == {"refused"}


def test_subsets_are_ordered_by_size(results: list[Result]) -> None:
    table: Table = make_table(reversed(results))

    assert [column.subset for column in table.groups()["ncm on digits"]] == ["1img", "2imgs"]


def test_repeated_result_counts_once(results: list[Result]) -> None:
    assert make_table([*results, *results]) == make_table(results)


def test_last_of_repeated_results_counts(results: list[Result]) -> None:
    failed = [replace(result, status="failed", metrics=None) for result in results]

    assert make_table([*failed, *results]) == make_table(results)


def test_order_of_the_records_does_not_matter(results: list[Result]) -> None:
    assert make_table(results) == make_table(results[::-1])


def test_fields_that_a_subset_determines_are_not_shown(results: list[Result]) -> None:
    skipped = [_other_protocol(r, skipped=r.split.subset) for r in results]

    assert {column.reason for column in make_table(skipped).columns} == {"digits"}


def test_differing_precision_is_shown_across_subsets(results: list[Result]) -> None:
    chosen = [r for r in results if r.probe.name == "ncm"]
    mixed = [r if r.split.subset == "1img" else _other_protocol(r, precision="reduced") for r in chosen]

    table = make_table(mixed)

    assert list(table.groups()) == ["ncm on digits, exact precision", "ncm on digits, reduced precision"]


@pytest.mark.parametrize(
    ("images", "classes", "limit", "name", "reasons"),
    [
        ("f" * 64, "e" * 64, None, "photos", {"digits", "photos"}),
        ("f" * 64, None, 10, "digits", {"digits", "digits, 10 validation images per class"}),  # without the data's hash
        ("f" * 64, None, None, "digits", {"digits, images d73c0fcf", "digits, images ffffffff"}),
        (None, "e" * 64, None, "digits", {"digits, classes eeeeeeee", "digits, classes 7427877c"}),
    ],
)
def test_columns_of_different_data_show_what_differs(
    results: list[Result], images: str | None, classes: str | None, limit: int | None, name: str, reasons: set[str]
) -> None:
    data = results[0].data
    fields = {"sha256": images or data.sha256, "class_map_sha256": classes or data.class_map_sha256}
    other = replace(_other_protocol(results[0], data=fields, limit=limit), data=replace(data, name=name))

    table = make_table([results[0], other])

    assert {column.reason for column in table.columns} == reasons


def test_absent_weights_skipped_images_and_collapsed_features_are_noted_in_the_row(results: list[Result]) -> None:
    result = results[0]
    checkpoint = replace(result.checkpoint, matched=0.5, allow_missing=("head.*", "norm.*"))
    features = replace(result.features, degenerate="collapsed")
    skipped = replace(result, checkpoint=checkpoint, features=features, data=replace(result.data, skipped=2))

    table = make_table([skipped, replace(results[1], checkpoint=checkpoint)])

    notes = "50.0% of weights loaded, absent by --allow-missing head.* norm.*, 2 unreadable images skipped, collapsed"
    assert table.rows[0].note == notes


def test_skipped_images_and_collapsed_features_are_noted_with_their_data_set_where_there_are_several(
    results: list[Result],
) -> None:
    fields = {"sha256": "f" * 64, "class_map_sha256": results[0].data.class_map_sha256}
    odd = _other_protocol(results[0], data=fields)
    odd = replace(
        odd, data=replace(odd.data, name="odd", skipped=1), features=replace(odd.features, degenerate="collapsed")
    )

    table = make_table([results[0], odd])

    assert [row.note for row in table.rows] == ["odd: 1 unreadable image skipped, odd: collapsed"]


@pytest.mark.parametrize(
    ("protocol", "reason"),
    [
        ({"by_hand": {"patch_drop": 0.3, "seed": 0}}, "digits, 30 % of patches dropped, seed 0"),
        ({"by_hand": {"image_pixels": 96, "decoder": "nvjpeg"}}, "digits, decoded by nvjpeg, 96 px"),
        ({"by_hand": {"mean": [0.5, 0.25, 0], "tap": "cls"}}, "digits, mean 0.5,0.25,0, tap cls"),
        ({"limit": 1}, "digits, 1 validation image per class"),
        ({"limit": 2, "by_hand": {"image_pixels": 96}}, "digits, 96 px, 2 validation images per class"),
    ],
)
def test_manual_options_are_shown_for_a_single_protocol(
    results: list[Result], protocol: dict[str, object], reason: str
) -> None:
    column = make_table([_other_protocol(results[0], **protocol)]).columns[0]

    assert column.reason == reason


def test_rows_with_different_labelled_images_are_mentioned_in_a_notice(results: list[Result]) -> None:
    other = replace(
        results[0],
        checkpoint=replace(results[0].checkpoint, weights_sha256="f" * 64),
        split=replace(results[0].split, sha256="f" * 64),
    )

    (notice,) = make_table([results[0], other]).notices

    assert notice.startswith("Rows were measured with different labelled images")
    assert make_table(results).notices == ()


def test_linear_columns_show_differences_from_the_recipe_and_from_each_other(results: list[Result]) -> None:
    def layer(name: str = "linear", version: int = 1, **params: float | str) -> Result:
        changed = _other_protocol(results[0], probe={"name": name, "version": version, "params": params})
        return replace(changed, probe=replace(changed.probe, name=name, params=params))

    def heads(*layers: Result) -> set[str]:
        return {column.group for column in make_table(list(layers)).columns}

    grid, first, second = layer(lrs=13, epochs=100), layer(lr=3.0, epochs=100), layer(lr=6.4, epochs=100)
    assert heads(grid) == {"linear on digits"}
    assert heads(first) == {"linear on digits, learning rate 3"}
    assert heads(first, second) == {"linear on digits, learning rate 3", "linear on digits, learning rate 6.4"}
    assert heads(first, grid) == {"linear on digits, learning rate 3", "linear on digits, 13 learning rates"}
    assert heads(layer(lrs=13, epochs=400)) == {"linear on digits, 400 epochs"}  # although no other column differs
    taps = layer(lrs=13, epochs=100, taps="cls,mean")  # always shown: the number is that of the chosen tap
    assert heads(taps) == {"linear taps=cls,mean on digits"}
    assert heads(grid, taps) == {"linear on digits", "linear taps=cls,mean on digits"}
    assert heads(layer("linear-augmented", lr=6.4, epochs=100)) == {"linear-augmented on digits"}
    assert heads(layer("linear-augmented", lr=3.2, epochs=50)) == {
        "linear-augmented on digits, 50 epochs, learning rate 3.2"
    }
    earlier, current = (layer("linear-augmented", version, lr=6.4, epochs=100) for version in (1, 2))
    assert heads(earlier, current) == {f"linear-augmented on digits, probe version {version}" for version in (1, 2)}


def _on_test_set(result: Result, name: str, *, top1: float, classes: int = 10, sha256: str = "e" * 64) -> Result:
    """Return the record of the same fit on a test set."""
    assert result.metrics is not None
    data = replace(
        result.data, name=name, sha256=sha256, classes=classes, trained_on="digits", trained_classes=result.data.classes
    )
    scored = {"sha256": sha256, "class_map_sha256": data.class_map_sha256}
    other = _other_protocol(result, data=scored, trained_on=result.data.class_map_sha256)
    return replace(other, id=f"{name}{result.split.draw}", data=data, metrics=replace(result.metrics, top1=top1))


def _fits(results: list[Result]) -> list[Result]:
    return [result for result in results if (result.probe.name, result.split.subset) == ("ncm", "2imgs")]


def test_test_set_has_a_column_beside_its_validation_images_with_the_change(results: list[Result]) -> None:
    fits = _fits(results)
    tests = [_on_test_set(result, "sketch", top1=0.25, classes=4) for result in fits]

    table = make_table([*tests, *results])

    own, test = table.groups()["ncm on digits"][1:]
    assert (own.lines, test.lines) == (
        ("2imgs", "2 images per class"),
        ("2imgs", "2 images per class", "on sketch (4 of 10 classes)"),
    )
    mean = statistics.fmean(result.metrics.top1 for result in fits if result.metrics)
    changes = [table.cells[table.rows[0], column].change for column in (own, test)]
    assert changes == [None, pytest.approx(0.25 - mean)]


def test_two_test_sets_of_one_name_have_different_titles(results: list[Result]) -> None:
    fits = _fits(results)
    tests = [_on_test_set(result, "sketch", top1=0.25, sha256=digit * 64) for digit in "ef" for result in fits]

    _, *others = make_table([*fits, *tests]).groups()["ncm on digits"]

    assert {column.lines[-1] for column in others} == {f"on sketch {column.protocol_id[:8]}" for column in others}


def test_test_set_with_other_draws_has_no_change(results: list[Result]) -> None:
    fits = _fits(results)

    table = make_table([*fits, _on_test_set(fits[0], "sketch", top1=0.25)])

    assert [cell.change for cell in table.cells.values()] == [None, None]


def test_test_set_without_its_validation_images_has_a_table_of_its_own(results: list[Result]) -> None:
    fits = _fits(results)
    limited = [_other_protocol(result, limit=5) for result in fits]

    table = make_table([*limited, *(_on_test_set(result, "sketch", top1=0.25) for result in fits)])

    assert sorted([column.test for column in columns] for columns in table.groups().values()) == [[""], ["sketch"]]
    assert all(cell.change is None for cell in table.cells.values())
