"""`msn-eval report RUNS…`: tables from records."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from msn_eval.reports import list_formats, load_format
from msn_eval.results.folder import ResultScan, combine_faults, disabled_garbage_collection, scan_results
from msn_eval.results.table import MEASURES, make_table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")
    parser.add_argument("--format", metavar="A,B", help=f"{', '.join(list_formats())}; default a table on the terminal")
    parser.add_argument("--out", metavar="DIR", help="write table.md, table.csv … there instead of to stdout")
    parser.add_argument("--published", action="store_true", help="add published ImageNet numbers, with their sources")
    parser.add_argument("--columns", metavar="A,B", default="", help=f"beside accuracy: {', '.join(MEASURES)}")
    parser.add_argument(
        "--ranks",
        action=argparse.BooleanOptionalAction,
        help="ranks, and intervals over several draws, from the stored predictions; default where that takes seconds",
    )


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the table, or write it in the requested formats.

    A record that must not be used is left out, or shown as DAMAGED. The table and stderr name it, and the exit code is that
    of a damaged store.
    """
    names = [name.strip() for name in (options.format or "").split(",") if name.strip()]
    if not names and options.out is not None:
        names = list(list_formats())
    formats = [load_format(name) for name in dict.fromkeys(names)]
    from msn_eval.config.yaml_config import check_choice

    measures = [name.strip() for name in options.columns.split(",") if name.strip()]
    for name in measures:
        check_choice("--columns", name, tuple(MEASURES))
    with disabled_garbage_collection():
        scan = scan_results(options.runs)
        results = (*scan.results, *scan.damaged)
        if not results:
            raise combine_faults(scan.faults)
        from msn_eval.results.leaderboard import make_leaderboard
        from msn_eval.results.published import make_published_table, read_published

        board, published = make_leaderboard(scan, ranked=options.ranks), None
        if options.published:
            published = make_published_table(read_published(), make_table(results).columns)
        notices = [*board.notices, *_describe_unreadable(scan)]
        table = make_table(
            results,
            standings=board.standings,
            published=published,
            notices=notices,
            measures=measures,
            averages=board.averages,
        )
        if not formats:
            from msn_eval.reports.terminal import print_table

            print_table(table)
        for report_format in formats:
            _write(report_format.render(table, scan), f"table.{report_format.suffix}", options.out)
    if scan.faults:
        raise combine_faults(scan.faults)
    return 0


def _describe_unreadable(scan: ResultScan) -> list[str]:
    if not scan.faults:
        return []
    names = ", ".join(Path(fault.where).name for fault in scan.faults[:3])
    more = ", …" if len(scan.faults) > 3 else ""
    records = "1 record that" if len(scan.faults) == 1 else f"{len(scan.faults)} records that"
    return [f"Not used: {records} cannot be read or is not as it was written ({names}{more})."]


def _write(text: str, name: str, folder: str | None) -> None:
    """Print a report, or write it into the folder and print its path."""
    if folder is None:
        print(text, end="")
        return
    from msn_eval.files.atomic import prepare_folder, write_atomically

    prepare_folder(Path(folder), option="--out")
    write_atomically(Path(folder) / name, text.encode())
    print(Path(folder) / name)
