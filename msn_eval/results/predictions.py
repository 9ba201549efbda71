"""Predictions of one checkpoint under one protocol, draw by draw, and the checks that they fit their records.

A metric that does not follow from the predictions, a repeated image, or draws on different images are refused here.
Code that compares predictions relies on that.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import ComparisonError, DamagedRecordError, UsageError, did_you_mean, format_count, printable
from msn_eval.results.folder import list_results
from msn_eval.results.record import MEASURE_AGAIN, Predictions, Result, list_metrics_faults, read_predictions
from msn_eval.results.row_names import add_hash, name_networks
from msn_eval.results.statistics import Integers, count_right

_MAX_TITLE_PARAMS = 4
_HASH_PREFIX = 8  # digits that identify a checkpoint
_KINDS = {"image": "S", "label": "i", "prediction": "i", "rank_of_label": "i"}
_ROUNDING = 1e-6  # of float32 probabilities that are combined


@dataclass(frozen=True, kw_only=True)
class ProtocolPredictions:
    """The predictions of one checkpoint under one protocol.

    Attributes:
        results: One record per draw, by rising draw, none failed.
        image: (n,) unique ids as UTF-8 bytes, in the data set's order.
        label: (n,) int64.
        prediction: (draws, n) int64.
    """

    results: tuple[Result, ...]
    image: NDArray[np.bytes_]
    label: Integers
    prediction: Integers

    @property
    def first(self) -> Result:
        """The record of the first draw, for what all draws have in common."""
        return self.results[0]

    @property
    def draws(self) -> tuple[int, ...]:
        """The draws, rising."""
        return tuple(result.split.draw for result in self.results)

    @property
    def unconverged(self) -> tuple[int, ...]:
        """The draws whose solver did not reach its certificate."""
        return tuple(result.split.draw for result in self.results if result.status != "ok")

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Whether each image is right in each draw, (draws, n)."""
        return np.asarray(self.prediction == self.label)

    @cached_property
    def scores(self) -> Integers:
        """The number of draws in which each image is right, (n,)."""
        return count_right(self.right)

    @cached_property
    def images_sha256(self) -> str:
        """The SHA-256 of the lines `id TAB label`, in order."""
        lines = (name + b"\t%d\n" % label for name, label in zip(self.image.tolist(), self.label.tolist(), strict=True))
        return hashlib.sha256(b"".join(lines)).hexdigest()

    def select_draws(self, draws: Iterable[int]) -> "ProtocolPredictions":
        """Return the predictions of some of the draws."""
        rows = [row for row, draw in enumerate(self.draws) if draw in set(draws)]
        return replace(self, results=tuple(self.results[row] for row in rows), prediction=self.prediction[rows])

    def read_class_names(self) -> dict[int, str]:
        """Return the names of the classes that have test images, by class index, from the image ids (`CLASS/FILE`)."""
        return {label: printable(name) for label, name in name_classes(self.image, self.label).items()}


def name_classes(image: NDArray[np.bytes_], label: Integers) -> dict[int, str]:
    """Return for each label the class in the ids of most of its images: an image of several classes has a single label."""
    folders = (name.partition(b"/")[0] for name in image.tolist())
    counts = Counter(zip(label.tolist(), folders, strict=True))
    ascending = sorted(counts, key=lambda pair: (pair[0], counts[pair], pair[1]))
    return {number: os.fsdecode(folder) for number, folder in ascending}


def name_protocol(result: Result) -> str:
    """Return a short name of a protocol for people, such as `knn k=10 T=0.07, 5imgs`. Only the id is unique.

    A probe with many settings, such as fine-tuning, is named by the start of the id: `finetune #1f0a3c52, 1pct`.
    """
    symbols = {"temperature": "T", "lambda": "λ"}
    settings = result.probe.params
    params = [f"{symbols.get(name, name)}={value:g}" for name, value in settings.items() if not isinstance(value, str)]
    if len(params) > _MAX_TITLE_PARAMS:
        params = [f"taps={settings['taps']}"] if "taps" in settings else []
        params.append(f"#{result.protocol_id[:8]}")
    if "auto" in settings:
        params = ["λ=auto"]  # the rule and its grid are too long for a title
    test = f", on {result.data.name}" if result.data.trained_on is not None else ""
    return f"{' '.join([result.probe.name, *params])}, {result.split.subset}{test}"


