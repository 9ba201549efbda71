"""Result folders: every record is read once, and an unreadable record hides no other."""

from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval import read_results
from msn_eval.errors import StoreError, UsageError
from msn_eval.results.folder import list_results, scan_results
from msn_eval.results.record import Result, write_result


@pytest.fixture
def result(digits_runs: Path) -> Result:
    return list_results([digits_runs])[0]


def test_scan_keeps_the_order_and_names_every_broken_record(result: Result, tmp_path: Path) -> None:
    ids = [f"{number:016x}" for number in range(200)]
    for identity in ids:
        write_result(tmp_path, replace(result, id=identity, predictions=f"{identity}.npz"), None)
    for number, keep in ((120, 0), (121, 1), (122, 200), (123, -40)):
        path = tmp_path / f"{ids[number]}.json"
        path.write_text(path.read_text()[:keep])
    (tmp_path / f"{200:016x}.json").mkdir()

    scan = scan_results([tmp_path])

    assert [result.id for result in scan.results] == [path.stem for path in scan.paths] == ids[:120] + ids[124:]
    assert [Path(fault.where).stem for fault in scan.faults] == [*ids[120:124], f"{200:016x}"]
    with pytest.raises(StoreError, match="5 records cannot be used") as refusal:
        list_results([tmp_path])
    assert all(identity in str(refusal.value) for identity in ids[120:124])


def test_renamed_record_is_refused(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path, result, None)
    (tmp_path / f"{result.id}.json").rename(tmp_path / "0123456789abcdef.json")

    with pytest.raises(StoreError, match=f"holds the record of {result.id}: it was renamed or edited"):
        list_results([tmp_path])


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


def test_one_id_of_weights_that_were_read_differently_is_refused(result: Result, tmp_path: Path) -> None:
    for name, mean in (("a", (0.1, 0.2, 0.3)), ("b", (0.5, 0.5, 0.5))):
        (tmp_path / name).mkdir()
        transform = replace(result.features.transform, mean=mean)
        write_result(tmp_path / name, replace(result, features=replace(result.features, transform=transform)), None)

    with pytest.raises(StoreError, match=r"read differently: transform.mean: \[0.1, 0.2, 0.3\] -> \[0.5, 0.5, 0.5\]"):
        list_results([tmp_path / "a", tmp_path / "b"])


def test_an_empty_folder_of_results_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results here"):
        list_results([tmp_path])
