"""Result folders: every record is read once, and an unreadable record hides no other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval import read_results
from msn_eval.errors import StoreError, UsageError
from msn_eval.results.folder import list_results, scan_results
from msn_eval.results.record import Result, read_result, write_result


@pytest.fixture
def result(digits_runs: Path) -> Result:
    return list_results([digits_runs])[0]


def test_scan_keeps_the_order_and_reports_the_broken_record(result: Result, tmp_path: Path) -> None:
    for number in range(200):
        write_result(tmp_path, replace(result, id=f"{number:016x}"), None)
    broken = tmp_path / f"{123:016x}.json"
    broken.write_text(broken.read_text()[:-40])

    scan = scan_results([tmp_path])

    assert [path.stem for path in scan.paths] == [f"{number:016x}" for number in range(200) if number != 123]
    assert [result.id for result in scan.results] == [path.stem for path in scan.paths]
    assert [fault.where for fault in scan.faults] == [str(broken)]


def test_list_results_names_every_broken_record(result: Result, tmp_path: Path) -> None:
    for number in range(5):
        write_result(tmp_path, replace(result, id=f"{number:016x}"), None)
    for number in (1, 3):
        (tmp_path / f"{number:016x}.json").write_text("")

    with pytest.raises(StoreError, match="2 records cannot be used") as refusal:
        list_results([tmp_path])

    assert all(f"{number:016x}.json" in str(refusal.value) for number in (1, 3))


def test_renamed_record_is_refused(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path, result, None)
    (tmp_path / f"{result.id}.json").rename(tmp_path / "0123456789abcdef.json")

    with pytest.raises(StoreError, match=f"holds the record of {result.id}: it was renamed or edited"):
        list_results([tmp_path])


def test_folder_named_like_a_record_is_reported(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path, result, None)
    (tmp_path / f"{2:016x}.json").mkdir()

    scan = scan_results([tmp_path])

    assert [Path(fault.where).stem for fault in scan.faults] == [f"{2:016x}"]


@pytest.mark.parametrize("keep", [0, 1, 200])
def test_truncated_record_is_named(result: Result, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "short.json"
    path.write_text(json.dumps({"schema": 1})[:keep])

    with pytest.raises(StoreError, match=r"short\.json"):
        read_result(path)


def test_read_results_returns_one_row_per_record(digits_runs: Path) -> None:
    frame = read_results(digits_runs)

    assert len(frame) == len(list(digits_runs.glob("*.json")))
    assert frame["metrics.top1"].between(0, 1).all()


def test_table_among_the_records_is_ignored(digits_runs: Path, tmp_path: Path) -> None:
    for path in [*digits_runs.glob("*.json")][:2]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "table.json").write_text("{}")

    assert len(list_results([tmp_path])) == 2


def test_one_id_measured_with_different_labelled_images_is_refused(result: Result, tmp_path: Path) -> None:
    for name, digest in (("a", "0" * 64), ("b", "1" * 64)):
        (tmp_path / name).mkdir()
        write_result(tmp_path / name, replace(result, split=replace(result.split, sha256=digest)), None)

    with pytest.raises(StoreError, match="different labelled images"):
        list_results([tmp_path / "a", tmp_path / "b"])


def test_an_empty_folder_of_results_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results here"):
        list_results([tmp_path])