def read_one_checkpoint(folders: Sequence[Path], *, name: str | None, choice: str) -> list[Result]:
    """Read the results of the only checkpoint, or of the one called `name` (its name, path, or start of its hash).

    Args:
        folders: Result folders.
        name: Of the checkpoint.
        choice: How the user names it, such as `--name NAME`, for the error.

    Raises:
        UsageError: No checkpoint or several fit. The error lists the checkpoints.
        StoreError: Records are unreadable.
    """
    groups: defaultdict[tuple[str, str | None], list[Result]] = defaultdict(list)
    for result in list_results(folders):
        groups[result.checkpoint.weights_sha256, result.checkpoint.key].append(result)
    names = name_networks({network: group[0].checkpoint for network, group in groups.items()})
    matches = [network for network in groups if name is None or is_called(groups[network], name, names[network])]
    if len(matches) == 1:
        return groups[matches[0]]
    shown = {network: add_hash(names[network], groups[network][0].checkpoint) for network in matches or groups}
    listed = ", ".join(dict.fromkeys(shown.values()))
    problem = f"holds results of {len(shown)} checkpoints, and one is needed: {listed}"
    if not matches and name is not None:
        suggestion = did_you_mean(name, names.values())
        problem = f"holds no results of a checkpoint {name!r}.{suggestion} It holds: {listed}"
    hint = f"Choose one by its name or the first digits of its hash: {choice}."
    raise UsageError(problem, where=", ".join(map(str, folders)), hint=hint)


def is_called(results: Sequence[Result], name: str, shown: str) -> bool:
    """Whether a checkpoint has this name, path, or start of its hash, or is shown by this name in tables."""
    has_hash = len(name) >= _HASH_PREFIX and results[0].checkpoint.weights_sha256.startswith(name)
    return (
        has_hash or name == shown or any(name in (result.checkpoint.name, result.checkpoint.path) for result in results)
    )


