"""`msn-eval verify RUNS`: recomputes every metric from the stored predictions, and every hash."""

import argparse
from collections.abc import Sequence

from msn_eval.errors import StoreError

_MAX_SHOWN = 1000  # faults


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print that all records are valid. Raises StoreError with a list of all faults."""
    from msn_eval.results.verification import verify_results

    found = verify_results(options.runs)
    if found.faults:
        files = len({fault.where for fault in found.faults})
        lines = [f"{fault.where}: {fault.what}" for fault in found.faults[:_MAX_SHOWN]]
        more = [f"… and {len(found.faults) - _MAX_SHOWN} more"] if len(found.faults) > _MAX_SHOWN else []
        raise StoreError(
            "\n".join([f"{len(found.faults)} faults in {files} of {found.records} records", *lines, *more]),
            hint="Move these records (and their .npz) away; the same evaluation writes them again.",
        )
    print(f"{found.records} records: ids, hashes and metrics follow from {found.images} stored predictions")
    if found.leftovers:
        print(f"{len(found.leftovers)} prediction files without a record, left by a killed run: {found.leftovers[0]} …")
    return 0
