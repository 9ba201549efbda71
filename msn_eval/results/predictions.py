"""Answers: what one checkpoint said of every test image under one protocol, draw by draw.

They come from records and the predictions beside them, and only from such as agree with each other: a metric that does not
follow from its predictions, an image twice, draws on different images are refused. Whoever compares trusts them after that.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import ComparisonError, StoreError, UsageError, did_you_mean, printable
from msn_eval.results.record import Predictions, Result, read_predictions
from msn_eval.results.statistics import Integers, count_right, measure

_MOST_TOLD = 4  # settings of a probe in its name
Network = tuple[str, str | None]  # the hash of the weights, and which network of the file


@dataclass(frozen=True, kw_only=True)
class CheckpointPredictions:
    """The draws of one checkpoint under one protocol.

    results:    a record a draw, by rising draw, none failed
    image:      (n,) ids as UTF-8 bytes, unique, in the data set's order
    label:      (n,) int64
    prediction: (draws, n) int64
    """

    results: tuple[Result, ...]
    image: NDArray[np.bytes_]
    label: Integers
    prediction: Integers

    @property
    def first(self) -> Result:
        """Give the record of the first draw: for all that the draws have in common."""
        return self.results[0]

    @property
    def draws(self) -> tuple[int, ...]:
        return tuple(result.split.draw for result in self.results)

    @property
    def unconverged(self) -> tuple[int, ...]:
        """Give the draws whose solver did not reach its certificate."""
        return tuple(result.split.draw for result in self.results if result.status != "ok")

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Tell which image is right in which draw, (draws, n)."""
        return np.asarray(self.prediction == self.label)

    @cached_property
    def scores(self) -> Integers:
        """Give the number of draws in which each image is right, (n,)."""
        return count_right(self.right)

    @cached_property
    def images_sha256(self) -> str:
        """Give the SHA-256 of the lines `id TAB label`, in order."""
        lines = (name + b"\t%d\n" % label for name, label in zip(self.image.tolist(), self.label.tolist(), strict=True))
        return hashlib.sha256(b"".join(lines)).hexdigest()

    def only(self, draws: Iterable[int]) -> "CheckpointPredictions":
        """Give the answers of some of the draws."""
        kept = [place for place, draw in enumerate(self.draws) if draw in set(draws)]
        return CheckpointPredictions(
            results=tuple(self.results[place] for place in kept),
            image=self.image,
            label=self.label,
            prediction=self.prediction[kept],
        )


def protocol_title(result: Result) -> str:
    """Give a protocol's name for people: `knn k=10 T=0.07, 5imgs`; only its id tells it from all others.

    Of a probe with many settings, as fine-tuning has, it gives the start of that id: `finetune #1f0a3c52, 1pct`.
    """
    short = {"temperature": "T", "lambda": "λ"}
    settings = result.probe.params
    taps = [f"taps={settings['taps']}"] if "taps" in settings else []
    params = [f"{short.get(name, name)}={value:g}" for name, value in settings.items() if not isinstance(value, str)]
    if len(params) > _MOST_TOLD:
        params = [*taps, f"#{result.protocol_id[:8]}"]
    if "auto" in result.probe.params:
        params = ["λ=auto"]  # the rule and its grid say less to people than that there is one
    return f"{' '.join([result.probe.name, *params])}, {result.split.subset}"


def results_of_one_checkpoint(results: Sequence[Result], *, name: str | None, where: str) -> list[Result]:
    """Give the results of the only checkpoint, or of the one called `name` (its name, path, or the start of its hash).

    Raises UsageError naming the checkpoints where none or several fit.
    """
    found: defaultdict[Network, list[Result]] = defaultdict(list)
    for result in results:
        found[result.checkpoint.weights_sha256, result.checkpoint.key].append(result)
    fitting = [group for group in found.values() if name is None or _is_called(group, name)]
    if len(fitting) == 1:
        return fitting[0]
    names = {f"{one.checkpoint.name} [{weights[:8]}]": None for (weights, _), (one, *_) in found.items()}
    known = [one.checkpoint.name for one, *_ in found.values()]
    if name is None:
        problem = f"holds results of {len(found)} checkpoints, and one is needed: {', '.join(names)}"
    elif not fitting:
        problem = f"holds no results of a checkpoint {name!r}.{did_you_mean(name, known)} Here are: {', '.join(names)}"
    else:
        problem = f"holds results of {len(fitting)} checkpoints that are called {name!r}: {', '.join(names)}"
    raise UsageError(problem, where=where, hint="Name one by its name or the first digits of its hash.")


