"""Alarms: signs that a pre-training goes wrong, in its journal and in its snapshots.

Training itself stops if loss or gradient is not finite, or if all images look alike. Two more kinds of collapse keep features
different: all images on one prototype, with a loss near zero; and targets without information, with a loss of log k.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from msn_eval.features.collapse import COLLAPSED_LINES, LEAST_RANK, LEAST_SPREAD, is_collapsed
from msn_eval.monitor.snapshot_features import SnapshotFeatures

JournalLine = Mapping[str, float | None]  # numbers by name, None for one that is not finite
_NOT_FINITE_LINES = 3
_NO_LEARNING = 0.99  # of log k, the cross-entropy of predictions that prefer no prototype
_ONE_PROTOTYPE = 0.9  # of log k: the mean prediction is almost one prototype
_UNIFORM_TARGETS = 0.97  # of log k: sharpened targets of an untrained network have 0.4 to 0.75 of it


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One problem, from a step to a step.

    Attributes:
        what: The problem.
        first: Step at which it began.
        last: Last step with it.
        is_active: Whether the newest line or snapshot has it.
    """

    what: str
    first: int
    last: int
    is_active: bool

    def __str__(self) -> str:
        since = f"since step {self.first:,}" if self.is_active else f"from step {self.first:,} to {self.last:,}"
        return f"{self.what}, {since}"


_Rule = tuple[str, int, Callable[[JournalLine], bool]]  # problem, consecutive lines, and whether a line has the problem


def find_alarms(
    lines: Sequence[JournalLine],
    snapshots: Iterable[SnapshotFeatures],
    *,
    prototypes: int | None,
    first_epochs: float,
) -> tuple[Alarm, ...]:
    """Return past and present alarms, by the step at which they began.

    Args:
        lines: Of the journal, by step; each has `step`.
        snapshots: Features of snapshots.
        prototypes: k, None if the method has none.
        first_epochs: Epochs in which a loss of log k is not an alarm: every run begins there.
    """
    alarms = [alarm for rule in _make_rules(prototypes, first_epochs) for alarm in _apply_rule(lines, rule)]
    alarms += _find_degenerate(sorted(snapshots, key=lambda snapshot: snapshot.step))
    return tuple(sorted(alarms, key=lambda alarm: (alarm.first, alarm.what)))


def _make_rules(prototypes: int | None, first_epochs: float) -> Iterator[_Rule]:
    look_alike = f"collapse: all images look alike (spread below {LEAST_SPREAD} or rank below {LEAST_RANK})"
    yield "loss or gradient is not finite", _NOT_FINITE_LINES, is_not_finite
    yield look_alike, COLLAPSED_LINES, is_collapsed
    if prototypes is None or prototypes < 2:
        return
    log_k = math.log(prototypes)

    def has_one_prototype(line: JournalLine) -> bool:
        return _reaches(line, "me_max", _ONE_PROTOTYPE * log_k) or line.get("prototypes_in_use") in (0.0, 1.0)

    def has_uniform_targets(line: JournalLine) -> bool:
        return _reaches(line, "target_entropy", _UNIFORM_TARGETS * log_k)

    def has_learnt_nothing(line: JournalLine) -> bool:
        return _reaches(line, "epoch", first_epochs) and _reaches(line, "cross_entropy", _NO_LEARNING * log_k)

    at_log_k = f"log k = {log_k:.2f}"
    yield "collapse: all images are on one prototype", COLLAPSED_LINES, has_one_prototype
    yield f"collapse: targets prefer no prototype (entropy near {at_log_k})", COLLAPSED_LINES, has_uniform_targets
    yield f"no learning: cross-entropy at {at_log_k} after epoch {first_epochs:g}", COLLAPSED_LINES, has_learnt_nothing


def is_not_finite(line: JournalLine) -> bool:
    """Whether a line of a journal has a loss or a gradient that is not finite."""
    return any(name in line and line[name] is None for name in ("loss", "gradient_norm", "prototype_gradient_norm"))


def _reaches(line: JournalLine, name: str, least: float) -> bool:
    value = line.get(name)
    return value is not None and value >= least


def _apply_rule(lines: Sequence[JournalLine], rule: _Rule) -> Iterator[Alarm]:
    what, least, has_problem = rule
    for applies, group in groupby(lines, key=has_problem):
        matches = list(group)
        if applies and len(matches) >= least:
            first, last = (int(line["step"] or 0) for line in (matches[0], matches[-1]))
            yield Alarm(what=what, first=first, last=last, is_active=matches[-1] is lines[-1])


def _find_degenerate(snapshots: Sequence[SnapshotFeatures]) -> Iterator[Alarm]:
    """Return an alarm per sequence of snapshots with degenerate features; one snapshot is enough."""
    for is_degenerate, group in groupby(snapshots, key=lambda snapshot: bool(snapshot.problem)):
        matches = list(group)
        if is_degenerate:
            what, is_active = f"features of a snapshot: {matches[0].problem}", matches[-1] is snapshots[-1]
            yield Alarm(what=what, first=matches[0].step, last=matches[-1].step, is_active=is_active)
