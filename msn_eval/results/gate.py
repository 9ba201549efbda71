"""Regression: a checkpoint's results against a baseline -> verdict. It fails closed.

Each protocol of the baseline is compared image by image, and the protocols together with Holm's correction. A verdict is
one of a closed set, and `pass` is the one that has to be earned: equal protocol, data, images, labelled images, metrics
that follow from the predictions, solvers that converged, and a test that would have seen a drop of the margin.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from msn_eval.errors import ComparisonError, UsageError
from msn_eval.results.baseline import Baseline, BaselineProtocol, made_with, predictions_sha256
from msn_eval.results.comparison import nearest_protocol, protocol_differences
from msn_eval.results.predictions import CheckpointPredictions, by_protocol, protocol_title, read_checkpoint_predictions
from msn_eval.results.record import CheckpointInfo, Result
from msn_eval.results.statistics import (
    POWER,
    Integers,
    Paired,
    compare_scores,
    holm,
    minimal_detectable_difference,
    sign_flip_test,
)

Verdict = Literal["regression", "not comparable", "too good", "inconclusive", "pass"]
DEFAULT_MARGIN = 0.01
LEVEL = 0.005  # most chance that any protocol is called a regression where nothing changed: half of the 1 % promised
TOO_GOOD = 0.05
# Of several verdicts the first of these is that of all: a drop that is proven stays so whatever else is unknown.
EXIT_CODES: Mapping[Verdict, int] = {
    "regression": 10,
    "not comparable": 12,
    "too good": 11,
    "inconclusive": 11,
    "pass": 0,
}


@dataclass(frozen=True, kw_only=True)
class ProtocolVerdict:
    """What is to be said of one protocol.

    title:      its name for people
    reason:     why the verdict is what it is
    baseline_accuracy, accuracy: mean over draws, fractions
    paired:     the checkpoint against the baseline, None where they are not comparable; so are the following
    worse, better: p-values after Holm's correction over the protocols
    detectable: the smallest drop that would have been found with 80 % power, a fraction
    notes:      what differs and does not forbid comparing
    """

    protocol_id: str
    title: str
    verdict: Verdict
    reason: str
    baseline_accuracy: float | None = None
    accuracy: float | None = None
    paired: Paired | None = None
    worse: float | None = None
    better: float | None = None
    detectable: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Weight:
    """What the numbers of one protocol come to; the fields are those of ProtocolVerdict."""

    verdict: Verdict
    worse: float
    better: float
    detectable: float


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """The verdict over all protocols, and each of them. margin, level, power: what it was judged by, fractions."""

    verdict: Verdict
    exit_code: int
    margin: float
    level: float
    power: float
    baseline_name: str
    baseline_sha256: str
    checkpoint: CheckpointInfo | None
    protocols: tuple[ProtocolVerdict, ...]


@dataclass(frozen=True)
class _Comparable:
    """A protocol of which there is something to compare."""

    entry: BaselineProtocol
    answers: CheckpointPredictions


def check_margin(margin: float) -> float:
    """Give the margin back. Raises UsageError for one that is no share of the images."""
    if not (math.isfinite(margin) and 0 <= margin < 1):
        raise UsageError(f"--margin {margin:g}: out of range", hint="Give a fraction of 1: 0.01 is one point.")
    return margin


def check_results(
    baseline: Baseline, results: Sequence[Result], folders: Sequence[Path], *, margin: float = DEFAULT_MARGIN
) -> GateReport:
    """Judge the results of one checkpoint.

    results: of one checkpoint; none gives a report without one, in which nothing is comparable
    folders: where their predictions stand
    margin:  the smallest drop that is a regression, a fraction
    """
    check_margin(margin)
    groups = by_protocol(results)
    refused: list[ProtocolVerdict] = []
    comparable: list[_Comparable] = []
    extra = {
        key: group[0] for key, group in groups.items() if key not in {one.protocol_id for one in baseline.protocols}
    }
    for entry in baseline.protocols:
        try:
            if entry.protocol_id not in groups:
                raise ComparisonError(_missing(entry, extra))
            answers = read_checkpoint_predictions(groups[entry.protocol_id], folders)
            _check_comparable(entry, answers)
        except ComparisonError as error:
            refused.append(_refusal(entry.protocol_id, entry.title, str(error)))
            continue
        comparable.append(_Comparable(entry, answers))
    refused += [
        _refusal(key, protocol_title(result), f"no baseline for key {protocol_title(result)} [{key}]")
        for key, result in extra.items()
    ]
    verdicts = [*_judge(comparable, margin), *refused]
    places = {one.protocol_id: place for place, one in enumerate(baseline.protocols)}
    ordered = sorted(verdicts, key=lambda one: (places.get(one.protocol_id, len(places)), one.title, one.protocol_id))
    overall: Verdict = next((one for one in EXIT_CODES if one in {each.verdict for each in ordered}), "not comparable")
    return GateReport(
        verdict=overall,
        exit_code=EXIT_CODES[overall],
        margin=margin,
        level=LEVEL,
        power=POWER,
        baseline_name=str(baseline.checkpoint.get("name")),
        baseline_sha256=baseline.sha256,
        checkpoint=results[0].checkpoint if results else None,
        protocols=tuple(ordered),
    )


def _refusal(protocol_id: str, title: str, reason: str) -> ProtocolVerdict:
    return ProtocolVerdict(protocol_id=protocol_id, title=title, verdict="not comparable", reason=reason)


def _missing(entry: BaselineProtocol, extra: Mapping[str, Result]) -> str:
    """Say that there is no result under a protocol, and wherein the nearest that there is differs, field by field."""
    fields = nearest_protocol(entry.protocol, [one.protocol for one in extra.values()])
    if not fields:
        return "there is no result under this protocol"
    return f"another protocol was measured: {'; '.join(fields)}"


def _check_comparable(entry: BaselineProtocol, answers: CheckpointPredictions) -> None:
    """Raise ComparisonError where results under one protocol are still not of the same images and labels."""
    first = answers.first
    if first.protocol.get("limit") is not None:
        raise ComparisonError(f"scored on a part of the images (--limit {first.protocol['limit']})")
    if len(answers.image) != entry.images:
        raise ComparisonError(f"{len(answers.image):,} test images instead of {entry.images:,}")
    data = entry.protocol.get("data")
    if not isinstance(data, Mapping) or (data.get("sha256"), data.get("class_map_sha256")) != (
        first.data.sha256,
        first.data.class_map_sha256,
    ):
        raise ComparisonError("the record's data set is not that of its protocol")
    if answers.images_sha256 != entry.images_sha256:
        raise ComparisonError("other test images or labels, though as many")
    expected = tuple(one.draw for one in entry.draws)
    if answers.draws != expected:
        raise ComparisonError(f"draws {list(answers.draws)} instead of {list(expected)}")
    for draw, result in zip(entry.draws, answers.results, strict=True):
        if (result.split.sha256, result.split.images) != (draw.split_sha256, draw.labelled_images):
            raise ComparisonError(f"draw {draw.draw} was fitted to other labelled images")


def weigh(differences: Sequence[Integers], draws: Sequence[int], *, margin: float) -> tuple[Weight, ...]:
    """Judge several protocols together by their numbers alone.

    differences: for each protocol (n,) int64, each image's score minus that in the baseline
    draws:       for each protocol
    """
    tests = [sign_flip_test(one) for one in differences]
    worse, better = holm([one.lower for one in tests]), holm([one.upper for one in tests])
    return tuple(
        _weight(one, count, p_worse, p_better, level=LEVEL / len(differences), margin=margin)
        for one, count, p_worse, p_better in zip(differences, draws, worse, better, strict=True)
    )


def _weight(one: Integers, draws: int, worse: float, better: float, *, level: float, margin: float) -> Weight:
    difference = int(one.sum()) / (len(one) * draws)
    detectable = minimal_detectable_difference(one, draws=draws, level=level)
    verdict: Verdict = "inconclusive"
    # Each line that lets a verdict through is true for numbers alone: NaN compares as false.
    if worse <= LEVEL and -difference >= margin:
        verdict = "regression"
    elif better <= LEVEL and difference > TOO_GOOD:
        verdict = "too good"
    elif detectable <= margin and -difference < margin:
        verdict = "pass"
    return Weight(verdict=verdict, worse=worse, better=better, detectable=detectable)


def _judge(comparable: Sequence[_Comparable], margin: float) -> list[ProtocolVerdict]:
    differences = [one.answers.scores - one.entry.scores for one in comparable]
    weights = weigh(differences, [len(one.entry.draws) for one in comparable], margin=margin)
    found = []
    for one, weight in zip(comparable, weights, strict=True):
        verdict, reason = _verdict(one, weight, margin)
        found.append(
            ProtocolVerdict(
                protocol_id=one.entry.protocol_id,
                title=one.entry.title,
                verdict=verdict,
                reason=reason,
                baseline_accuracy=float(one.entry.right.mean()),
                accuracy=float(one.answers.right.mean()),
                paired=compare_scores(one.entry.scores, one.answers.scores, draws=len(one.entry.draws)),
                worse=weight.worse,
                better=weight.better,
                detectable=weight.detectable,
                notes=tuple(protocol_differences(one.entry.made_with, made_with(one.answers.first))),
            )
        )
    return found


def _verdict(one: _Comparable, weight: Weight, margin: float) -> tuple[Verdict, str]:
    """Give one of the closed set of verdicts, and why."""
    points = f"{100 * margin:.2f} points"
    if doubt := _doubt(one):
        return "inconclusive", doubt
    match weight.verdict:
        case "regression":
            return "regression", f"a drop of at least the margin of {points}, and no accident"
        case "too good":
            return (
                "too good",
                f"a gain above {100 * TOO_GOOD:g} points is rarely one: look for leaks and changed labels",
            )
        case "pass":
            return "pass", f"no drop of {points} or more; one would have been found"
        case _ if _same_predictions(one):
            return "pass", "no prediction differs"
        case _:
            return "inconclusive", f"too few images to find a drop of {points}, for so many that differ"


def _doubt(one: _Comparable) -> str:
    if one.answers.unconverged:
        return f"draws {list(one.answers.unconverged)} did not converge"
    for draw, result in zip(one.entry.draws, one.answers.results, strict=True):
        # Records from before it was counted have none; equal hashes of both splits then say that it is the same.
        if result.split.overlap is not None and draw.overlap is not None and result.split.overlap > draw.overlap:
            return (
                f"draw {draw.draw}: {result.split.overlap} test images are also among its labelled images, "
                f"{draw.overlap} in the baseline"
            )
    return ""


def _same_predictions(one: _Comparable) -> bool:
    known = [draw.predictions_sha256 for draw in one.entry.draws]
    same_scores = bool(np.array_equal(one.entry.right, one.answers.right))
    return same_scores and known == [predictions_sha256(draw) for draw in one.answers.prediction]
