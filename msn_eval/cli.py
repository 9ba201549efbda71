"""The command line: parses and dispatches, maps what went wrong to exit codes, and nothing more."""

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from msn_eval.commands import VERBS, load_command
from msn_eval.errors import MsnEvalError, UsageError, did_you_mean, printable
from msn_eval.version import __version__

_BUG, _PREEMPTED, _INTERRUPTED = 1, 75, 130
_GO_ON = "Finished results are kept; the same command goes on from them."


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"See {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `msn-eval` and give its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbosity = 0
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _on_sigterm) if in_main_thread else None
    try:
        verb, rest = (words[0], words[1:]) if words and words[0] in VERBS else ("evaluate", words)
        command = load_command(verb)
        parser = _parser(verb)
        options, extra = parser.parse_known_args(rest)
        overrides = _overrides(extra, parser, takes_overrides=verb == "evaluate")
        options.words = words
        verbosity = options.verbose
        _log_to_stderr(verbosity, quiet=options.quiet)
        code: int = command.run(options, overrides)
        sys.stdout.flush()
        return code
    except MsnEvalError as error:
        return _fail(f"{type(error).__name__}: {error}", error.exit_code, verbosity)
    except _Terminated:
        return _fail(f"Terminated. {_GO_ON}", _PREEMPTED, 0)
    except KeyboardInterrupt:
        return _fail(f"Interrupted. {_GO_ON}", _INTERRUPTED, 0)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        text = printable(f"{type(error).__name__}: {error}")
        return _fail(f"This is a bug in msn-eval: {text}\nRun it again with -vv for the traceback.", _BUG, verbosity)
    finally:
        if in_main_thread and signal.getsignal(signal.SIGTERM) is _on_sigterm:  # not while we are on our way out of one
            signal.signal(signal.SIGTERM, before)


def _parser(verb: str) -> _Parser:
    command = load_command(verb)
    if verb == "evaluate":
        others = (f"{name} ({summary})" for name, summary in VERBS.items() if name != verb)
        parser = _Parser(
            prog="msn-eval",
            description="How good is a frozen vision checkpoint when labels are scarce?",
            epilog=f"verbs: {'; '.join(others)}",
            allow_abbrev=False,
        )
    else:
        parser = _Parser(prog=f"msn-eval {verb}", description=VERBS[verb], allow_abbrev=False)
    command.add_options(parser)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="more on stderr; -vv for tracebacks")
    parser.add_argument("-q", "--quiet", action="store_true", default=False, help="only errors on stderr")
    parser.add_argument("--version", action="version", version=f"msn-eval {__version__}")
    return parser


def _overrides(extra: Sequence[str], parser: argparse.ArgumentParser, *, takes_overrides: bool) -> list[str]:
    """Give the `key=value` words among those that the parser did not know; anything else is a mistake."""
    known = [name for action in parser._actions for name in action.option_strings]
    for word in extra:
        if word.startswith("-"):
            name = word.partition("=")[0]
            raise UsageError(f"unknown option {name}.{did_you_mean(name, known)}", hint=f"See {parser.prog} --help.")
        if not takes_overrides or "=" not in word:
            hint = did_you_mean(word, VERBS)
            raise UsageError(f"unexpected argument {word!r}.{hint}", hint=f"See {parser.prog} --help.")
    return list(extra)


def _log_to_stderr(verbosity: int, *, quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s" if not verbosity else "%(name)s: %(message)s"))
    package = logging.getLogger("msn_eval")
    package.handlers[:] = [handler]
    package.setLevel(logging.ERROR if quiet else logging.DEBUG if verbosity else logging.INFO)
    package.propagate = False


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it twice, and once is enough
    raise _Terminated


def _fail(text: str, code: int, verbosity: int) -> int:
    if verbosity > 1:
        traceback.print_exc()
    print(text, file=sys.stderr)
    return code
