"""`msn-eval baseline RUNS --out FILE`: writes the file that `check` compares checkpoints with."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from msn_eval.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="result folders of one checkpoint")
    parser.add_argument("--out", metavar="FILE", required=True, help="the baseline file; commit it")
    parser.add_argument("--name", metavar="NAME", help="which checkpoint, by name or first digits of its hash")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write the baseline, and print its content."""
    from msn_eval.files.atomic import write_atomically
    from msn_eval.results.baseline import make_baseline, render_baseline
    from msn_eval.results.predictions import read_one_checkpoint

    check_output_file("--out", options.out)
    out, folders = Path(options.out), [Path(folder) for folder in options.runs]
    results = read_one_checkpoint(folders, name=options.name, choice="--name NAME")
    baseline = make_baseline(results, folders)
    write_atomically(out, render_baseline(baseline).encode())
    for protocol in baseline.protocols:
        accuracy = f"{100 * float(protocol.right.mean()):.2f} % of {protocol.images:,} images"
        draws = f"{len(protocol.draws)} draw{'s' if len(protocol.draws) > 1 else ''}"
        print(f"{protocol.protocol_id}  {protocol.title}: {accuracy}, {draws}")
    print(f"{out}: {out.stat().st_size:,} bytes, sha256 {baseline.sha256}")
    return 0


def check_output_file(option: str, path: str | None) -> None:
    """Raise UsageError for a file that cannot be written, before anything is computed."""
    if path is not None and not _can_write(Path(path)):
        raise UsageError(f"{option} {path}: no file can be written there", hint="Give a file in an existing folder.")


def _can_write(file: Path) -> bool:
    """Whether there is a regular file, or a folder to write one into. Writing would replace a pipe or a device."""
    try:
        return file.is_file() or (file.parent.is_dir() and not os.path.lexists(file))
    except OSError:  # such as a name that is too long
        return False
