"""`msn-eval verify RUNS`: every metric from the stored predictions again, and every hash."""

import argparse
from collections.abc import Sequence

from msn_eval.errors import StoreError

_SHOWN = 1000  # of the faults


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Say that all is as recorded. Raises StoreError with the list of all that is not."""
    from msn_eval.results.verification import verify_results

    found = verify_results(options.runs)
    if found.faults:
        files = len({fault.path for fault in found.faults})
        lines = [f"{fault.path}: {fault.what}" for fault in found.faults[:_SHOWN]]
        more = [f"… and {len(found.faults) - _SHOWN} more"] if len(found.faults) > _SHOWN else []
        raise StoreError(
            "\n".join([f"{len(found.faults)} faults in {files} of {found.records} records", *lines, *more]),
            hint="Move these records away (and their .npz); the same evaluation writes them anew.",
        )
    print(f"{found.records} records: ids, hashes and metrics follow from {found.images} stored predictions")
    if found.leftovers:
        print(f"{len(found.leftovers)} prediction files without a record, left by a killed run: {found.leftovers[0]} …")
    return 0