def group_by_protocol(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Return the results by protocol id, each group by rising draw."""
    groups: defaultdict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.split.draw):
        groups[result.protocol_id].append(result)
    return dict(groups)


def read_draws(results: Sequence[Result], folders: Sequence[Path]) -> ProtocolPredictions:
    """Read the predictions of one checkpoint under one protocol.

    Args:
        results: Records of one checkpoint and protocol, by rising draw, at least one.
        folders: Where the predictions are; the first folder that has those of the record counts.

    Raises:
        ComparisonError: A draw failed or occurs twice, or draws have different test images.
        DamagedRecordError: Predictions are missing, unreadable, or not those of their records.
    """
    draws = [result.split.draw for result in results]
    if len(set(draws)) != len(draws):
        raise ComparisonError(f"a draw occurs twice: {draws}")
    stored = [_read_draw(result, folders) for result in results]
    image, label = stored[0].image, stored[0].label
    for draw, other in zip(draws, stored, strict=True):
        if not (np.array_equal(other.image, image) and np.array_equal(other.label, label)):
            raise ComparisonError(f"draw {draw} has different test images than draw {draws[0]}")
    prediction = np.stack([predictions.prediction for predictions in stored])
    return ProtocolPredictions(results=tuple(results), image=image, label=label, prediction=prediction)


def _read_draw(result: Result, folders: Sequence[Path]) -> Predictions:
    draw = f"draw {result.split.draw}"
    if result.metrics is None or result.predictions is None:
        raise ComparisonError(f"{draw} FAILED: {result.error or 'no reason is recorded'}")
    paths = [folder / Path(result.predictions).name for folder in folders]
    faults = []
    for path in list(filter(Path.is_file, paths)) or paths[:1]:
        try:
            predictions = read_predictions(path, sha256=result.predictions_sha256)
            if not (problems := list_prediction_faults(result, predictions)):
                return predictions
            faults.append(DamagedRecordError(f"{draw}: {problems[0]}", where=str(path), hint=MEASURE_AGAIN))
        except DamagedRecordError as error:
            faults.append(error)
    raise faults[0]


def list_prediction_faults(result: Result, predictions: Predictions) -> list[str]:
    """Return what contradicts the record, or itself, in stored predictions. An empty list means that they are valid."""
    shapes = {name: array.shape for name, array in predictions.arrays.items()}
    if len(set(shapes.values())) > 1 or predictions.label.ndim != 1:
        return [f"predictions: arrays of different lengths, {shapes}"]
    kinds = {name: array.dtype.kind for name, array in predictions.arrays.items()}
    if kinds not in (_KINDS, _KINDS | dict.fromkeys(("confidence", "probability_of_label", "sum_of_squares"), "f")):
        return [f"predictions: arrays of unexpected types, {kinds}"]
    if not len(predictions.label):
        return ["predictions: no images"]
    return list(_list_value_faults(result, predictions))


def _list_value_faults(result: Result, predictions: Predictions) -> Iterator[str]:
    classes = result.data.classes
    for name, values, low, high in (
        ("label", predictions.label, 0, classes - 1),
        ("prediction", predictions.prediction, 0, classes - 1),
        ("rank_of_label", predictions.rank_of_label, 1, classes),
    ):
        outside = (values < low) | (values > high)
        if outside.any():
            image = _show_first_image(predictions, outside)
            yield f"predictions: {name} {values[outside][0]} of {image} is outside {low} to {high}"
    wrong = (predictions.rank_of_label == 1) != (predictions.prediction == predictions.label)
    if wrong.any():
        yield f"predictions: rank and prediction of {_show_first_image(predictions, wrong)} contradict each other"
    yield from _list_probability_faults(predictions, classes)
    if len(np.unique(predictions.image)) != len(predictions.image):
        yield "predictions: an image occurs twice"
    images = len(predictions.label)
    if result.data.val_images != images:
        yield f"data.val_images: recorded {result.data.val_images:,}, stored predictions of {format_count(images, 'image')}"
    yield from list_metrics_faults(result, predictions)


def _list_probability_faults(predictions: Predictions, classes: int) -> Iterator[str]:
    confidence, of_label, squares = (
        predictions.confidence,
        predictions.probability_of_label,
        predictions.sum_of_squares,
    )
    if confidence is None or of_label is None or squares is None:
        return
    # Comparisons with NaN are false, so that it is reported too.
    for name, values, low, high in (
        ("confidence", confidence, 1 / classes - _ROUNDING, 1.0),
        ("probability_of_label", of_label, 0.0, confidence),
        # Probabilities of which none exceeds the confidence.
        ("sum_of_squares", squares, confidence**2 - _ROUNDING, confidence + _ROUNDING),
    ):
        outside = ~((values >= low) & (values <= high))
        if outside.any():
            yield f"predictions: {name} {values[outside][0]} of {_show_first_image(predictions, outside)} is not possible"
    is_largest = of_label >= confidence - _ROUNDING
    wrong = ~is_largest & ((predictions.rank_of_label == 1) | (of_label > 1 - confidence + _ROUNDING))
    if wrong.any():
        yield f"predictions: rank and probability of {_show_first_image(predictions, wrong)} contradict each other"


def _show_first_image(predictions: Predictions, mask: NDArray[np.bool_]) -> str:
    return repr(predictions.image[mask][0].decode("utf-8", "backslashreplace"))
