"""Comparison of two checkpoints under the same protocols, image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from msn_eval.errors import ComparisonError, StoreError
from msn_eval.results import statistics
from msn_eval.results.predictions import ProtocolPredictions, group_by_protocol, name_protocol, read_draws
from msn_eval.results.reading import describe_reading, list_reading_differences
from msn_eval.results.record import CheckpointInfo, Result, flatten_fields

Outcome = Literal["better", "worse", "not separable"]
Groups = dict[str, list[Result]]  # results of one checkpoint by protocol id
LEVEL = 0.05  # two-sided, over all protocols together
_HASH_DIGITS, _SHOWN_DIGITS = 64, 12


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One checkpoint under one protocol.

    Attributes:
        accuracy: Mean over draws, a fraction.
        spread: Standard deviation over draws, None for one draw.
        interval: Interval over test images.
    """

    accuracy: float
    spread: float | None
    interval: statistics.Interval


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """One class: its number of test images, and both accuracies as fractions."""

    name: str
    images: int
    first: float
    second: float


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One test image whose score differs, and the number of draws in which each checkpoint is right."""

    image: str
    first: int
    second: int


@dataclass(frozen=True, kw_only=True)
class ProtocolComparison:
    """The second checkpoint compared with the first under one protocol.

    Attributes:
        draws: Draws that both have, with the same labelled images.
        p_value: Two-sided, after Holm's correction over the protocols.
        detectable: Smallest difference that is found with 80 % power at this number of protocols, a fraction.
        outcome: Outcome of the second checkpoint. `words` states it in a sentence.
        classes: Classes whose accuracy differs, most changed first.
        flips: Images that the second has lost, then those that it has gained, in the data set's order.
    """

    protocol_id: str
    title: str
    draws: tuple[int, ...]
    first: Measured
    second: Measured
    paired: statistics.Paired
    p_value: float
    detectable: float
    outcome: Outcome
    words: str
    classes: tuple[ClassChange, ...]
    flips: tuple[Flip, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints under all common protocols. `left_out` lists protocols that are not compared, and why."""

    first: CheckpointInfo
    second: CheckpointInfo
    protocols: tuple[ProtocolComparison, ...]
    left_out: tuple[tuple[str, str], ...]


def compare(
    first: Sequence[Result], second: Sequence[Result], folders: tuple[Sequence[Path], Sequence[Path]]
) -> Comparison:
    """Compare two checkpoints' results under every protocol that both have.

    Args:
        first: Results of one checkpoint, at least one.
        second: Results of another checkpoint, at least one.
        folders: Where the predictions of the first and of the second are.

    Raises:
        ComparisonError: There is nothing to compare.
        StoreError: The same weights were read as two networks, or with two transforms.
    """
    sides = group_by_protocol(first), group_by_protocol(second)
    pairs, left_out = [], []
    for protocol_id, results in (sides[0] | sides[1]).items():
        try:
            pairs.append(_read_pair(protocol_id, sides, folders))
        except ComparisonError as error:
            left_out.append((f"{name_protocol(results[0])} [{protocol_id}]", str(error)))
    _check_readings(first, second)
    if not pairs:
        reasons = "\n".join(f"  {title}: {reason}" for title, reason in left_out)
        raise ComparisonError(f"nothing can be compared:\n{reasons}", hint="Evaluate both with the same options.")
    paired = [statistics.compare_scores(a.scores, b.scores, draws=len(a.draws)) for a, b in pairs]
    p_values = statistics.holm([test.two_sided for test in paired])
    tests = zip(pairs, paired, p_values, strict=True)
    protocols = [_compare_protocol(*pair, test, p_value, tests=len(pairs)) for pair, test, p_value in tests]
    protocols.sort(key=lambda protocol: (protocol.title, protocol.protocol_id))
    a, b = first[0].checkpoint, second[0].checkpoint
    return Comparison(first=a, second=b, protocols=tuple(protocols), left_out=tuple(left_out))


def _read_pair(
    protocol_id: str, sides: tuple[Groups, Groups], folders: tuple[Sequence[Path], Sequence[Path]]
) -> tuple[ProtocolPredictions, ProtocolPredictions]:
    """Read both sides of one protocol, restricted to the draws that both have. Raises ComparisonError."""
    for (own, other), name in ((sides, "second"), (sides[::-1], "first")):
        if protocol_id not in other:
            unmatched = [other[key][0].protocol for key in other if key not in own]
            nearest = "; ".join(find_nearest_protocol(own[protocol_id][0].protocol, unmatched))
            raise ComparisonError(f"the {name} has no result under it" + (f"; nearest: {nearest}" if nearest else ""))
    first, second = (read_draws(side[protocol_id], paths) for side, paths in zip(sides, folders, strict=True))
    common = [draw for draw in first.draws if draw in second.draws]
    if not common:
        raise ComparisonError(f"no draw in common: {list(first.draws)} and {list(second.draws)}")
    first, second = first.select_draws(common), second.select_draws(common)
    if first.images_sha256 != second.images_sha256:
        raise ComparisonError("the test images or their labels differ")
    splits = zip(common, first.results, second.results, strict=True)
    if different := [draw for draw, a, b in splits if a.split.sha256 != b.split.sha256]:
        raise ComparisonError(f"draws {different} were fitted to different labelled images")
    return first, second


