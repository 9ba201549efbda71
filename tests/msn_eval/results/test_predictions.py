"""Records and predictions that do not belong together are refused; checkpoints are found by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_eval.errors import ComparisonError, UsageError
from msn_eval.results.predictions import (
    class_names,
    protocol_title,
    read_checkpoint_predictions,
    results_of_one_checkpoint,
)
from msn_eval.results.record import Predictions, Result, read_predictions, write_result

RunWriter = Callable[..., list[Result]]
_RIGHT = np.array([[True, False, True, True], [False, False, True, True]])


def test_scores_count_the_draws_and_names_come_from_the_ids(write_run: RunWriter, tmp_path: Path) -> None:
    answers = read_checkpoint_predictions(write_run(tmp_path, _RIGHT), [tmp_path])

    assert answers.scores.tolist() == [1, 0, 2, 2]
    assert class_names(answers) == {0: "ant", 1: "bee"}
    assert protocol_title(answers.first) == "knn k=1 T=0.07, 5imgs"


def test_a_title_says_among_which_taps_a_layer_was_chosen(tmp_path: Path, write_run: RunWriter) -> None:
    params = {"lrs": 13, "epochs": 100, "batch_size": 256, "seeds": 3, "seed": 0, "taps": "cls,mean"}
    (result, *_) = write_run(tmp_path, np.ones((1, 4), dtype=np.bool_))

    title = protocol_title(replace(result, probe=replace(result.probe, name="linear", params=params)))

    assert title == f"linear taps=cls,mean #{result.protocol_id[:8]}, 5imgs"


def test_some_draws_can_be_taken_alone(write_run: RunWriter, tmp_path: Path) -> None:
    answers = read_checkpoint_predictions(write_run(tmp_path, _RIGHT), [tmp_path]).only([2])

    assert (answers.draws, answers.scores.tolist()) == ((2,), [0, 0, 1, 1])


_FAULTS: dict[str, tuple[Callable[[Predictions], Predictions], str]] = {
    "ranks": (lambda one: replace(one, rank_of_label=one.rank_of_label + 1), "contradict its ranks"),
    "prediction": (lambda one: replace(one, prediction=one.prediction * 0), "contradict its ranks"),
    "fewer": (
        lambda one: Predictions(**{name: values[:-1] for name, values in vars(one).items()}),
        "are of 3 images, its record says 4",
    ),
    "ragged": (lambda one: replace(one, label=one.label[:-1]), "no table of whole numbers"),
    "floats": (lambda one: replace(one, prediction=one.prediction * 1.0), "no table of whole numbers"),
    "twice": (lambda one: replace(one, image=one.image[[0, 0, 2, 3]]), "name an image twice"),
    "other images": (lambda one: replace(one, image=np.array([b"a/0", b"a/1", b"a/2", b"a/3"])), "other test images"),
    "other labels": (
        lambda one: replace(one, label=2 - one.label, prediction=2 - one.prediction),
        "other test images than draw 1",
    ),
    "no such class": (
        lambda one: replace(one, label=one.label + 9, prediction=one.prediction + 9),
        "classes that the data set does not have",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_predictions_that_do_not_fit_are_refused(write_run: RunWriter, tmp_path: Path, fault: str) -> None:
    spoil, message = _FAULTS[fault]
    results = write_run(tmp_path, _RIGHT)
    read_checkpoint_predictions(results, [tmp_path])
    stored = read_predictions(tmp_path / str(results[1].predictions))
    write_result(tmp_path, results[1], spoil(stored))

    with pytest.raises(ComparisonError, match=message):
        read_checkpoint_predictions(results, [tmp_path])


def test_one_of_several_checkpoints_is_found_by_name_or_hash(write_run: RunWriter, tmp_path: Path) -> None:
    results = [*write_run(tmp_path, _RIGHT, name="old"), *write_run(tmp_path, _RIGHT, name="new", weights="b" * 64)]

    for name in ("new", "bbbbbbbb"):
        found = results_of_one_checkpoint(results, name=name, where="runs")
        assert {result.checkpoint.name for result in found} == {"new"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, r"2 checkpoints, and one is needed: old \[aaaaaaaa\], new \[bbbbbbbb\]"),
        ("odl", "no results of a checkpoint 'odl'. Did you mean old?"),
        ("bbb", "no results of a checkpoint 'bbb'"),
    ],
)
def test_an_open_choice_of_checkpoints_names_them(
    write_run: RunWriter, tmp_path: Path, name: str | None, message: str
) -> None:
    results = [*write_run(tmp_path, _RIGHT, name="old"), *write_run(tmp_path, _RIGHT, name="new", weights="b" * 64)]

    with pytest.raises(UsageError, match=message):
        results_of_one_checkpoint(results, name=name, where="runs")
