"""`msn-eval check --baseline FILE RUNS|--checkpoint X`: the regression gate."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.commands.baseline import check_output_file
from msn_eval.errors import ComparisonError, StoreError, UsageError

if TYPE_CHECKING:
    from msn_eval.results.baseline import Baseline
    from msn_eval.results.record import Result

# Options of an evaluation. They are absent from the namespace unless given, so that their defaults are those of evaluate.
_EVALUATION_OPTIONS = {
    "data": ("X", "the data set of the baseline"),
    "test": ("X", "a test set of the baseline; repeatable"),
    "class_map": ("FILE", "as in an evaluation"),
    "arch": ("NAME", "timm's name, where the file leaves it open"),
    "checkpoint_key": ("K", "which of several networks in the file"),
    "allow_missing": ("PATTERN", "weights that may be absent; repeatable"),
    "allow_class_mismatch": (None, "as in an evaluation"),
    "device": ("D", "auto, cpu, cuda, cuda:N"),
    "batch_size": ("N", "images per batch, or auto"),
    "workers": ("N", "decoding processes, or auto"),
    "compile": (None, "torch.compile the network"),
    "seed": ("N", "of untrained weights; default 0"),
    "out": ("DIR", "folder of its results; default runs"),
    "cache": ("DIR", "cache folder"),
    "no_cache": (None, "neither read nor write the cache"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.epilog = "Exit codes: 0 pass, 10 regression, 11 inconclusive or too good, 12 not comparable or no baseline."
    parser.add_argument("runs", nargs="*", metavar="RUNS", help="result folders of one checkpoint")
    parser.add_argument("--baseline", metavar="FILE", required=True, help="from `msn-eval baseline`")
    parser.add_argument("--name", metavar="NAME", help="which checkpoint, by name or first digits of its hash")
    text = "smallest drop that is a regression, a fraction; default 0.01, one point"
    parser.add_argument("--margin", metavar="F", type=float, help=text)
    parser.add_argument("--junit", metavar="FILE", help="write the verdicts to this file for a build server")
    parser.add_argument("--markdown", metavar="FILE", help="write the verdicts to this file for a pull request")
    parser.add_argument("--json", action="store_true", help="print everything as JSON on stdout, and nothing else")
    text = "evaluate a checkpoint by the baseline's protocols and precision class, then check it"
    group = parser.add_argument_group("instead of RUNS", text)
    group.add_argument("--checkpoint", metavar="X", help="file or scheme (see `ls checkpoints`)")
    for name, (metavar, text) in _EVALUATION_OPTIONS.items():
        if metavar is None:
            group.add_argument(_to_option(name), action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            action = "append" if name in ("allow_missing", "test") else "store"
            group.add_argument(_to_option(name), action=action, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _to_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Judge, write the requested files, and return the verdict's exit code."""
    from msn_eval.reports import gate
    from msn_eval.results.baseline import read_baseline
    from msn_eval.results.gate import DEFAULT_MARGIN, check_results

    check_output_file("--junit", options.junit)
    check_output_file("--markdown", options.markdown)
    # Written first: whatever ends the check, the files of an earlier one must not remain.
    _write_refusal(options, "error", "check did not finish")
    try:
        _check_options(options)
        margin = DEFAULT_MARGIN if options.margin is None else options.margin
        baseline = read_baseline(Path(options.baseline))
        results, folders = _evaluate(options, baseline) if options.checkpoint else _read(options)
        report = check_results(baseline, results, folders, margin=margin)
    except BaseException as error:
        verdict = "not comparable" if isinstance(error, ComparisonError) else "error"
        stopped = "check did not finish: it was stopped"
        _write_refusal(
            options, verdict, stopped if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        )
        raise
    _write(options.junit, gate.render_gate_junit(report))
    _write(options.markdown, gate.render_gate_markdown(report))
    print(gate.render_gate_json(report) if options.json else gate.render_gate_text(report), end="")
    return report.exit_code


def _check_options(options: argparse.Namespace) -> None:
    if bool(options.runs) == bool(options.checkpoint):
        raise UsageError("give result folders or --checkpoint, one of the two", hint="See msn-eval check --help.")
    misplaced = [_to_option(name) for name in _EVALUATION_OPTIONS if hasattr(options, name)] if options.runs else []
    if misplaced:
        raise UsageError(f"{misplaced[0]} needs --checkpoint", hint="Stored results cannot be evaluated again.")
    if options.margin is not None and not 0 <= options.margin < 1:
        raise UsageError(f"--margin {options.margin:g}: not a fraction in [0, 1)", hint="0.01 is one point.")
    if options.checkpoint and options.name is not None:
        raise UsageError("--name needs result folders", hint="Leave it out.")


def _read(options: argparse.Namespace) -> "tuple[list[Result], list[Path]]":
    from msn_eval.results.predictions import read_one_checkpoint

    folders = [Path(folder) for folder in options.runs]
    try:
        return read_one_checkpoint(folders, name=options.name, choice="--name NAME"), folders
    except StoreError as error:
        message = f"these results cannot be read: {error.what}"
        raise ComparisonError(message, where=error.where, hint=error.hint) from error


def _evaluate(options: argparse.Namespace, baseline: "Baseline") -> "tuple[list[Result], list[Path]]":
    """Evaluate the checkpoint by the baseline's protocols."""
    from msn_eval.commands.progress import evaluate_with_progress
    from msn_eval.evaluation.baseline_plan import plan_check

    given = {name: getattr(options, name) for name in _EVALUATION_OPTIONS if hasattr(options, name)}
    plans = plan_check(baseline, options.checkpoint, given)
    results = [result for plan in plans for result in evaluate_with_progress(plan).results]
    return results, [Path(plans[0].config.out)]


def _write_refusal(options: argparse.Namespace, verdict: str, reason: str) -> None:
    """Write where a build server and a pull request look that there is no verdict, and why."""
    from msn_eval.reports import gate

    _write(options.junit, gate.render_refusal_junit(verdict, reason))
    _write(options.markdown, gate.render_refusal_markdown(verdict, reason))


def _write(path: str | None, text: str) -> None:
    from msn_eval.files.atomic import write_atomically

    if path is not None:
        write_atomically(Path(path), text.encode())
