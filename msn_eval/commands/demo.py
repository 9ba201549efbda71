"""`msn-eval demo`: a whole evaluation on embedded images, without a download."""

import argparse
from collections.abc import Sequence
from pathlib import Path

CHECKPOINTS = ("pixels", "random:demo", "demo")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", metavar="DIR", default="reports/demo", help="records and tables; default reports/demo")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate pixels, the checkpoint that ships, and the same network untrained on the digits; print the table, and write it
    beside the records."""
    from msn_eval.commands.progress import evaluate_with_progress
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.evaluation.plan import make_plan
    from msn_eval.files.atomic import prepare_folder, write_atomically
    from msn_eval.reports import load_format
    from msn_eval.reports.terminal import print_table
    from msn_eval.results.folder import scan_results
    from msn_eval.results.leaderboard import make_leaderboard
    from msn_eval.results.table import make_table

    folder = Path(options.out)
    prepare_folder(folder / "runs", option="--out")
    config = EvaluationConfig(
        checkpoint=list(CHECKPOINTS),
        data="digits",
        probe=["logistic", "knn"],
        device="cpu",
        out=str(folder / "runs"),
    )
    results, code = evaluate_with_progress(make_plan(config))
    table = make_table(results)
    print_table(table)
    scan = scan_results([folder / "runs"])
    board = make_leaderboard(scan)
    page = load_format("html").render(make_table(scan.results, standings=board.standings), scan)
    write_atomically(folder / "table.html", page.encode())
    for name in ("md", "csv", "json", "latex"):
        report_format = load_format(name)
        write_atomically(folder / f"table.{report_format.suffix}", report_format.render(table, scan).encode())
    print(f"Written to {folder}: records in runs/, table.html, table.md, table.csv, table.json, table.tex.")
    return code
