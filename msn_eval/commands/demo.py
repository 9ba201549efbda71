"""`msn-eval demo`: a complete evaluation on embedded images, without a download."""

import argparse
from collections.abc import Sequence
from pathlib import Path

CHECKPOINTS = ("pixels", "random:demo", "demo")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", metavar="DIR", default="reports/demo", help="records and tables; default reports/demo")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate pixels, the demo checkpoint and the same network untrained on the digits; print and write the table."""
    from msn_eval.commands.progress import evaluate_with_progress
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.evaluation.plan import make_plan
    from msn_eval.files.atomic import prepare_folder, write_atomically
    from msn_eval.reports import load_format
    from msn_eval.reports.terminal import print_table
    from msn_eval.results.folder import combine_faults, scan_results
    from msn_eval.results.leaderboard import make_leaderboard
    from msn_eval.results.table import make_table

    folder = Path(options.out)
    runs = folder / "runs"
    prepare_folder(runs, option="--out")
    config = EvaluationConfig(
        checkpoint=list(CHECKPOINTS), data="digits", probe=["logistic", "knn"], device="cpu", out=str(runs)
    )
    results, code, refused = evaluate_with_progress(make_plan(config))
    table = make_table(results, refused=refused)
    print_table(table)
    scan = scan_results([runs])
    if scan.faults:  # of earlier runs; those of this one were measured again
        raise combine_faults(scan.faults)
    ranked = make_table(scan.results, standings=make_leaderboard(scan).standings)
    for name in ("html", "md", "csv", "json", "latex"):
        report_format = load_format(name)
        text = report_format.render(ranked if name == "html" else table, scan)
        write_atomically(folder / f"table.{report_format.suffix}", text.encode())
    print(f"Written to {folder}: records in runs/, table.html, table.md, table.csv, table.json, table.tex.")
    return code
