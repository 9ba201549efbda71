"""`msn-eval report RUNS…`: tables from records."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from msn_eval.errors import UsageError, did_you_mean, format_count
from msn_eval.program import split_list
from msn_eval.reports import list_formats, load_format
from msn_eval.results.folder import ResultScan, combine_faults, disabled_garbage_collection, scan_results
from msn_eval.results.record import Result
from msn_eval.results.row_names import name_networks
from msn_eval.results.table import MEASURES, get_cell_key, make_table, sort_rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")
    parser.add_argument("--format", metavar="A,B", help=f"{', '.join(list_formats())}; default a table on the terminal")
    parser.add_argument("--out", metavar="DIR", help="write table.md, table.csv … there instead of to stdout")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME", help="only this row; repeatable")
    parser.add_argument("--probe", metavar="A,B", default="", help="only results of these probes")
    parser.add_argument("--subset", metavar="A,B", default="", help="only results on these subsets")
    parser.add_argument(
        "--sort",
        metavar="KEY",
        default="",
        help="name, or a probe, a subset or PROBE,SUBSET: best first in its columns",
    )
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
    names = split_list(options.format or "")
    if not names and options.out is not None:
        names = list(list_formats())
    formats = [load_format(name) for name in dict.fromkeys(names)]
    from msn_eval.config.yaml_config import check_choice

    measures = split_list(options.columns)
    for name in measures:
        check_choice("--columns", name, tuple(MEASURES))
    with disabled_garbage_collection():
        scan = _select_results(scan_results(options.runs), options)
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
        if options.sort:
            table = sort_rows(table, split_list(options.sort))
        if not formats:
            from msn_eval.reports.terminal import print_table

            print_table(table)
        for report_format in formats:
            _write(report_format.render(table, scan), f"table.{report_format.suffix}", options.out)
    if scan.faults:
        raise combine_faults(scan.faults)
    return 0


def _select_results(scan: ResultScan, options: argparse.Namespace) -> ResultScan:
    """Return the results that `--checkpoint`, `--probe` and `--subset` name; all where these are not given.

    Raises:
        UsageError: The folders hold none of that name.
    """
    from msn_eval.results.predictions import is_called

    everything = (*scan.results, *scan.damaged)
    networks = {get_cell_key(result)[:2]: result for result in everything}
    names = name_networks({network: result.checkpoint for network, result in networks.items()})
    wanted: set[tuple[str, str | None]] = set()
    for name in options.checkpoint:
        found = {network for network, result in networks.items() if is_called([result], name, names[network])}
        if not found:
            raise _no_result("--checkpoint", name, names.values())
        wanted |= found
    known = {
        "probe": {result.probe.name for result in everything},
        "subset": {result.split.subset for result in everything},
    }
    chosen = {option: split_list(getattr(options, option)) for option in known}
    for option, values in chosen.items():
        for value in values:
            if value not in known[option]:
                raise _no_result(f"--{option}", value, known[option])

    def is_wanted(result: Result) -> bool:
        return (
            (not wanted or get_cell_key(result)[:2] in wanted)
            and (not chosen["probe"] or result.probe.name in chosen["probe"])
            and (not chosen["subset"] or result.split.subset in chosen["subset"])
        )

    kept = [pair for pair in zip(scan.results, scan.paths, strict=True) if is_wanted(pair[0])]
    damaged = tuple(filter(is_wanted, scan.damaged))
    if not kept and not damaged and everything:
        raise UsageError(
            "no result has this checkpoint, probe and subset together", hint="Leave out one of the options."
        )
    results, paths = zip(*kept, strict=True) if kept else ((), ())
    return replace(scan, results=results, paths=paths, damaged=damaged)


def _no_result(option: str, value: str, known: Iterable[str]) -> UsageError:
    listed = sorted(set(known))
    what = f"{option} {value}: the folders hold no such result.{did_you_mean(value, listed)}"
    return UsageError(what, hint=f"They hold: {', '.join(listed)}.")


def _describe_unreadable(scan: ResultScan) -> list[str]:
    if not scan.faults:
        return []
    names = ", ".join(Path(fault.where).name for fault in scan.faults[:3])
    more = ", …" if len(scan.faults) > 3 else ""
    one = "record that cannot be read or is not as it was written"
    records = format_count(len(scan.faults), one, "records that cannot be read or are not as they were written")
    return [f"Not used: {records} ({names}{more})."]


def _write(text: str, name: str, folder: str | None) -> None:
    """Print a report, or write it into the folder and print its path."""
    if folder is None:
        print(text, end="")
        return
    from msn_eval.files.atomic import prepare_folder, write_atomically

    prepare_folder(Path(folder), option="--out")
    write_atomically(Path(folder) / name, text.encode())
    print(Path(folder) / name)
