"""`msn-eval report RUNS…`: tables from records."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from msn_eval.errors import UsageError, nearest
from msn_eval.reports import FORMATS, SUFFIXES, Format, render
from msn_eval.result import ResultScan, all_faults, scan_results
from msn_eval.table import Table, make_table

TAKES_OVERRIDES = False
SUMMARY = "tables from result folders"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")
    parser.add_argument("--format", metavar="A,B", help=f"{', '.join(FORMATS)}; default a table on the terminal")
    parser.add_argument("--out", metavar="DIR", help="write table.md, table.csv … there instead of to stdout")
    parser.add_argument("--published", action="store_true", help="add published ImageNet numbers, with their sources")
    parser.add_argument(
        "--ranks",
        action=argparse.BooleanOptionalAction,
        help="ranks, and intervals over several draws, from the stored predictions; default where that takes seconds",
    )


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the table, or write it in the formats asked for.

    A record that cannot be read is left out, told of in the table, and told on stderr with the exit code of a damaged store.
    """
    from msn_eval.leaderboard import make_leaderboard

    formats = _formats(options.format)
    scan = scan_results(options.runs)
    if not scan.results:
        raise all_faults(scan.faults)
    board = make_leaderboard(scan, ranked=options.ranks)
    table = make_table(
        scan.results,
        standings=board.standings,
        published=_published(scan) if options.published else None,
        notices=[*board.notices, *_left_out(scan)],
    )
    _give(table, formats, options.out)
    faults = (*scan.faults, *board.faults)
    if faults:
        raise all_faults(faults)
    return 0


def _left_out(scan: ResultScan) -> list[str]:
    if not scan.faults:
        return []
    names = ", ".join(Path(fault.where).name for fault in scan.faults[:3])
    more = ", …" if len(scan.faults) > 3 else ""
    return [f"Left out, because they cannot be read: {len(scan.faults)} records ({names}{more})."]


def _published(scan: ResultScan) -> Table:
    from msn_eval.published import published_file, read_published, table_of_published

    return table_of_published(read_published(published_file()), make_table(scan.results).columns)


def _give(table: Table, formats: Sequence[Format], out: str | None) -> None:
    if not formats and out is None:
        from msn_eval.reports.terminal import print_table

        print_table(table)
        return
    if out is None:
        for form in formats:
            print(render(table, form), end="")
        return
    from msn_eval.atomic_file import prepare_folder, write_atomically

    folder = Path(out)
    prepare_folder(folder, option="--out")
    for form in formats or FORMATS:
        path = folder / f"table.{SUFFIXES[form]}"
        write_atomically(path, render(table, form).encode())
        print(path)


def _formats(text: str | None) -> tuple[Format, ...]:
    wanted = [part.strip() for part in (text or "").split(",") if part.strip()]
    for form in wanted:
        if form not in FORMATS:
            raise UsageError(
                f"--format {form}: unknown.{nearest(form, FORMATS)}", remedy=f"Known: {', '.join(FORMATS)}."
            )
    return tuple(cast(Format, form) for form in dict.fromkeys(wanted))
