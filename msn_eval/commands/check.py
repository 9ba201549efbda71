"""`msn-eval check --baseline FILE RUNS|--checkpoint X`: the regression gate."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import ComparisonError, StoreError, UsageError

if TYPE_CHECKING:
    from msn_eval.results.baseline import Baseline
    from msn_eval.results.gate import GateReport
    from msn_eval.results.record import Result

_OF_AN_EVALUATION = (
    "data", "arch", "checkpoint_key", "allow_missing", "allow_class_mismatch", "device", "batch_size", "workers",
    "compile", "seed", "out", "cache", "no_cache",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = "Exit codes: 0 pass, 10 regression, 11 inconclusive or too good, 12 not comparable or no baseline."
    parser.add_argument("runs", nargs="*", metavar="RUNS", help="result folders of one checkpoint")
    parser.add_argument("--baseline", metavar="FILE", required=True, help="from `msn-eval baseline`")
    parser.add_argument("--name", metavar="NAME", help="the checkpoint, by name or the start of its hash, of several")
    parser.add_argument("--margin", metavar="F", help="smallest drop that is a regression; default 0.01, one point")
    parser.add_argument("--junit", metavar="FILE", help="write the verdicts there for a build server")
    parser.add_argument("--markdown", metavar="FILE", help="write them there for a pull request")
    parser.add_argument("--json", action="store_true", help="all of it as JSON on stdout, and nothing else there")
    own = parser.add_argument_group(
        "instead of RUNS", "evaluate a checkpoint by the baseline's protocols and precision class, then check it"
    )
    hidden = argparse.SUPPRESS
    own.add_argument("--checkpoint", metavar="X", help="file or scheme (see `ls checkpoints`)")
    own.add_argument("--data", metavar="X", default=hidden, help="the data set of the baseline")
    own.add_argument("--arch", metavar="NAME", default=hidden, help="timm's name, where the file leaves it open")
    own.add_argument("--checkpoint-key", metavar="K", default=hidden, help="which of several networks in the file")
    own.add_argument("--allow-missing", action="append", metavar="PATTERN", default=hidden, help="may be absent")
    own.add_argument("--allow-class-mismatch", action="store_true", default=hidden, help="as in an evaluation")
    own.add_argument("--device", metavar="D", default=hidden, help="auto, cpu, cuda, cuda:N")
    own.add_argument("--batch-size", metavar="N", default=hidden, help="images a batch, or auto")
    own.add_argument("--workers", metavar="N", default=hidden, help="decoding processes, or auto")
    own.add_argument("--compile", action="store_true", default=hidden, help="torch.compile the network")
    own.add_argument("--seed", metavar="N", default=hidden, help="of untrained weights; default 0")
    own.add_argument("--out", metavar="DIR", default=hidden, help="its results; default runs")
    own.add_argument("--cache", metavar="DIR", default=hidden, help="what can be computed again")
    own.add_argument("--no-cache", action="store_true", default=hidden, help="neither read nor write it")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Judge, write what was asked for, and give the verdict's exit code."""
    from msn_eval.reports.gate import render_gate_json, render_gate_text
    from msn_eval.results.baseline import read_baseline
    from msn_eval.results.gate import DEFAULT_MARGIN, check_results

    margin = DEFAULT_MARGIN if options.margin is None else _margin(options.margin)
    _check_options(options)
    try:
        baseline = read_baseline(Path(options.baseline))
        results, folders = _measured(options, baseline) if options.checkpoint else _stored(options)
        report = check_results(baseline, results, folders, margin=margin)
    except ComparisonError as error:
        _write_refusal(options, error)
        raise
    _write(options, report)
    print(render_gate_json(report) if options.json else render_gate_text(report), end="")
    return report.exit_code


def _margin(text: str) -> float:
    from msn_eval.results.gate import check_margin

    try:
        return check_margin(float(text))
    except ValueError as error:
        raise UsageError(f"--margin {text}: not a number", hint="Give a fraction of 1: 0.01 is one point.") from error


def _check_options(options: argparse.Namespace) -> None:
    if bool(options.runs) == bool(options.checkpoint):
        raise UsageError("give result folders or --checkpoint, one of the two", hint="See msn-eval check --help.")
    if options.runs:
        for name in _OF_AN_EVALUATION:
            if hasattr(options, name):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} belongs to --checkpoint; results are as they are", hint=f"Leave out {option}."
                )
    elif options.name is not None:
        raise UsageError("--name belongs to result folders", hint="Leave it out.")
    for option in ("junit", "markdown"):
        path = getattr(options, option)
        if path is not None and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            raise UsageError(
                f"--{option} {path}: no file can be written there", hint="Give a file in a folder that exists."
            )


def _stored(options: argparse.Namespace) -> "tuple[list[Result], list[Path]]":
    from msn_eval.results.folder import list_results
    from msn_eval.results.predictions import results_of_one_checkpoint

    try:
        results = list_results(options.runs)
    except StoreError as error:
        raise ComparisonError(
            f"these results cannot be read: {error.what}", where=error.where, hint=error.hint
        ) from error
    where = ", ".join(options.runs)
    return results_of_one_checkpoint(results, name=options.name, where=where), list(map(Path, options.runs))


def _measured(options: argparse.Namespace, baseline: "Baseline") -> "tuple[list[Result], list[Path]]":
    """Evaluate the checkpoint by the baseline's protocols."""
    from msn_eval.commands.progress import evaluate_with_progress
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.config.yaml_config import read_config
    from msn_eval.evaluation.baseline_plan import make_baseline_plans
    from msn_eval.evaluation.plan import DATA_VARIABLE

    given = {name: getattr(options, name) for name in _OF_AN_EVALUATION if hasattr(options, name)}
    if "data" not in given and not os.environ.get(DATA_VARIABLE):
        if baseline.data != "digits":  # all others have a place that only the user knows
            raise UsageError(
                "no data set given", hint=f"Pass --data or set ${DATA_VARIABLE}: the baseline's is {baseline.data}."
            )
        given["data"] = baseline.data
    request = read_config(EvaluationConfig, given=given | {"checkpoint": [options.checkpoint]})
    plans = make_baseline_plans(baseline, request)
    results = [result for plan in plans for result in evaluate_with_progress(plan)[0]]
    return results, [Path(request.out)]


def _write(options: argparse.Namespace, report: "GateReport") -> None:
    from msn_eval.files.atomic import write_atomically
    from msn_eval.reports.gate import render_gate_junit, render_gate_markdown

    for path, render in ((options.junit, render_gate_junit), (options.markdown, render_gate_markdown)):
        if path is not None:
            write_atomically(Path(path), render(report).encode())


def _write_refusal(options: argparse.Namespace, error: ComparisonError) -> None:
    """Leave the reason where a build server and a pull request look for it."""
    from msn_eval.files.atomic import write_atomically
    from msn_eval.reports.gate import render_refusal_junit, render_refusal_markdown

    for path, render in ((options.junit, render_refusal_junit), (options.markdown, render_refusal_markdown)):
        if path is not None:
            write_atomically(Path(path), render(str(error)).encode())