def _check_readings(first: Sequence[Result], second: Sequence[Result]) -> None:
    """Raise StoreError where both sides have the same weights, read differently: the difference would not be theirs."""
    by_protocol = {result.protocol_id: result for result in first}
    for result in second:
        other = by_protocol.get(result.protocol_id)
        if other is None or other.checkpoint.weights_sha256 != result.checkpoint.weights_sha256:
            continue
        if differences := list_reading_differences(describe_reading(other), describe_reading(result)):
            what = f"the same weights, read differently: {'; '.join(differences)}"
            where = f"{other.checkpoint.name} and {result.checkpoint.name}"
            raise StoreError(what, where=where, hint="Evaluate one of them again, with the options of the other.")


def _compare_protocol(
    a: ProtocolPredictions, b: ProtocolPredictions, paired: statistics.Paired, p_value: float, *, tests: int
) -> ProtocolComparison:
    # Two-sided: half of the level on each side. The strictest of Holm's tests divides it by their number.
    level = LEVEL / 2 / tests
    detectable = statistics.minimal_detectable_difference(b.scores - a.scores, draws=len(a.draws), level=level)
    outcome: Outcome = "not separable"
    if p_value <= LEVEL:
        outcome = "better" if paired.difference > 0 else "worse"
        words = f"the second is {outcome} by {100 * abs(paired.difference):.2f} points"
    elif paired.differing:
        power = f"would be found {100 * statistics.POWER:g} times in 100"
        words = f"not separable: a true difference of {100 * detectable:.2f} points or more {power}"
    else:
        words = "the same predictions" if np.array_equal(a.prediction, b.prediction) else "right on the same images"
    if doubtful := [name for name, side in (("first", a), ("second", b)) if side.unconverged]:
        words += f"; doubtful, since the solver did not converge for the {' and the '.join(doubtful)}"
    return ProtocolComparison(
        protocol_id=a.first.protocol_id,
        title=name_protocol(a.first),
        draws=a.draws,
        first=_measure(a),
        second=_measure(b),
        paired=paired,
        p_value=p_value,
        detectable=detectable,
        outcome=outcome,
        words=words,
        classes=_list_class_changes(a, b),
        flips=_list_flips(a, b),
    )


def _measure(predictions: ProtocolPredictions) -> Measured:
    return Measured(
        accuracy=float(predictions.right.mean()),
        spread=statistics.draw_spread([float(draw.mean()) for draw in predictions.right]),
        interval=statistics.accuracy_interval(predictions.scores, draws=len(predictions.draws)),
    )


def _list_class_changes(a: ProtocolPredictions, b: ProtocolPredictions) -> tuple[ClassChange, ...]:
    images = np.bincount(a.label)
    first, second = (np.bincount(a.label, weights=side.scores) for side in (a, b))
    changes = []
    for label, name in a.read_class_names().items():
        if first[label] != second[label]:
            before, after = (float(right[label] / (len(a.draws) * images[label])) for right in (first, second))
            changes.append(ClassChange(name=name, images=int(images[label]), first=before, second=after))
    return tuple(sorted(changes, key=lambda change: (-abs(change.second - change.first), change.name)))


def _list_flips(a: ProtocolPredictions, b: ProtocolPredictions) -> tuple[Flip, ...]:
    differences = b.scores - a.scores
    flips = []
    for index in (*np.flatnonzero(differences < 0), *np.flatnonzero(differences > 0)):
        image = a.image[index].decode("utf-8", "backslashreplace")
        flips.append(Flip(image=image, first=int(a.scores[index]), second=int(b.scores[index])))
    return tuple(flips)


def list_protocol_differences(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    """Return the fields in which two nested mappings differ, such as `limit: None -> 5`."""
    a, b = flatten_fields(first), flatten_fields(second)
    differing = [key for key in a | b if key not in a or key not in b or a[key] != b[key]]
    return [f"{key}: {_show_field(a, key)} -> {_show_field(b, key)}" for key in differing]


def find_nearest_protocol(wanted: Mapping[str, object], others: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the differences to the protocol that has the fewest. Empty where there is no other protocol."""
    return min((list_protocol_differences(wanted, other) for other in others), key=len, default=[])


def _show_field(fields: Mapping[str, object], key: str) -> str:
    value = fields.get(key, "(none)")
    return value[:_SHOWN_DIGITS] if isinstance(value, str) and len(value) == _HASH_DIGITS else str(value)
