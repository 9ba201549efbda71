"""Regression gate: compares a checkpoint's results with a baseline. It fails closed.

Each protocol of the baseline is compared image by image, and the protocols together with Holm's correction. A verdict is
one of a closed set. `pass` requires evidence: equal protocol, data, images, labelled images, metrics that follow from the
predictions, solvers that converged, and an interval of the difference that excludes a drop of the margin. So a checkpoint that
is worse by the margin passes in at most 2.5 % of cases, and one that is equal is called a regression in at most 0.5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from msn_eval.errors import ComparisonError, DamagedRecordError, format_count
from msn_eval.results import statistics
from msn_eval.results.baseline import Baseline, BaselineProtocol, check_complete, describe_computation, hash_predictions
from msn_eval.results.comparison import find_nearest_protocol, list_protocol_differences
from msn_eval.results.predictions import ProtocolPredictions, group_by_protocol, name_protocol, read_draws
from msn_eval.results.reading import describe_reading, list_reading_differences
from msn_eval.results.record import CheckpointInfo, Result

Verdict = Literal["regression", "not comparable", "too good", "inconclusive", "pass"]
RULES = (
    2  # version of the rules: with those of version 1, a drop just below the margin passed if it would have been found
)
DEFAULT_MARGIN = 0.01
LEVEL = 0.005  # family-wise level of a false regression
TOO_GOOD = 0.05
# Of several verdicts the first of these is the overall one: a significant drop remains, whatever else is unknown.
EXIT_CODES: Mapping[Verdict, int] = {
    "regression": 10,
    "not comparable": 12,
    "too good": 11,
    "inconclusive": 11,
    "pass": 0,
}


@dataclass(frozen=True, kw_only=True)
class ProtocolVerdict:
    """The verdict on one protocol.

    Attributes:
        title: Its name for people.
        reason: Why the verdict is what it is.
        baseline_accuracy: Mean over draws, a fraction.
        accuracy: Mean over draws, a fraction.
        paired: The checkpoint compared with the baseline. This and all numbers are None where they are not comparable.
        worse: P-value of a drop after Holm's correction over the protocols.
        better: P-value of a gain after Holm's correction.
        detectable: Smallest drop that is found to be significant with 80 % power, a fraction.
        notes: Differences that do not prevent a comparison.
    """

    protocol_id: str
    title: str
    verdict: Verdict
    reason: str
    baseline_accuracy: float | None = None
    accuracy: float | None = None
    paired: statistics.Paired | None = None
    worse: float | None = None
    better: float | None = None
    detectable: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NumericVerdict:
    """The verdict on one protocol by its numbers alone. The fields are those of `ProtocolVerdict`."""

    verdict: Verdict
    paired: statistics.Paired
    worse: float
    better: float
    detectable: float


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """The overall verdict and that of each protocol. `margin`, `level` and `power` are fractions."""

    rules: int = RULES
    verdict: Verdict
    exit_code: int
    margin: float
    level: float
    power: float
    baseline_name: str
    baseline_sha256: str
    checkpoint: CheckpointInfo | None
    protocols: tuple[ProtocolVerdict, ...]


def check_results(
    baseline: Baseline, results: Sequence[Result], folders: Sequence[Path], *, margin: float = DEFAULT_MARGIN
) -> GateReport:
    """Judge the results of one checkpoint.

    Args:
        baseline: The baseline to compare with.
        results: Results of one checkpoint. Without any, nothing is comparable.
        folders: Where their predictions are.
        margin: Smallest drop that must not pass, a fraction.
    """
    groups = group_by_protocol(results)
    known = {entry.protocol_id for entry in baseline.protocols}
    extra = [group[0] for key, group in groups.items() if key not in known]
    verdicts: dict[str, ProtocolVerdict] = {}
    comparable: list[tuple[BaselineProtocol, ProtocolPredictions]] = []
    for entry in baseline.protocols:
        try:
            if entry.protocol_id not in groups:
                fields = "; ".join(find_nearest_protocol(entry.protocol, [result.protocol for result in extra]))
                nearest = f"another protocol was measured: {fields}"
                raise ComparisonError(nearest if fields else "there is no result under this protocol")
            predictions = read_draws(groups[entry.protocol_id], folders)
            _check_comparable(entry, predictions)
            _check_reading(baseline.checkpoint, entry, predictions.first)
            comparable.append((entry, predictions))
        except (ComparisonError, DamagedRecordError) as error:
            verdicts[entry.protocol_id] = _refuse(entry.protocol_id, entry.title, str(error))
    verdicts |= {verdict.protocol_id: verdict for verdict in _judge(comparable, margin)}
    titles = sorted((name_protocol(result), result.protocol_id) for result in extra)
    protocols = (
        *(verdicts[entry.protocol_id] for entry in baseline.protocols),
        *(_refuse(key, title, f"no baseline for key {title} [{key}]") for title, key in titles),
    )
    overall = next(name for name in EXIT_CODES if name in {protocol.verdict for protocol in protocols})
    return GateReport(
        verdict=overall,
        exit_code=EXIT_CODES[overall],
        margin=margin,
        level=LEVEL,
        power=statistics.POWER,
        baseline_name=str(baseline.checkpoint.get("name")),
        baseline_sha256=baseline.sha256,
        checkpoint=results[0].checkpoint if results else None,
        protocols=protocols,
    )


def _refuse(protocol_id: str, title: str, reason: str) -> ProtocolVerdict:
    return ProtocolVerdict(protocol_id=protocol_id, title=title, verdict="not comparable", reason=reason)


def _check_comparable(entry: BaselineProtocol, predictions: ProtocolPredictions) -> None:
    """Raise ComparisonError where results under one protocol are not of the same images and labels."""
    check_complete(predictions.first)
    if len(predictions.image) != entry.images:
        raise ComparisonError(f"{format_count(len(predictions.image), 'test image')} instead of {entry.images:,}")
    data = predictions.first.data
    if entry.protocol.get("data") != {"sha256": data.sha256, "class_map_sha256": data.class_map_sha256}:
        raise ComparisonError("the record's data set is not that of its protocol")
    if predictions.images_sha256 != entry.images_sha256:
        raise ComparisonError("different test images or labels, of the same number")
    expected = tuple(draw.draw for draw in entry.draws)
    if predictions.draws != expected:
        raise ComparisonError(f"draws {list(predictions.draws)} instead of {list(expected)}")
    for draw, result in zip(entry.draws, predictions.results, strict=True):
        if (result.split.sha256, result.split.images) != (draw.split_sha256, draw.labelled_images):
            raise ComparisonError(f"draw {draw.draw} was fitted to different labelled images")


def _check_reading(checkpoint: Mapping[str, object], entry: BaselineProtocol, result: Result) -> None:
    """Raise ComparisonError where the baseline's own weights were read as another network, or with another transform."""
    if checkpoint.get("weights_sha256") != result.checkpoint.weights_sha256:
        return
    network = {"architecture": checkpoint.get("arch"), "structure": checkpoint.get("structure_sha256")}
    before = network | {name: entry.made_with.get(name) for name in ("tap", "transform")}
    if differences := list_reading_differences(before, describe_reading(result)):
        raise ComparisonError(f"the baseline's weights were read differently: {'; '.join(differences)}")


