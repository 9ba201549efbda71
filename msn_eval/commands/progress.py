"""Evaluation with its progress and its problems on stderr, for every command that measures."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msn_eval.errors import printable

if TYPE_CHECKING:
    from rich.progress import TaskID

    from msn_eval.distributed.group import Group
    from msn_eval.evaluation.evaluate import Evaluation, Preparation, Progress
    from msn_eval.evaluation.plan import Plan

_log = logging.getLogger(__name__)


def evaluate_with_progress(
    plan: "Plan", *, prepared: "dict[str, Preparation] | None" = None, group: "Group | None" = None
) -> "Evaluation":
    """Evaluate every checkpoint of a plan as `evaluate_all` does, and report on stderr."""
    from msn_eval.distributed.group import ALONE
    from msn_eval.evaluation.evaluate import evaluate_all

    with progress_on_stderr() as on_progress:
        return evaluate_all(
            plan,
            prepared=prepared,
            group=group or ALONE,
            on_progress=on_progress,
            on_problem=lambda text: print(printable(text), file=sys.stderr),
        )


@contextlib.contextmanager
def progress_on_stderr() -> Iterator["Progress | None"]:
    """Yield a callback that draws progress on stderr, None if stderr is not a terminal."""
    if not sys.stderr.isatty() or not _log.isEnabledFor(logging.INFO):
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, tuple[TaskID, float]] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(escape(printable(what)), total=total, rate=""), time.monotonic()
            task, started = tasks[what]
            rate = f"{done / (time.monotonic() - started + 1e-9):.0f} images/s" if done < total else ""
            bar.update(task, completed=done, visible=done < total, rate=rate)

        yield show
