"""`msn-eval verify RUNS`: recomputes every metric from the stored predictions, and every hash."""

import argparse
import json
from collections.abc import Sequence

from msn_eval.errors import StoreError, format_count


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")
    parser.add_argument("--json", action="store_true", help="print counts and faults as JSON on stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print that all records are valid. Raises StoreError with a list of all faults."""
    from msn_eval.results.verification import verify_results

    outcome = verify_results(options.runs)
    if options.json:
        faults = [{"where": str(fault.where), "what": fault.what} for fault in outcome.faults]
        counts = {"records": outcome.records, "images": outcome.images, "leftovers": list(map(str, outcome.leftovers))}
        print(json.dumps({"ok": not faults, **counts, "faults": faults}, indent=1))
    records = format_count(outcome.records, "record")
    if outcome.faults:
        files = len({fault.where for fault in outcome.faults})
        lines = "".join(f"\n{fault.where}: {fault.what}" for fault in outcome.faults)
        raise StoreError(
            f"{format_count(len(outcome.faults), 'fault')} in {files} of {records}{lines}",
            hint="Move these records (and their .npz) away; the same evaluation writes them again.",
        )
    if not options.json:
        print(f"{records}: ids, hashes and metrics follow from {format_count(outcome.images, 'stored prediction')}")
        if outcome.leftovers:
            leftovers = format_count(len(outcome.leftovers), "prediction file")
            print(f"{leftovers} without a record, left by a killed run: {outcome.leftovers[0]} …")
    return 0
