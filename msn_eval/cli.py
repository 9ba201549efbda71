"""The command line of `msn-eval`: chooses the verb and parses its options."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile

from msn_eval.checkpoints import find_scheme
from msn_eval.commands import VERBS, load_command
from msn_eval.errors import CheckpointError, UsageError, did_you_mean
from msn_eval.program import VERBOSITY_OPTIONS, ArgumentParser, run_program

_USAGE = "msn-eval --checkpoint X [--checkpoint Y …] --data X [OPTIONS] [key=value …]\n       msn-eval VERB [OPTIONS]"
_EXAMPLES = """examples:
  msn-eval demo
  msn-eval --checkpoint vitb16.pth --data /datasets/imagenet --subset 5imgs
  msn-eval report runs --format html --out tables"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `msn-eval` and return its exit code."""
    kept = "Finished results are kept; run the same command again to continue."
    return run_program("msn-eval", arguments, _parse, loggers=("msn_eval",), kept=kept)


def _build_parser(verb: str) -> ArgumentParser:
    """Return the parser of one of VERBS, with its options."""
    if verb == "evaluate":
        parser = ArgumentParser(
            prog="msn-eval",
            usage=_USAGE,
            description=_describe_program(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    else:
        parser = ArgumentParser(prog=f"msn-eval {verb}", description=VERBS[verb])
    load_command(verb).add_options(parser)
    return parser


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Callable[[], int]]:
    leading = list(takewhile(VERBOSITY_OPTIONS.__contains__, arguments))
    rest = arguments[len(leading) :]
    if rest[:1] == ["help"]:
        rest = _translate_help(rest[1:])
    verb = rest.pop(0) if rest and rest[0] in VERBS else "evaluate"
    takes_overrides = verb == "evaluate"
    options, overrides = _build_parser(verb).parse_with_overrides(
        [*leading, *rest],
        takes_overrides=takes_overrides,
        verbs=VERBS if takes_overrides else (),
        suggest_verb=_suggest_verb,
        suggest=partial(_explain, verb),
    )
    options.words = arguments
    options.verbs, options.build_parser = VERBS, _build_parser  # for completion, which lists the options of all
    return options, lambda: load_command(verb).run(options, overrides)


def _translate_help(words: list[str]) -> list[str]:
    """Return the arguments that print the help of `help VERB`."""
    if words and words[0] not in VERBS:
        raise UsageError(f"no verb {words[0]!r}.{did_you_mean(words[0], VERBS)}", hint="See msn-eval --help.")
    return [*words[:1], "--help"]


def _suggest_verb(verb: str, words: Sequence[str]) -> str:
    """Return the command with a verb at its start, without options that the verb does not have."""
    evaluated, known = _build_parser("evaluate"), _build_parser(verb)
    actions = [*evaluated._actions, *known._actions]
    takes_value = {name for action in actions if action.nargs != 0 for name in action.option_strings}
    kept: list[str] = []
    rest, is_found = list(words), False
    while rest:
        word = rest.pop(0)
        value = [rest.pop(0)] if word in takes_value and rest else []
        if word == verb and not is_found:  # a folder may have the name of a verb
            is_found = True
        elif not word.startswith("-") or word.partition("=")[0] in {*known._option_string_actions, *VERBOSITY_OPTIONS}:
            kept += [word, *value]
    return shlex.join(["msn-eval", verb, *kept])


def _explain(verb: str, argument: str) -> str:
    """Return the hint for an option of other verbs, or for a checkpoint without its option; else an empty string."""
    if argument.startswith("-"):
        parsers = [part for other in VERBS for part in _build_parser(other).list_parsers()]
        having = [parser.prog for parser in parsers if argument in parser._option_string_actions]
        return f"It is an option of {', '.join(having)}." if having else ""
    if verb != "evaluate":
        return ""
    try:
        find_scheme(argument)
    except CheckpointError:
        return ""
    return f"A checkpoint is given as --checkpoint {shlex.quote(argument)}."


def _describe_program() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {summary}" for name, summary in VERBS.items())
    purpose = "How good is a frozen vision checkpoint when labels are scarce?"
    return f"{purpose}\n\nverbs (`msn-eval help VERB` for the options of one):\n{verbs}\n\n{_EXAMPLES}"
