"""Predictions that contradict their records are refused; checkpoints are found by name."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_eval.errors import ComparisonError, DamagedRecordError, UsageError
from msn_eval.results.predictions import list_prediction_faults, name_protocol, read_draws, read_one_checkpoint
from msn_eval.results.record import Predictions, Result, read_predictions, write_result

RunWriter = Callable[..., list[Result]]
_RIGHT = np.array([[True, False, True, True], [False, False, True, True]])


def test_scores_count_draws_and_class_names_come_from_the_ids(write_run: RunWriter, tmp_path: Path) -> None:
    predictions = read_draws(write_run(tmp_path, _RIGHT), [tmp_path])

    assert predictions.scores.tolist() == [1, 0, 2, 2]
    assert predictions.read_class_names() == {0: "ant", 1: "bee"}
    assert name_protocol(predictions.first) == "knn k=1 T=0.07, 5imgs"


def test_title_lists_the_taps_that_a_layer_was_chosen_from(tmp_path: Path, write_run: RunWriter) -> None:
    params = {"lrs": 13, "epochs": 100, "batch_size": 256, "seeds": 3, "seed": 0, "taps": "cls,mean"}
    (result, *_) = write_run(tmp_path, np.ones((1, 4), dtype=np.bool_))

    title = name_protocol(replace(result, probe=replace(result.probe, name="linear", params=params)))

    assert title == f"linear taps=cls,mean #{result.protocol_id[:8]}, 5imgs"


_FAULTS: dict[str, tuple[Callable[[Predictions], Predictions], str]] = {
    "prediction": (lambda one: replace(one, prediction=one.prediction * 0), "contradict each other"),
    "fewer": (
        lambda one: Predictions(**{name: values[:-1] for name, values in one.arrays.items()}),
        "recorded 4, stored predictions of 3 images",
    ),
    "other images": (
        lambda one: replace(one, image=np.array([b"a/0", b"a/1", b"a/2", b"a/3"])),
        "different test images",
    ),
    "other labels": (
        lambda one: replace(one, label=2 - one.label, prediction=2 - one.prediction),
        "different test images than draw 1",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_invalid_predictions_are_refused(write_run: RunWriter, tmp_path: Path, fault: str) -> None:
    spoil, message = _FAULTS[fault]
    results = write_run(tmp_path, _RIGHT)
    read_draws(results, [tmp_path])
    stored = read_predictions(tmp_path / str(results[1].predictions))
    results[1] = write_result(tmp_path, results[1], spoil(stored))

    with pytest.raises((ComparisonError, DamagedRecordError), match=message):
        read_draws(results, [tmp_path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": [0.9, 0.6, 0.2, 0.5]}, "confidence 0.2.* is not possible"),
        ({"confidence": [1.1, 0.6, 0.8, 0.5]}, "confidence 1.1.* is not possible"),
        ({"probability_of_label": [0.9, 0.3, 0.8, 0.6]}, "probability_of_label 0.6.* is not possible"),
        ({"probability_of_label": [0.9, -0.1, 0.8, 0.5]}, "probability_of_label -0.1.* is not possible"),
        ({"sum_of_squares": [0.82, np.nan, 0.66, 0.38]}, "sum_of_squares nan.* is not possible"),
        ({"sum_of_squares": [0.5, 0.46, 0.66, 0.38]}, "sum_of_squares 0.5.* is not possible"),
        ({"probability_of_label": [0.8, 0.3, 0.8, 0.5]}, "rank and probability of .* contradict each other"),
        ({"probability_of_label": [0.9, 0.5, 0.8, 0.5]}, "rank and probability of .* contradict each other"),
        ({"sum_of_squares": None}, "arrays of unexpected types"),
    ],
)
def test_probabilities_that_cannot_be_are_refused(
    write_run: RunWriter, tmp_path: Path, change: dict[str, list[float] | None], message: str
) -> None:
    (result,) = write_run(tmp_path, np.array([[True, False, True, True]]))
    stored = read_predictions(tmp_path / str(result.predictions))
    arrays = {
        "confidence": [0.9, 0.6, 0.8, 0.5],
        "probability_of_label": [0.9, 0.3, 0.8, 0.5],
        "sum_of_squares": [0.82, 0.46, 0.66, 0.38],
    }

    def faults(values: dict[str, list[float] | None]) -> list[str]:
        made = {name: None if row is None else np.array(row, dtype=np.float32) for name, row in values.items()}
        predictions = replace(stored, **made)  # type: ignore[arg-type]
        return list_prediction_faults(replace(result, metrics=predictions.metrics), predictions)

    assert faults(arrays) == []
    assert re.search(message, faults(arrays | change)[0])


@pytest.mark.parametrize("damage", ["missing", "replaced"])
def test_predictions_that_are_not_those_of_the_record_are_damage(
    write_run: RunWriter, tmp_path: Path, damage: str
) -> None:
    results = write_run(tmp_path, _RIGHT)
    path = tmp_path / str(results[1].predictions)
    if damage == "missing":
        path.unlink()
    else:  # by predictions with the same metrics
        stored = read_predictions(path)
        np.savez_compressed(path, **replace(stored, prediction=np.where(_RIGHT[1], stored.label, 2)).arrays)

    with pytest.raises(DamagedRecordError, match=path.name):
        read_draws(results, [tmp_path])


def test_predictions_are_read_from_the_folder_that_has_those_of_the_record(
    write_run: RunWriter, tmp_path: Path
) -> None:
    results = write_run(tmp_path / "own", _RIGHT)
    write_run(tmp_path / "other", _RIGHT, wrong_class=2)

    predictions = read_draws(results, [tmp_path / "other", tmp_path / "own"])

    assert predictions.prediction.tolist() == read_draws(results, [tmp_path / "own"]).prediction.tolist()


def test_checkpoint_is_found_by_name_or_hash(write_run: RunWriter, tmp_path: Path) -> None:
    write_run(tmp_path, _RIGHT, name="old")
    write_run(tmp_path, _RIGHT, name="new", weights="b" * 64)

    for name in ("new", "bbbbbbbb"):
        results = read_one_checkpoint([tmp_path], name=name, choice="--name NAME")
        assert {result.checkpoint.name for result in results} == {"new"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            None,
            r"2 checkpoints, and one is needed: old \[aaaaaaaa\], new \[bbbbbbbb\]\n"
            "Choose one by its name or the first digits of its hash: --name NAME",
        ),
        ("odl", "no results of a checkpoint 'odl'. Did you mean old?"),
        ("bbb", "no results of a checkpoint 'bbb'"),
    ],
)
def test_ambiguous_checkpoint_error_lists_the_candidates(
    write_run: RunWriter, tmp_path: Path, name: str | None, message: str
) -> None:
    write_run(tmp_path, _RIGHT, name="old")
    write_run(tmp_path, _RIGHT, name="new", weights="b" * 64)

    with pytest.raises(UsageError, match=message):
        read_one_checkpoint([tmp_path], name=name, choice="--name NAME")
