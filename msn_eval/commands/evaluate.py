"""`msn-eval --checkpoint X …`: evaluate checkpoints and print their table."""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import CheckpointError, NumericalError, UsageError, nearest, printable
from msn_eval.images import DECODERS
from msn_eval.request import BAD_IMAGE_RULES, PRECISIONS, PROBE_NAMES, SOLVER_NAMES, TAP_NAMES, Request
from msn_eval.shipped import shipped_folder

if TYPE_CHECKING:
    from rich.progress import TaskID

    from msn_eval.evaluation import Progress
    from msn_eval.plan import Plan
    from msn_eval.result import Result

_log = logging.getLogger(__name__)
TAKES_OVERRIDES = True
SUMMARY = "evaluate checkpoints (no verb needed)"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options. What is not given does not appear, so that configs and defaults show through."""
    parser.argument_default = argparse.SUPPRESS
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--checkpoint", action="append", metavar="X", help="file or scheme; repeatable (see `ls checkpoints`)"
    )
    what.add_argument("--data", metavar="X", help="image folder or `digits`; default $MSN_EVAL_DATA")
    what.add_argument("--subset", type=_names, metavar="A,B", help="1img, 2imgs, 5imgs, 1pct, 10pct, full, each perhaps "
                      "@DRAW; low-shot (default); or a list file")  # fmt: skip
    what.add_argument("--probe", type=_names, metavar="A,B", help=f"{', '.join(PROBE_NAMES)}; default logistic")
    what.add_argument("--tap", metavar="NAME", help=f"{', '.join(TAP_NAMES)}; default the probe's own")
    what.add_argument(
        "--lambda", dest="lambda_", type=_names, metavar="A,B", help="logistic: 0.0025, and 0.075 for 1pct"
    )
    what.add_argument("--k", type=_names, metavar="A,B", help="knn: 10,20,100,200")
    what.add_argument("--temperature", type=_names, metavar="A,B", help="knn: 0.07")
    what.add_argument("--image-pixels", metavar="N", help="instead of the native size; interpolates positions")
    what.add_argument("--decoder", metavar="NAME", help=f"{', '.join(DECODERS)}")
    what.add_argument("--limit", metavar="N", help="at most N validation images a class")
    loading = parser.add_argument_group("how a checkpoint is read")
    loading.add_argument("--arch", metavar="NAME", help="timm's name, where the file leaves it open")
    loading.add_argument("--checkpoint-key", metavar="K", help="which of several networks in the file")
    loading.add_argument("--allow-missing", action="append", metavar="PATTERN", help="weights that may be absent")
    how = parser.add_argument_group("how it is computed")
    how.add_argument("--solver", metavar="NAME", help=f"logistic: {', '.join(SOLVER_NAMES)}")
    how.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:N")
    how.add_argument("--precision", metavar="P", help=f"{', '.join(PRECISIONS)}; default fp32 on CPU, bf16 on CUDA")
    how.add_argument("--batch-size", metavar="N", help="images a batch, or auto")
    how.add_argument("--workers", metavar="N", help="decoding processes, or auto")
    how.add_argument("--seed", metavar="N", help="of untrained weights; default 0")
    how.add_argument("--on-bad-image", metavar="RULE", help=f"{' or '.join(BAD_IMAGE_RULES)}; default error")
    how.add_argument(
        "--allow-class-mismatch", action="store_true", help="number the union of train's and val's classes"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--config", metavar="FILE", help="YAML of these names; `key=value` arguments override it")
    files.add_argument("--out", metavar="DIR", help="results; an earlier run's folder is continued; default runs")
    files.add_argument("--cache", metavar="DIR", help="what can be computed again; default the user's cache folder")
    files.add_argument("--no-cache", action="store_true", help="neither read nor write it")
    files.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    files.add_argument("--json", action="store_true", help="results as a JSON list on stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate; give 0, or the exit code of what failed."""
    request = read_request(options, overrides)
    from msn_eval.plan import make_plan

    if getattr(options, "dry_run", False):
        print(describe_plan(make_plan(request)))
        return 0
    plan = make_plan(request)
    if not options.json_output:
        _log.info("%s", describe_plan(plan))
    results, code = evaluate_all(plan)
    if options.json_output:
        from msn_eval.result import as_json

        print(json.dumps([as_json(result) for result in results], indent=1, allow_nan=False))
    elif results:
        from msn_eval.reports.terminal import print_table
        from msn_eval.table import make_table

        print_table(make_table(results))
    return code


