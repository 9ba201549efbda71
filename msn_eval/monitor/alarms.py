"""Run alarms: what tells that a pre-training goes wrong, in what it wrote down of itself and in its snapshots.

Training itself stops where loss or gradient is not finite, and where all images look alike. Two more collapses leave features
that differ: all images on one prototype, whose loss is near zero, and targets that say nothing, whose loss stays at log k.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from msn_eval.features.collapse import COLLAPSED_LINES, LEAST_RANK, LEAST_SPREAD, is_collapsed
from msn_eval.monitor.snapshot_features import SnapshotFeatures

Line = Mapping[str, float | None]  # of a journal: names and numbers, None for one that is not finite
_BAD_LINES = 3
_NEAR_LOG_K = 0.99  # what predictions that prefer no prototype cost, but for 1 %
_ONE_PROTOTYPE = 0.9  # of log k: the mean prediction is all but one prototype
_SAYING_NOTHING = 0.97  # of log k: an untrained network's sharpened targets have 0.4 to 0.75 of it


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One thing that goes wrong, from a step to a step.

    on: whether it still does where the run stands
    """

    what: str
    first: int
    last: int
    on: bool

    def __str__(self) -> str:
        since = f"since step {self.first:,}" if self.on else f"from step {self.first:,} to {self.last:,}"
        return f"{self.what}, {since}"


@dataclass(frozen=True, kw_only=True)
class _Rule:
    what: str
    lines: int  # in a row
    holds: Callable[[Line], bool]


def find_alarms(
    lines: Sequence[Line], looks: Iterable[SnapshotFeatures], *, prototypes: int | None, first_epochs: float
) -> tuple[Alarm, ...]:
    """Give what went or goes wrong, by the step where it began.

    lines:         of the journal, by step; each has `step`
    prototypes:    k, None where the method has none
    first_epochs:  in which a loss of log k is no alarm: every run begins there
    """
    found = [alarm for rule in _rules(prototypes, first_epochs) for alarm in _spans(lines, rule)]
    found += _seen(sorted(looks, key=lambda look: look.step))
    return tuple(sorted(found, key=lambda alarm: (alarm.first, alarm.what)))


def _rules(prototypes: int | None, first_epochs: float) -> list[_Rule]:
    rules = [
        _Rule(what="loss or gradient is not finite", lines=_BAD_LINES, holds=is_not_finite),
        _Rule(
            what=f"collapse: all images look alike (spread below {LEAST_SPREAD} or rank below {LEAST_RANK})",
            lines=COLLAPSED_LINES,
            holds=is_collapsed,
        ),
    ]
    if prototypes is None or prototypes < 2:
        return rules
    most = math.log(prototypes)
    return [
        *rules,
        _Rule(
            what="collapse: all images are on one prototype",
            lines=COLLAPSED_LINES,
            holds=lambda line: (
                _above(line, "me_max", _ONE_PROTOTYPE * most) or line.get("prototypes_in_use") in (0.0, 1.0)
            ),
        ),
        _Rule(
            what=f"collapse: targets prefer no prototype (entropy near log k = {most:.2f})",
            lines=COLLAPSED_LINES,
            holds=lambda line: _above(line, "target_entropy", _SAYING_NOTHING * most),
        ),
        _Rule(
            what=f"nothing is learnt: cross-entropy at log k = {most:.2f} after epoch {first_epochs:g}",
            lines=COLLAPSED_LINES,
            holds=lambda line: (
                _above(line, "epoch", first_epochs) and _above(line, "cross_entropy", _NEAR_LOG_K * most)
            ),
        ),
    ]


def is_not_finite(line: Line) -> bool:
    """Tell whether a line of a journal has a loss or a gradient that is no number."""
    return any(name in line and line[name] is None for name in ("loss", "gradient_norm", "prototype_gradient_norm"))


def _above(line: Line, name: str, least: float) -> bool:
    value = line.get(name)
    return value is not None and value >= least


def _spans(lines: Sequence[Line], rule: _Rule) -> Iterable[Alarm]:
    """Give every stretch of enough lines for which a rule holds."""
    start = None
    for place, line in enumerate([*lines, {}]):
        if place < len(lines) and rule.holds(line):
            start = place if start is None else start
            continue
        if start is not None and place - start >= rule.lines:
            first, last = (int(lines[one]["step"] or 0) for one in (start, place - 1))
            yield Alarm(what=rule.what, first=first, last=last, on=place == len(lines))
        start = None


def _seen(looks: Sequence[SnapshotFeatures]) -> list[Alarm]:
    """Give the stretches of snapshots whose features are degenerate; one is enough."""
    found: list[Alarm] = []
    before = ""
    for place, look in enumerate(looks):
        on = place == len(looks) - 1
        if look.problem and before:
            found[-1] = Alarm(what=found[-1].what, first=found[-1].first, last=look.step, on=on)
        elif look.problem:
            found.append(Alarm(what=f"a snapshot's features: {look.problem}", first=look.step, last=look.step, on=on))
        before = look.problem
    return found
