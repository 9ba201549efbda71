"""`msn-eval baseline RUNS --out FILE`: the file that `check` holds checkpoints against."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from msn_eval.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders of one checkpoint")
    parser.add_argument("--out", metavar="FILE", required=True, help="the baseline; commit it")
    parser.add_argument("--name", metavar="NAME", help="the checkpoint, by name or the start of its hash, of several")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write the baseline, and say what is in it."""
    from msn_eval.results.baseline import make_baseline, write_baseline
    from msn_eval.results.folder import list_results
    from msn_eval.results.predictions import results_of_one_checkpoint

    out = Path(options.out)
    if not out.parent.is_dir() or out.is_dir():
        raise UsageError(f"--out {out}: no file can be written there", hint="Give a file in an existing folder.")
    results = results_of_one_checkpoint(list_results(options.runs), name=options.name, where=", ".join(options.runs))
    baseline = make_baseline(results, list(map(Path, options.runs)))
    write_baseline(out, baseline)
    for one in baseline.protocols:
        accuracy = 100 * float(one.right.mean())
        print(f"{one.protocol_id}  {one.title}: {accuracy:.2f} % of {one.images:,} images, {len(one.draws)} draws")
    print(f"{out}: {out.stat().st_size:,} bytes, sha256 {baseline.sha256}")
    return 0
