"""The command line of `msn-eval`: chooses the verb and parses its options."""

import argparse
from collections.abc import Callable, Sequence

from msn_eval.commands import VERBS, load_command
from msn_eval.program import ArgumentParser, run_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `msn-eval` and return its exit code."""
    kept = "Finished results are kept; run the same command again to continue."
    return run_program("msn-eval", arguments, _parse, loggers=("msn_eval",), kept=kept)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Callable[[], int]]:
    verb, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in VERBS else ("evaluate", arguments)
    if verb == "evaluate":
        others = (f"{name} ({summary})" for name, summary in VERBS.items() if name != verb)
        parser = ArgumentParser(
            prog="msn-eval",
            description="How good is a frozen vision checkpoint when labels are scarce?",
            epilog=f"verbs: {'; '.join(others)}",
        )
    else:
        parser = ArgumentParser(prog=f"msn-eval {verb}", description=VERBS[verb])
    command = load_command(verb)
    command.add_options(parser)
    options, overrides = parser.parse_with_overrides(rest, takes_overrides=verb == "evaluate", verbs=VERBS)
    options.words = arguments
    return options, lambda: command.run(options, overrides)
