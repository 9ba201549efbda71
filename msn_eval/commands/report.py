"""`msn-eval report RUNS…`: tables from records."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from msn_eval.errors import UsageError, did_you_mean
from msn_eval.reports import FORMATS, PAGE, SUFFIXES, Format, render
from msn_eval.results.folder import ResultScan, all_faults, no_collections, scan_results
from msn_eval.results.record import Result
from msn_eval.results.table import Table, make_table

_KNOWN = (*FORMATS, PAGE)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")
    parser.add_argument("--format", metavar="A,B", help=f"{', '.join(_KNOWN)}; default a table on the terminal")
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
    formats = _formats(options.format)
    with no_collections():
        return _report(options, formats)


def _report(options: argparse.Namespace, formats: Sequence[str]) -> int:
    from msn_eval.results.leaderboard import make_leaderboard

    scan = scan_results(options.runs)
    if not scan.results:
        raise all_faults(scan.faults)
    board = make_leaderboard(scan, ranked=options.ranks)
    notices = [*board.notices, *_left_out(scan)]
    published = _published(scan) if options.published else None
    table = make_table(scan.results, standings=board.standings, published=published, notices=notices)
    _give(table, [cast(Format, form) for form in formats if form != PAGE], options, also_page=PAGE in formats)
    if PAGE in formats or (not formats and options.out is not None):
        if not options.published and any(map(is_imagenet, scan.results)):  # there on the page, behind a switch
            table = make_table(scan.results, standings=board.standings, published=_published(scan), notices=notices)
        _give_page(table, scan, options)
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
    from msn_eval.results.published import published_file, read_published, table_of_published

    return table_of_published(read_published(published_file()), make_table(scan.results).columns)


def is_imagenet(result: Result) -> bool:
    """Tell whether a record is of ImageNet's classes, so that published numbers may stand on its page."""
    from msn_eval.data.imagenet_subsets import read_publication

    return result.data.class_map_sha256 == read_publication().class_map_sha256


def _give(table: Table, formats: Sequence[Format], options: argparse.Namespace, *, also_page: bool) -> None:
    if not formats and also_page:
        return
    if not formats and options.out is None:
        from msn_eval.reports.terminal import print_table

        print_table(table)
        return
    for form in formats or FORMATS:
        _write(render(table, form), f"table.{SUFFIXES[form]}", options.out)


def _give_page(table: Table, scan: ResultScan, options: argparse.Namespace) -> None:
    from msn_eval.reports.html.leaderboard import render_html

    _write(render_html(table, scan, show_published=options.published), f"table.{PAGE}", options.out)


def _write(text: str, name: str, out: str | None) -> None:
    """Print a report, or write it under its name into the folder asked for."""
    if out is None:
        print(text, end="")
        return
    from msn_eval.files.atomic import prepare_folder, write_atomically

    prepare_folder(Path(out), option="--out")
    write_atomically(Path(out) / name, text.encode())
    print(Path(out) / name)


def _formats(text: str | None) -> tuple[str, ...]:
    wanted = [part.strip() for part in (text or "").split(",") if part.strip()]
    for form in wanted:
        if form not in _KNOWN:
            raise UsageError(
                f"--format {form}: unknown.{did_you_mean(form, _KNOWN)}", hint=f"Known: {', '.join(_KNOWN)}."
            )
    return tuple(dict.fromkeys(wanted))
