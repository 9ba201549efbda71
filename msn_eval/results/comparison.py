"""Comparison: two checkpoints under the same protocols, image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from msn_eval.errors import ComparisonError
from msn_eval.results.predictions import (
    CheckpointPredictions,
    by_protocol,
    class_names,
    protocol_title,
    read_checkpoint_predictions,
)
from msn_eval.results.record import CheckpointInfo, Result
from msn_eval.results.statistics import (
    POWER,
    Interval,
    Paired,
    accuracy_interval,
    compare_scores,
    draw_spread,
    holm,
    minimal_detectable_difference,
)

Outcome = Literal["better", "worse", "not separable"]
LEVEL = 0.05  # two-sided, over all protocols together


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One checkpoint under one protocol: mean over draws, spread over draws (None for one), interval over test images."""

    accuracy: float
    spread: float | None
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """One class: its test images and both accuracies, fractions."""

    name: str
    images: int
    first: float
    second: float


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One test image whose score differs: the draws in which each checkpoint is right."""

    image: str
    first: int
    second: int


@dataclass(frozen=True, kw_only=True)
class ProtocolComparison:
    """The second checkpoint against the first under one protocol.

    draws:       that both have, all the same labelled images
    p_value:     two-sided, after Holm's correction over the protocols
    detectable:  the smallest difference that would be found with 80 % power at this number of protocols, a fraction
    outcome:     of the second; `words` says it in a sentence
    classes:     those whose accuracy differs, most changed first
    flips:       images that the second has lost, then those that it has gained, in the data set's order
    """

    protocol_id: str
    title: str
    draws: tuple[int, ...]
    first: Measured
    second: Measured
    paired: Paired
    p_value: float
    detectable: float
    outcome: Outcome
    words: str
    classes: tuple[ClassChange, ...]
    flips: tuple[Flip, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints. left_out: protocols that are not compared, and why."""

    first: CheckpointInfo
    second: CheckpointInfo
    protocols: tuple[ProtocolComparison, ...]
    left_out: tuple[tuple[str, str], ...]


def compare(
    first: Sequence[Result], second: Sequence[Result], folders: tuple[Sequence[Path], Sequence[Path]]
) -> Comparison:
    """Compare two checkpoints' results under every protocol that both have.

    first, second: of one checkpoint each, at least one result
    folders:       where the predictions of the first stand, and those of the second
    Raises ComparisonError where there is nothing to compare.
    """
    groups = by_protocol(first), by_protocol(second)
    pairs: list[tuple[CheckpointPredictions, CheckpointPredictions]] = []
    left_out: list[tuple[str, str]] = []
    for key in dict.fromkeys([*groups[0], *groups[1]]):
        title = protocol_title((groups[0].get(key) or groups[1][key])[0])
        try:
            pairs.append(_pair(key, groups, folders))
        except ComparisonError as error:
            left_out.append((f"{title} [{key}]", str(error)))
    if not pairs:
        reasons = "\n".join(f"  {title}: {reason}" for title, reason in left_out)
        raise ComparisonError(
            f"nothing of the two can be compared:\n{reasons}", hint="Evaluate both with the same options."
        )
    compared = [_compare_one(*pair) for pair in pairs]
    adjusted = holm([one.paired.two_sided for one in compared])
    protocols = tuple(
        _worded(one, p_value, *pair, tests=len(pairs))
        for one, p_value, pair in zip(compared, adjusted, pairs, strict=True)
    )
    ordered = tuple(sorted(protocols, key=lambda one: (one.title, one.protocol_id)))
    return Comparison(
        first=first[0].checkpoint, second=second[0].checkpoint, protocols=ordered, left_out=tuple(left_out)
    )


def _pair(
    key: str,
    groups: tuple[dict[str, list[Result]], dict[str, list[Result]]],
    folders: tuple[Sequence[Path], Sequence[Path]],
) -> tuple[CheckpointPredictions, CheckpointPredictions]:
    """Read both sides of one protocol, cut to the draws that both have. Raises ComparisonError."""
    for mine, others, who in ((groups[0], groups[1], "second"), (groups[1], groups[0], "first")):
        if key not in others:
            alone = [one[0].protocol for other, one in others.items() if other not in mine]
            nearest = nearest_protocol(mine[key][0].protocol, alone)
            raise ComparisonError(
                f"the {who} has no result under it" + (f"; nearest: {'; '.join(nearest)}" if nearest else "")
            )
    sides = [read_checkpoint_predictions(group[key], place) for group, place in zip(groups, folders, strict=True)]
    common = [draw for draw in sides[0].draws if draw in sides[1].draws]
    if not common:
        raise ComparisonError(f"no draw in common: {list(sides[0].draws)} and {list(sides[1].draws)}")
    a, b = sides[0].only(common), sides[1].only(common)
    if a.images_sha256 != b.images_sha256:
        raise ComparisonError("the test images or their labels are not the same")
    other = [x.split.draw for x, y in zip(a.results, b.results, strict=True) if x.split.sha256 != y.split.sha256]
    if other:
        raise ComparisonError(f"draws {other} were fitted to other labelled images")
    return a, b