def _is_called(group: Sequence[Result], name: str) -> bool:
    facts = [result.checkpoint for result in group]
    by_hash = len(name) >= 8 and facts[0].weights_sha256.startswith(name)
    return by_hash or any(name in (one.name, one.path) for one in facts)


def by_protocol(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Give the results by protocol id, each by rising draw."""
    groups: defaultdict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.split.draw):
        groups[result.protocol_id].append(result)
    return dict(groups)


def read_checkpoint_predictions(results: Sequence[Result], folders: Sequence[Path]) -> CheckpointPredictions:
    """Read the predictions of one checkpoint's draws under one protocol.

    results: at least one, by rising draw
    folders: where the predictions stand
    Raises ComparisonError for what must not be compared with anything.
    """
    draws = [result.split.draw for result in results]
    if len(set(draws)) != len(draws):
        raise ComparisonError(f"a draw stands twice: {draws}")
    found = [_read_draw(result, folders) for result in results]
    for result, predictions in zip(results, found, strict=True):
        same = np.array_equal(predictions.image, found[0].image) and np.array_equal(predictions.label, found[0].label)
        if not same:
            raise ComparisonError(f"draw {result.split.draw} has other test images than draw {draws[0]}")
    return CheckpointPredictions(
        results=tuple(results),
        image=found[0].image,
        label=found[0].label,
        prediction=np.stack([predictions.prediction for predictions in found]),
    )


def _read_draw(result: Result, folders: Sequence[Path]) -> Predictions:
    draw = f"draw {result.split.draw}"
    if result.status == "failed" or result.metrics is None or result.predictions is None:
        raise ComparisonError(f"{draw} FAILED: {result.error or 'no reason is recorded'}")
    numbers = (result.metrics.top1, result.metrics.top5, *result.metrics.top1_ci95)
    if not all(isinstance(one, int | float) and math.isfinite(one) and 0 <= one <= 1 for one in numbers):
        raise ComparisonError(f"{draw}: its metrics are no accuracies: {result.metrics}")
    paths = [folder / Path(result.predictions).name for folder in folders]
    path = next((one for one in paths if one.is_file()), None)
    if path is None:
        raise ComparisonError(f"{draw}: its predictions {result.predictions} are missing")
    try:
        predictions = read_predictions(path)
    except StoreError as error:
        raise ComparisonError(f"{draw}: {error}") from error
    problem = _problem(result, predictions)
    if problem:
        raise ComparisonError(f"{draw}: {problem}")
    return predictions


def _problem(result: Result, predictions: Predictions) -> str:
    """Say wherein a record and its predictions disagree, or give an empty text."""
    n = len(predictions.image)
    columns = (predictions.label, predictions.prediction, predictions.rank_of_label)
    if n == 0 or any(one.shape != (n,) or one.dtype.kind not in "iu" for one in columns):
        return "its predictions are no table of whole numbers"
    if n != result.data.val_images:
        return f"its predictions are of {n:,} images, its record says {result.data.val_images:,}"
    if len(np.unique(predictions.image)) != n:
        return "its predictions name an image twice"
    if not np.array_equal(predictions.rank_of_label == 1, predictions.prediction == predictions.label):
        return "its predictions contradict its ranks"
    if any(int(one.min()) < 0 or int(one.max()) >= result.data.classes for one in columns[:2]):
        return "its predictions name classes that the data set does not have"
    recorded, computed = result.metrics, measure(predictions.rank_of_label)
    if recorded is None or (recorded.top1, recorded.top5, recorded.n) != (computed.top1, computed.top5, computed.n):
        return f"its metrics do not follow from its predictions: {recorded}, computed {computed}"
    return ""


def class_names(answers: CheckpointPredictions) -> dict[int, str]:
    """Give the classes that have test images by index, named by their images' ids (`CLASS/FILE`)."""
    labels, places = np.unique(answers.label, return_index=True)
    names = (os.fsdecode(answers.image[place]).rpartition("/")[0] for place in places)
    return {int(label): printable(name) for label, name in zip(labels, names, strict=True)}
