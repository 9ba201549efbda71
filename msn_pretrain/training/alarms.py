"""Alarms: what tells that a run goes wrong while its loss looks fine, or has gone wrong altogether."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msn_eval.errors import NumericalError
from msn_eval.features.collapse import COLLAPSED_LINES
from msn_eval.features.collapse import is_collapsed as is_collapsed
from msn_eval.files.atomic import write_atomically

_MOST_BAD_STEPS = 3  # one after the other: single ones happen in half precision and are skipped
_MOST_ROLLBACKS = 3  # in a whole run: one that needs more has another fault than bad luck


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What alarms remember from step to step; part of a snapshot.

    bad_steps:       in a row whose loss or gradient was not finite
    collapsed_lines: of the journal in a row that looked collapsed
    rollbacks:       to an earlier snapshot, so far
    """

    bad_steps: int = 0
    collapsed_lines: int = 0
    rollbacks: int = 0


def after_step(watched: Watched, *, finite: bool) -> Watched:
    """Count a step."""
    return replace(watched, bad_steps=0 if finite else watched.bad_steps + 1)


def after_line(watched: Watched, statistics: Mapping[str, float]) -> Watched:
    """Count a line of the journal by its statistics (collapse.py)."""
    collapsed = is_collapsed(statistics)
    return replace(watched, collapsed_lines=watched.collapsed_lines + 1 if collapsed else 0)


def may_roll_back(watched: Watched) -> bool:
    """Tell whether the alarm that is due is one of numbers that are not finite, and an earlier snapshot is worth a try."""
    return watched.bad_steps >= _MOST_BAD_STEPS and watched.rollbacks < _MOST_ROLLBACKS


def after_rollback(watched: Watched) -> Watched:
    """Count a rollback."""
    return replace(watched, bad_steps=0, rollbacks=watched.rollbacks + 1)


def raised(watched: Watched) -> NumericalError | None:
    """Give the alarm that is due, if one is."""
    if watched.bad_steps >= _MOST_BAD_STEPS:
        return NumericalError(
            f"loss or gradient was not finite in {watched.bad_steps} steps in a row",
            remedy="The images of those steps are listed in alarms/ of the run. Train with a smaller learning rate, or in "
            "run.precision=fp32.",
            kept="No weights were changed by those steps; the last snapshot is kept.",
        )
    if watched.collapsed_lines >= COLLAPSED_LINES:
        return NumericalError(
            f"the representation has collapsed: all images have looked alike in {watched.collapsed_lines} lines in a row",
            remedy="metrics.jsonl has feature_spread, output_spread and feature_rank. Change the recipe; "
            "watch.on_alarm=warn goes on regardless.",
            kept="Snapshots are kept.",
        )
    return None


def dump_batch(run: Path, *, step: int, rank: int, image_ids: Sequence[str], facts: Mapping[str, float]) -> None:
    """Write which images a step saw whose loss or gradient was not finite."""
    folder = run / "alarms"
    folder.mkdir(exist_ok=True)
    content = {
        "step": step,
        "rank": rank,
        "facts": {name: value if math.isfinite(value) else str(value) for name, value in facts.items()},
        "images": list(image_ids),
    }
    write_atomically(folder / f"step-{step:08d}-rank-{rank}.json", (json.dumps(content, indent=1) + "\n").encode())
