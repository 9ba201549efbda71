"""Records: what is written reads back, and nothing damaged passes for a result."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_eval import read_results
from msn_eval.errors import StoreError, UsageError
from msn_eval.metrics import measure
from msn_eval.result import (
    Result,
    canonical_json,
    list_results,
    protocol_id,
    read_predictions,
    read_result,
    result_id,
    write_result,
)


@pytest.fixture
def result(digits_runs: Path) -> Result:
    return list_results([digits_runs])[0]


def test_a_written_result_reads_back_equal(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path, result, None)

    assert read_result(tmp_path / f"{result.id}.json") == result


def test_metrics_follow_from_the_stored_predictions(digits_runs: Path) -> None:
    for result in list_results([digits_runs]):
        assert result.predictions is not None
        predictions = read_predictions(digits_runs / result.predictions)
        assert measure(predictions.rank_of_label) == result.metrics


def test_predictions_hold_every_image_in_order_with_consistent_ranks(digits_runs: Path) -> None:
    for result in list_results([digits_runs]):
        assert result.predictions is not None
        stored = read_predictions(digits_runs / result.predictions)
        assert list(stored.image) == sorted(stored.image)
        assert np.array_equal(stored.rank_of_label == 1, stored.prediction == stored.label)


def test_predictions_need_no_pickle(digits_runs: Path) -> None:
    with np.load(next(digits_runs.glob("*.npz")), allow_pickle=False) as stored:
        assert {name: stored[name].dtype.kind for name in stored} == {
            "image": "S",
            "label": "i",
            "prediction": "i",
            "rank_of_label": "i",
        }


def test_a_record_with_nan_cannot_be_written(result: Result, tmp_path: Path) -> None:
    assert result.metrics is not None
    broken = replace(result, metrics=replace(result.metrics, top1=float("nan")))

    with pytest.raises(ValueError, match="Out of range float"):
        write_result(tmp_path, broken, None)

    assert list(tmp_path.iterdir()) == []


def test_a_protocol_that_was_edited_in_the_file_is_refused(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path, result, None)
    path = tmp_path / f"{result.id}.json"
    content = json.loads(path.read_text())
    content["protocol"]["limit"] = 7
    path.write_text(json.dumps(content))

    with pytest.raises(StoreError, match="its protocol is not the one of its protocol_id"):
        read_result(path)


def test_records_from_before_overlap_was_counted_read_as_not_counted(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path, result, None)
    path = tmp_path / f"{result.id}.json"
    content = json.loads(path.read_text())
    assert content["split"].pop("overlap") == 0
    path.write_text(json.dumps(content))

    assert read_result(path).split.overlap is None


def test_a_newer_schema_is_refused(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path, result, None)
    path = tmp_path / f"{result.id}.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))

    with pytest.raises(StoreError, match="schema 2"):
        read_result(path)


@pytest.mark.parametrize("keep", [0, 1, 200])
def test_a_truncated_record_is_refused_by_name(result: Result, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "short.json"
    path.write_text(json.dumps({"schema": 1})[:keep])

    with pytest.raises(StoreError, match=r"short\.json"):
        read_result(path)


def test_a_damaged_prediction_file_is_refused_by_name(digits_runs: Path, tmp_path: Path) -> None:
    whole = next(digits_runs.glob("*.npz")).read_bytes()
    path = tmp_path / "flipped.npz"
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])

    with pytest.raises(StoreError, match=r"flipped\.npz"):
        read_predictions(path)


def test_canonical_json_sorts_keys_and_keeps_the_shortest_float() -> None:
    assert canonical_json({"b": 0.1, "a": [1, None]}) == '{"a":[1,null],"b":0.1}'


def test_an_id_depends_on_weights_key_protocol_and_draw() -> None:
    base = {"weights_sha256": "w", "key": None, "protocol_id": "p", "draw": 1}
    others = [{"weights_sha256": "x"}, {"key": "k"}, {"protocol_id": "q"}, {"draw": 2}]

    ids = {result_id(**{**base, **other}) for other in [{}, *others]}  # type: ignore[arg-type]

    assert len(ids) == 5


def test_protocol_id_has_sixteen_hex_digits() -> None:
    assert int(protocol_id({}), 16) >= 0
    assert len(protocol_id({})) == 16


def test_read_results_gives_one_row_a_record(digits_runs: Path) -> None:
    frame = read_results(digits_runs)

    assert len(frame) == len(list(digits_runs.glob("*.json")))
    assert frame["metrics.top1"].between(0, 1).all()


def test_a_table_left_among_the_records_is_no_record(digits_runs: Path, tmp_path: Path) -> None:
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
