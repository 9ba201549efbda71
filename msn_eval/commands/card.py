"""`msn-eval card RUNS --checkpoint X --out FILE`: a model card for Hugging Face."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from msn_eval.commands.baseline import check_output_file
from msn_eval.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")
    text = "which checkpoint: its name, its path, or the first digits of its hash; not needed for a single one"
    parser.add_argument("--checkpoint", metavar="X", help=text)
    parser.add_argument("--out", metavar="FILE", required=True, help="the card, such as README.md")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write the card. A damaged record is refused, and nothing is written."""
    from msn_eval.files.atomic import write_atomically
    from msn_eval.reports.model_card import MARK, render_model_card
    from msn_eval.results.predictions import read_one_checkpoint

    check_output_file("--out", options.out)
    out = Path(options.out)
    if out.is_file() and MARK.encode() not in out.read_bytes():
        hint = "Give another file, and copy its metadata and table into this one."
        raise UsageError(f"--out {options.out}: a file that is not by this command", hint=hint)
    folders = [Path(folder) for folder in options.runs]
    results = read_one_checkpoint(folders, name=options.checkpoint, choice="--checkpoint X")
    write_atomically(out, render_model_card(results).encode())
    print(out)
    return 0