def judge_differences(
    differences: Sequence[statistics.Integers], draws: Sequence[int], *, margin: float
) -> tuple[NumericVerdict, ...]:
    """Judge several protocols together by their numbers alone.

    Args:
        differences: Per protocol (n,) int64, each image's score minus that in the baseline.
        draws: Number of draws per protocol.
        margin: Smallest drop that must not pass, a fraction.
    """
    compared = [
        statistics.compare_differences(changes, draws=count) for changes, count in zip(differences, draws, strict=True)
    ]
    worse, better = (statistics.holm([getattr(one, side) for one in compared]) for side in ("worse", "better"))
    verdicts = []
    for changes, paired, p_worse, p_better in zip(differences, compared, worse, better, strict=True):
        # Under Holm the strictest test has the family's level over the number of protocols.
        level = LEVEL / len(differences)
        detectable = statistics.minimal_detectable_difference(changes, draws=paired.draws, level=level)
        verdict: Verdict = "inconclusive"
        # NaN compares as false, so it reaches none of these verdicts.
        if p_worse <= LEVEL and paired.interval.low <= -margin:
            verdict = "regression"
        elif p_better <= LEVEL and paired.difference > TOO_GOOD:
            verdict = "too good"
        elif paired.interval.low > -margin:
            verdict = "pass"
        number = NumericVerdict(verdict=verdict, paired=paired, worse=p_worse, better=p_better, detectable=detectable)
        verdicts.append(number)
    return tuple(verdicts)


def _judge(comparable: Sequence[tuple[BaselineProtocol, ProtocolPredictions]], margin: float) -> list[ProtocolVerdict]:
    differences = [predictions.scores - entry.scores for entry, predictions in comparable]
    numbers = judge_differences(differences, [len(entry.draws) for entry, _ in comparable], margin=margin)
    verdicts = []
    for (entry, predictions), number in zip(comparable, numbers, strict=True):
        verdict, reason = _decide_verdict(entry, predictions, number.verdict, margin)
        verdicts.append(
            ProtocolVerdict(
                protocol_id=entry.protocol_id,
                title=entry.title,
                reason=reason,
                baseline_accuracy=float(entry.right.mean()),
                accuracy=float(predictions.right.mean()),
                notes=tuple(list_protocol_differences(entry.made_with, describe_computation(predictions.first))),
                **vars(number) | {"verdict": verdict},
            )
        )
    return verdicts


def _decide_verdict(
    entry: BaselineProtocol, predictions: ProtocolPredictions, numeric: Verdict, margin: float
) -> tuple[Verdict, str]:
    """Return the verdict on one protocol, and the reason."""
    points = f"{100 * margin:.2f} points"
    if predictions.unconverged:
        return "inconclusive", f"draws {list(predictions.unconverged)} did not converge"
    for draw, result in zip(entry.draws, predictions.results, strict=True):
        # Older records did not count it; equal hashes of both splits then imply the same overlap.
        overlap = result.split.overlap
        if overlap is not None and draw.overlap is not None and overlap > draw.overlap:
            shared = f"{format_count(overlap, 'test image is', 'test images are')} also among its labelled images"
            return "inconclusive", f"draw {draw.draw}: {shared}, {draw.overlap} in the baseline"
    reasons: dict[Verdict, str] = {
        "regression": f"a statistically significant drop, and the 95 % interval reaches {points} or more",
        "too good": f"a gain above {100 * TOO_GOOD:g} points is unusual: look for leaks and changed labels",
        "pass": f"the 95 % interval excludes a drop of {points}",
        "inconclusive": f"a drop of {points} is within the 95 % interval; more test images make it narrower",
    }
    hashes = list(map(hash_predictions, predictions.prediction))
    same_hashes = hashes == [draw.predictions_sha256 for draw in entry.draws]
    if same_hashes and np.array_equal(entry.right, predictions.right):
        return "pass", "no prediction differs"
    return numeric, reasons[numeric]
