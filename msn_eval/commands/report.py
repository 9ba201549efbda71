"""`msn-eval report RUNS…`: tables from records."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from msn_eval.errors import UsageError, nearest
from msn_eval.reports import FORMATS, Format, render

TAKES_OVERRIDES = False
SUMMARY = "tables from result folders"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")
    parser.add_argument("--format", metavar="A,B", help=f"{', '.join(FORMATS)}; default a table on the terminal")
    parser.add_argument("--out", metavar="DIR", help="write table.md, table.csv … there instead of to stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the table, or write it in the formats asked for."""
    from msn_eval.result import list_results
    from msn_eval.table import make_table

    formats = _formats(options.format)
    table = make_table(list_results(options.runs))
    if not formats and options.out is None:
        from msn_eval.reports.terminal import print_table

        print_table(table)
        return 0
    if options.out is None:
        for form in formats:
            print(render(table, form), end="")
        return 0
    from msn_eval.atomic_file import prepare_folder, write_atomically

    folder = Path(options.out)
    prepare_folder(folder, option="--out")
    for form in formats or FORMATS:
        write_atomically(folder / f"table.{form}", render(table, form).encode())
        print(folder / f"table.{form}")
    return 0


def _formats(text: str | None) -> tuple[Format, ...]:
    wanted = [part.strip() for part in (text or "").split(",") if part.strip()]
    for form in wanted:
        if form not in FORMATS:
            raise UsageError(
                f"--format {form}: unknown.{nearest(form, FORMATS)}", remedy=f"Known: {', '.join(FORMATS)}."
            )
    return tuple(cast(Format, form) for form in dict.fromkeys(wanted))
