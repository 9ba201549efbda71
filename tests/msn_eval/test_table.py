"""From records to rows, columns and cells."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval.result import Result, list_results, protocol_id
from msn_eval.table import Table, make_table


@pytest.fixture
def results(digits_runs: Path) -> list[Result]:
    return list_results([digits_runs])


def _other_protocol(result: Result, **changes: object) -> Result:
    protocol = {**result.protocol, **changes}
    return replace(result, protocol=protocol, protocol_id=protocol_id(protocol))


def test_a_cell_is_mean_and_sample_deviation_over_draws(results: list[Result]) -> None:
    table = make_table(results)

    for (_, column), cell in table.cells.items():
        scores = [r.metrics.top1 for r in results if r.protocol_id == column.protocol_id and r.metrics]
        assert (cell.mean, cell.std, cell.draws) == (
            pytest.approx(statistics.fmean(scores)),
            pytest.approx(statistics.stdev(scores)),
            3,
        )


def test_one_draw_has_no_deviation(results: list[Result]) -> None:
    (cell,) = make_table(results[:1]).cells.values()

    assert (cell.std, cell.draws) == (None, 1)


def test_every_protocol_has_a_column_of_its_own(results: list[Result]) -> None:
    reduced = [_other_protocol(result, precision="reduced") for result in results]

    table = make_table([*results, *reduced])

    assert len(table.columns) == len({result.protocol_id for result in [*results, *reduced]})


def test_columns_that_look_alike_say_wherein_they_differ(results: list[Result]) -> None:
    result = results[0]

    table = make_table([result, _other_protocol(result, precision="reduced")])

    assert {column.reason for column in table.columns} == {"precision=exact", "precision=reduced"}


def test_a_failed_draw_leaves_no_mean(results: list[Result]) -> None:
    same = [r for r in results if r.protocol_id == results[0].protocol_id]
    failed = replace(same[0], status="failed", metrics=None, error="broken")

    (cell,) = make_table([failed, *same[1:]]).cells.values()

    assert (cell.mean, cell.status) == (None, "failed")


def test_a_draw_that_did_not_converge_marks_its_cell(results: list[Result]) -> None:
    same = [r for r in results if r.protocol_id == results[0].protocol_id]

    (cell,) = make_table([replace(same[0], status="not_converged"), *same[1:]]).cells.values()

    assert cell.status == "not_converged"


def test_two_checkpoints_of_one_name_are_two_rows_told_apart(results: list[Result]) -> None:
    other = replace(results[0], checkpoint=replace(results[0].checkpoint, weights_sha256="f" * 64))

    table = make_table([results[0], other])

    assert sorted(row.name for row in table.rows) == ["pixels [e3b0c442]", "pixels [ffffffff]"]


def test_best_checkpoint_comes_first_and_the_failed_last(results: list[Result]) -> None:
    def named(name: str, top1: float | None) -> Result:
        checkpoint = replace(results[0].checkpoint, name=name, weights_sha256=name)
        metrics = results[0].metrics and replace(results[0].metrics, top1=top1 or 0.0)
        status = "failed" if top1 is None else "ok"
        return replace(results[0], checkpoint=checkpoint, status=status, metrics=metrics if top1 is not None else None)

    table = make_table([named("worse", 0.1), named("broken", None), named("better", 0.9)])

    assert [row.name for row in table.rows] == ["better", "worse", "broken"]


def test_partly_loaded_weights_are_noted_in_the_row(results: list[Result]) -> None:
    partly = replace(results[0], checkpoint=replace(results[0].checkpoint, matched=0.5))

    assert make_table([partly]).rows[0].note == "50.0% of weights loaded"


def test_subsets_stand_in_the_order_of_their_size(results: list[Result]) -> None:
    table: Table = make_table(reversed(results))

    assert [column.subset for column in table.groups()["ncm"]] == ["1img", "2imgs"]


def test_a_result_that_comes_twice_counts_once(results: list[Result]) -> None:
    assert make_table([*results, *results]) == make_table(results)


def test_order_of_the_records_changes_nothing(results: list[Result]) -> None:
    assert make_table(results) == make_table(results[::-1])
