"""The command line of pre-training."""

import argparse
import sys
from collections.abc import Sequence

from msn_eval import __version__
from msn_eval.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `msn-pretrain`. This version evaluates only, and says so with the exit code of a usage error."""
    parser = argparse.ArgumentParser(
        prog="msn-pretrain",
        description="Pre-train MSN and SimSiam. This version cannot train yet; it evaluates: see msn-eval --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"msn-pretrain {__version__}")
    parser.parse_known_args(arguments)
    print("UsageError: this version cannot train yet.\nEvaluate checkpoints with msn-eval.", file=sys.stderr)
    return UsageError.exit_code
