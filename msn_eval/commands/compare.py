"""`msn-eval compare A B`: two checkpoints under the same protocols, image by image."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from msn_eval.commands.baseline import check_output_file


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("first", metavar="A", help="result folder of one checkpoint; with --runs, a checkpoint's name or the "
                        "first digits of its hash")  # fmt: skip
    parser.add_argument("second", metavar="B", help="the same for the checkpoint that is compared with A")
    parser.add_argument("--runs", metavar="RUNS", action="append", help="result folder that holds both; repeatable")
    parser.add_argument("--markdown", metavar="FILE", help="write a Markdown table to this file too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON on stdout, and nothing else")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print how the second checkpoint differs from the first."""
    from msn_eval.files.atomic import write_atomically
    from msn_eval.reports.comparison import render_comparison_json, render_comparison_markdown, render_comparison_text
    from msn_eval.results.comparison import compare
    from msn_eval.results.predictions import read_one_checkpoint

    check_output_file("--markdown", options.markdown)
    if options.runs:
        folders = (list(map(Path, options.runs)),) * 2
        names = (options.first, options.second)
    else:
        folders = ([Path(options.first)], [Path(options.second)])
        names = (None, None)
    first, second = (
        read_one_checkpoint(side, name=name, choice="compare --runs RUNS A B")
        for side, name in zip(folders, names, strict=True)
    )
    comparison = compare(first, second, folders)
    if options.markdown is not None:
        write_atomically(Path(options.markdown), render_comparison_markdown(comparison).encode())
    print(render_comparison_json(comparison) if options.json else render_comparison_text(comparison), end="")
    return 0