def read_request(options: argparse.Namespace, overrides: Sequence[str]) -> Request:
    """Put together defaults, the config file, the options and the overrides."""
    from msn_eval.config import read_config

    given = {name: value for name, value in vars(options).items() if name in Request.__dataclass_fields__}
    options.json_output = getattr(options, "json", False)
    config = getattr(options, "config", None)
    return read_config(Request, file=_config_file(config) if config else None, given=given, overrides=overrides)


def _config_file(name: str) -> Path:
    """Give the file called `name`, or the shipped config of that bare name."""
    shipped = {path.stem: path for path in (shipped_folder("configs") / "eval").glob("*.yaml")}
    if Path(name).exists():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise UsageError(
        f"no such config file.{nearest(name, shipped)}", where=name, remedy=f"Shipped: {', '.join(sorted(shipped))}."
    )


def evaluate_all(plan: "Plan") -> "tuple[list[Result], int]":
    """Evaluate every checkpoint; one that is refused does not keep the others from being measured."""
    from msn_eval.evaluation import evaluate_checkpoint

    found: dict[str, Result] = {}  # by id: two names for the same weights give the same results
    code = 0
    with progress_on_stderr() as on_progress:
        for name in plan.request.checkpoint:
            try:
                for result in evaluate_checkpoint(plan, name, on_progress=on_progress):
                    found[result.id] = result
                    _log.debug("%s %s@%d: %s", result.probe.name, result.split.subset, result.split.draw, result.status)
            except CheckpointError as error:
                if len(plan.request.checkpoint) == 1:
                    raise
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                code = code or error.exit_code
    results = list(found.values())
    unsound = [result for result in results if result.status != "ok"]
    for text in dict.fromkeys(f"{r.checkpoint.name}: {r.error or 'the solver did not converge'}" for r in unsound):
        print(printable(text), file=sys.stderr)
    return results, code or (NumericalError.exit_code if unsound else 0)


@contextlib.contextmanager
def progress_on_stderr() -> "Iterator[Progress | None]":
    """Give a callback that draws progress on a terminal's stderr, or None where stderr is none."""
    if not sys.stderr.isatty() or not _log.isEnabledFor(logging.INFO):
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(escape(printable(what)), total=total)
            bar.update(tasks[what], completed=done, visible=done < total)

        yield show


def describe_plan(plan: "Plan") -> str:
    """Say what a plan comes to: images to read, passes, bytes, results."""
    from msn_eval.subset import union_of

    pool = union_of(plan.subsets, plan.train)
    sizes = [images.source.stamp(image_id)[0] for images in (pool, plan.val) for image_id in images.ids]
    listed = sum(len(subset) for subset in plan.subsets)
    lines = [
        f"data       {plan.data_name}: {len(plan.val):,} validation images, {len(plan.val.classes)} classes",
        f"labelled   {len(pool):,} images for {len(plan.subsets)} draws ({listed:,} if each draw were read by itself)",
        f"reading    {len(pool) + len(plan.val):,} images, {sum(sizes):,} bytes, one pass a checkpoint",
        f"results    {len(plan.tasks)} for each of {len(plan.request.checkpoint)} checkpoints, into {plan.request.out}",
        f"computing  {plan.precision} on {plan.device}",
    ]
    return printable("\n".join(lines))


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
