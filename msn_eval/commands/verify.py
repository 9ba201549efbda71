"""`msn-eval verify RUNS`: recomputes every metric from the stored predictions, and every hash."""

import argparse
from collections.abc import Sequence

from msn_eval.errors import StoreError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print that all records are valid. Raises StoreError with a list of all faults."""
    from msn_eval.results.verification import verify_results

    outcome = verify_results(options.runs)
    if outcome.faults:
        files = len({fault.where for fault in outcome.faults})
        lines = "".join(f"\n{fault.where}: {fault.what}" for fault in outcome.faults)
        raise StoreError(
            f"{len(outcome.faults)} faults in {files} of {outcome.records} records{lines}",
            hint="Move these records (and their .npz) away; the same evaluation writes them again.",
        )
    print(f"{outcome.records} records: ids, hashes and metrics follow from {outcome.images} stored predictions")
    if outcome.leftovers:
        files = len(outcome.leftovers)
        print(f"{files} prediction files without a record, left by a killed run: {outcome.leftovers[0]} …")
    return 0