def _compare_one(a: CheckpointPredictions, b: CheckpointPredictions) -> ProtocolComparison:
    draws = len(a.draws)
    return ProtocolComparison(
        protocol_id=a.first.protocol_id,
        title=protocol_title(a.first),
        draws=a.draws,
        first=_measured(a),
        second=_measured(b),
        paired=compare_scores(a.scores, b.scores, draws=draws),
        p_value=1.0,
        detectable=1.0,
        outcome="not separable",
        words="",
        classes=_class_changes(a, b),
        flips=_flips(a, b),
    )


def _measured(answers: CheckpointPredictions) -> Measured:
    return Measured(
        accuracy=float(answers.right.mean()),
        spread=draw_spread([float(draw.mean()) for draw in answers.right]),
        interval=accuracy_interval(answers.scores, draws=len(answers.draws)),
    )


def _worded(
    one: ProtocolComparison, p_value: float, a: CheckpointPredictions, b: CheckpointPredictions, *, tests: int
) -> ProtocolComparison:
    """Add what depends on how many protocols are compared: the p-value, what could be seen, and the sentence."""
    paired = one.paired
    # Two-sided: half of the level on each side.
    detectable = minimal_detectable_difference(b.scores - a.scores, draws=len(one.draws), level=LEVEL / 2 / tests)
    outcome: Outcome = "not separable"
    if p_value <= LEVEL:
        outcome = "better" if paired.difference > 0 else "worse"
    if outcome == "not separable":
        words = (
            f"not separable: a true difference of {100 * detectable:.2f} points or more would be found "
            f"{100 * POWER:g} times in 100"
        )
        if paired.differing == 0:
            words = (
                "right on the same images" if not np.array_equal(a.prediction, b.prediction) else "the same predictions"
            )
    else:
        words = f"the second is {outcome} by {100 * abs(paired.difference):.2f} points"
    doubtful = [name for name, side in (("first", a), ("second", b)) if side.unconverged]
    if doubtful:
        words += f"; doubtful, since the solver did not converge for the {' and the '.join(doubtful)}"
    return replace(one, p_value=p_value, detectable=detectable, outcome=outcome, words=words)


def _class_changes(a: CheckpointPredictions, b: CheckpointPredictions) -> tuple[ClassChange, ...]:
    draws, names = len(a.draws), class_names(a)
    images = np.bincount(a.label)
    sides = [np.bincount(a.label, weights=side.scores).astype(np.int64) for side in (a, b)]
    changes = [
        ClassChange(
            name=name,
            images=int(images[label]),
            first=int(sides[0][label]) / (draws * int(images[label])),
            second=int(sides[1][label]) / (draws * int(images[label])),
        )
        for label, name in names.items()
        if sides[0][label] != sides[1][label]
    ]
    return tuple(sorted(changes, key=lambda one: (-abs(one.second - one.first), one.name)))


def _flips(a: CheckpointPredictions, b: CheckpointPredictions) -> tuple[Flip, ...]:
    differences = b.scores - a.scores
    places = [*np.flatnonzero(differences < 0), *np.flatnonzero(differences > 0)]
    return tuple(
        Flip(
            image=a.image[place].decode("utf-8", "backslashreplace"),
            first=int(a.scores[place]),
            second=int(b.scores[place]),
        )
        for place in places
    )


_HASH_DIGITS, _SHOWN_DIGITS = 64, 12


def protocol_differences(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    """Say field by field wherein two nested mappings differ: `limit: None -> 5`."""
    one, other = dict(_leaves(first)), dict(_leaves(second))
    keys = [*one, *(key for key in other if key not in one)]
    differing = (key for key in keys if key not in one or key not in other or one[key] != other[key])
    return [f"{key}: {_shown(one, key)} -> {_shown(other, key)}" for key in differing]


def nearest_protocol(wanted: Mapping[str, object], others: Sequence[Mapping[str, object]]) -> list[str]:
    """Give the differences of the protocol that has the fewest; none where there is no other."""
    found = [protocol_differences(wanted, other) for other in others]
    fewest = min((len(fields) for fields in found), default=0)
    return next((fields for fields in found if len(fields) == fewest), [])


def _leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))]


def _shown(leaves: Mapping[str, object], key: str) -> str:
    if key not in leaves:
        return "(none)"
    value = leaves[key]
    return value[:_SHOWN_DIGITS] if isinstance(value, str) and len(value) == _HASH_DIGITS else str(value)
