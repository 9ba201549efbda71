"""Program: what the command lines of both packages share. Parsing, logging, SIGTERM, and exit codes."""

import argparse
import copy
import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from msn_eval.errors import (
    INTERRUPTED,
    PREEMPTED,
    MsnEvalError,
    ResourceError,
    StoreError,
    UsageError,
    did_you_mean,
    printable,
)
from msn_eval.process import Terminated, describe_exhausted_resource, limit_spinning, record_for_torchrun
from msn_eval.version import __version__

_OUTPUT_HINT = "Free space, or send the output elsewhere. Finished results are kept."
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EBADF)
VERBOSITY_OPTIONS = ("-v", "-vv", "--verbose", "-q", "--quiet")
Parse = Callable[[list[str]], tuple[argparse.Namespace, Callable[[], int]]]


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises UsageError, takes no abbreviated options, and has the options of every verb."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"See {self.prog} --help.")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # of --help and --version, so that a full disk is reported
        super().exit(status, message)

    def list_parsers(self) -> list[argparse.ArgumentParser]:
        """Return this parser, and those of the verb's own actions, as `list` of `cache list`."""
        nested = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return [self, *(parser for action in nested for parser in action.choices.values())]

    def parse_with_overrides(
        self,
        arguments: Sequence[str],
        *,
        takes_overrides: bool,
        verbs: Iterable[str] = (),
        suggest_verb: Callable[[str, Sequence[str]], str] = lambda verb, words: "",
        suggest: Callable[[str], str] = lambda argument: "",
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse options, and return the `key=value` arguments separately.

        Args:
            arguments: After the verb.
            takes_overrides: Whether `key=value` is allowed.
            verbs: Names that may only come first, and that an unexpected argument may be a typo of.
            suggest_verb: Returns the command that starts with a verb, from the verb and all arguments.
            suggest: Returns the hint for an unexpected argument or option, or an empty string.

        Raises:
            UsageError: An option or argument is not known.
        """
        version = f"{self.prog.partition(' ')[0]} {__version__}"
        for parser in self.list_parsers():  # `data verify X -q` as well as `data -q verify X`
            unset: Any = 0 if parser is self else argparse.SUPPRESS
            more, less = "more on stderr; -vv for tracebacks", "only errors on stderr"
            parser.add_argument("-v", "--verbose", action="count", default=unset, help=more)
            parser.add_argument("-q", "--quiet", action="store_true", default=unset, help=less)
            parser.add_argument("--version", action="version", version=version)
        options, extra = self.parse_known_args(arguments)
        if verb := next((argument for argument in extra if argument in verbs), ""):
            raise UsageError(f"{verb!r} must come first", hint=f"Type: {suggest_verb(verb, arguments)}")
        for argument in extra:
            if argument.startswith("-"):
                name = argument.partition("=")[0]
                guess = did_you_mean(name, self._option_string_actions)
                hint = suggest(name) or f"See {self.prog} --help."
                raise UsageError(f"unknown option {name}.{guess}", hint=hint)
            if not takes_overrides or "=" not in argument:
                guess = did_you_mean(argument, verbs)
                hint = suggest(argument) or f"See {self.prog} --help."
                raise UsageError(f"unexpected argument {argument!r}.{guess}", hint=hint)
        return options, extra


def split_list(text: str) -> list[str]:
    """Return the values of an option such as `--probe A,B`, without empty ones."""
    return [value.strip() for value in text.split(",") if value.strip()]


def run_program(name: str, arguments: Sequence[str] | None, parse: Parse, *, loggers: Sequence[str], kept: str) -> int:
    """Parse the arguments, run the verb, and return the exit code; print every error to stderr.

    Args:
        name: Of the program.
        arguments: Instead of `sys.argv`.
        parse: Returns the options, and a function that runs the verb.
        loggers: Packages whose log goes to stderr.
        kept: What is kept after SIGTERM or Ctrl-C.
    """
    verbosity = 0
    limit_spinning()
    if sys.stderr is None:  # closed by the caller; a file opened later must not take its number
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the program ends
    if sys.stdout is None:
        return _fail(f"StoreError: standard output is closed\n{_OUTPUT_HINT}", StoreError.exit_code, 0)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _raise_terminated) if in_main_thread else None
    try:
        options, run = parse(list(sys.argv[1:] if arguments is None else arguments))
        verbosity = options.verbose
        _log_to_stderr(loggers, verbosity, quiet=options.quiet)
        if options.quiet and arguments is None:  # the bars of libraries that download
            os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        code = run()
        sys.stdout.flush()
        return code
    except MsnEvalError as error:
        return _fail(f"{type(error).__name__}: {error}", error.exit_code, verbosity, error)
    except Terminated:
        return _fail(f"Terminated. {kept}", PREEMPTED, 0)
    except KeyboardInterrupt:
        return _fail(f"Interrupted. {kept}", INTERRUPTED, 0)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        _discard_output()
        return 0
    except Exception as error:
        if (known := _name_cause(error)) is not None:
            _discard_output()
            return _fail(f"{type(known).__name__}: {known}", known.exit_code, verbosity, known)
        text = printable(f"{type(error).__name__}: {error}")
        message = f"This is a bug in {name}: {text}\nRun it again with -vv for the traceback."
        return _fail(message, MsnEvalError.exit_code, verbosity, error)
    finally:
        # A program that ends keeps ignoring a second SIGTERM.
        if in_main_thread and (arguments is not None or signal.getsignal(signal.SIGTERM) is _raise_terminated):
            signal.signal(signal.SIGTERM, previous)


def _name_cause(error: Exception) -> MsnEvalError | None:
    """Return the error to report where a resource, the disk or a name is at fault, None where the program is."""
    if (exhausted := describe_exhausted_resource(error)) is not None:
        resource, hint = exhausted
        return ResourceError(f"out of {resource}: {type(error).__name__}: {error}", hint=hint)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = str(error.filename or "standard output or a file")
        return StoreError(f"cannot be written: {error.strerror}", where=where, hint=_OUTPUT_HINT)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(str(error.strerror), where=str(error.filename), hint="Give a shorter path.")
    return None


def _discard_output() -> None:
    """Send what stdout still holds nowhere if it cannot be written, so that the interpreter does not fail on it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it twice
    raise Terminated


def _log_to_stderr(loggers: Sequence[str], verbosity: int, *, quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s" if not verbosity else "%(name)s: %(message)s"))
    for name in loggers:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbosity else logging.INFO)
        logger.propagate = False


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters, and line ends in arguments that are names; errors have several lines."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        if isinstance(record.args, tuple) and record.msg != "%s":
            record.args = tuple(_escape_line_ends(value) for value in record.args)
        return printable(super().format(record))


def _escape_line_ends(value: object) -> object:
    return str(value).replace("\n", "\\n") if isinstance(value, str | Path) else value


def _fail(text: str, code: int, verbosity: int, error: Exception | None = None) -> int:
    if verbosity > 1:
        traceback.print_exc()
    print(text, file=sys.stderr)
    if error is not None:
        record_for_torchrun(error)
    return code
