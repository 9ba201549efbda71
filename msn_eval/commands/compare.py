"""`msn-eval compare A B`: two checkpoints under the same protocols, image by image."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from msn_eval.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("first", metavar="A", help="result folder of one checkpoint; with --runs, a checkpoint's name or the "
                        "first digits of its hash")  # fmt: skip
    parser.add_argument("second", metavar="B", help="likewise: what is compared with A")
    parser.add_argument("--runs", metavar="RUNS", action="append", help="result folder that holds both; repeatable")
    parser.add_argument("--markdown", metavar="FILE", help="write a table there as well")
    parser.add_argument("--json", action="store_true", help="all of it as JSON on stdout, and nothing else there")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print how the second differs from the first."""
    from msn_eval.files.atomic import write_atomically
    from msn_eval.reports.comparison import render_comparison_json, render_comparison_markdown, render_comparison_text
    from msn_eval.results.comparison import compare
    from msn_eval.results.folder import list_results
    from msn_eval.results.predictions import results_of_one_checkpoint

    first, second = options.first, options.second
    if options.runs:
        runs = list_results(options.runs)
        where = ", ".join(options.runs)
        sides = [results_of_one_checkpoint(runs, name=name, where=where) for name in (first, second)]
        folders = [list(map(Path, options.runs))] * 2
    else:
        sides = [results_of_one_checkpoint(list_results([one]), name=None, where=one) for one in (first, second)]
        folders = [[Path(first)], [Path(second)]]
    comparison = compare(sides[0], sides[1], (folders[0], folders[1]))
    if options.markdown is not None:
        _check_parent(options.markdown)
        write_atomically(Path(options.markdown), render_comparison_markdown(comparison).encode())
    print(render_comparison_json(comparison) if options.json else render_comparison_text(comparison), end="")
    return 0


def _check_parent(path: str) -> None:
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        raise UsageError(f"--markdown {path}: no file can be written there", hint="Give a file in an existing folder.")
