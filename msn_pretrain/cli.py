"""The command line of pre-training: parses and dispatches, maps what went wrong to exit codes, and nothing more."""

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from msn_eval.errors import MsnEvalError, UsageError, did_you_mean, printable
from msn_eval.version import __version__

if TYPE_CHECKING:
    from msn_pretrain.training.run import Recipe

_BUG, _PREEMPTED, _INTERRUPTED = 1, 75, 130
_VERBS = ("export", "bench")
_TARGETS = ("timm", "hf", "msn", "torchvision")
_log = logging.getLogger(__name__)


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived while nothing was being trained."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"See {self.prog} --help.")


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `msn-pretrain` and give its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbosity = 0
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _on_sigterm) if in_main_thread else None
    try:
        verb, rest = (words[0], words[1:]) if words and words[0] in _VERBS else ("train", words)
        parser = _parser(verb)
        options, extra = parser.parse_known_args(rest)
        options.overrides = _overrides(extra, parser)
        options.words = words
        verbosity = options.verbose
        _log_to_stderr(verbosity, quiet=options.quiet)
        verbs: dict[str, Callable[[argparse.Namespace], int]] = {"train": _train, "export": _export, "bench": _bench}
        code = verbs[verb](options)
        sys.stdout.flush()
        return code
    except MsnEvalError as error:
        return _fail(f"{type(error).__name__}: {error}", error.exit_code, verbosity)
    except _Terminated:
        return _fail("Terminated. The last snapshot is kept; the same command goes on from it.", _PREEMPTED, 0)
    except KeyboardInterrupt:
        return _fail("Interrupted. The last snapshot is kept; the same command goes on from it.", _INTERRUPTED, 0)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        text = printable(f"{type(error).__name__}: {error}")
        return _fail(
            f"This is a bug in msn-pretrain: {text}\nRun it again with -vv for the traceback.", _BUG, verbosity
        )
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _parser(verb: str) -> _Parser:
    if verb == "train":
        parser = _Parser(
            prog="msn-pretrain",
            description="Pre-train MSN or SimSiam by a recipe; in a folder that was trained in before it goes on from there.",
            epilog="verbs: export (a run's encoder for others), bench (how fast a recipe trains here)",
            allow_abbrev=False,
        )
        parser.add_argument("recipe", metavar="CONFIG", help="YAML; `key=value` arguments override it")
        parser.add_argument("--dry-run", action="store_true", help="print what would be trained and stop")
        parser.add_argument("--slurm", metavar="K=V,…", help="submit it, e.g. partition=gpu,nodes=2,gpus_per_node=8")
        parser.add_argument(
            "--allow-config-change", action="append", default=[], metavar="KEY",
            help="go on although this key of the recipe is another than the folder was trained with; repeatable",
        )  # fmt: skip
    elif verb == "export":
        parser = _Parser(
            prog="msn-pretrain export",
            description="Write the encoder of a run's newest whole snapshot for others to read.",
            allow_abbrev=False,
        )
        parser.add_argument("run", metavar="RUN", help="the run's folder")
        parser.add_argument("--to", required=True, choices=_TARGETS, help="whose names and layout")
        parser.add_argument("--out", required=True, metavar="PATH", help="timm: one .safetensors at exactly PATH")
    else:
        parser = _Parser(
            prog="msn-pretrain bench",
            description="Train a recipe for some steps in a folder that is thrown away, and say how fast that goes.",
            allow_abbrev=False,
        )
        parser.add_argument("recipe", metavar="CONFIG", help="YAML; `key=value` arguments override it")
        parser.add_argument(
            "--steps", type=int, default=10, metavar="N", help="steps to time, behind 2 others; default 10"
        )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="more on stderr; -vv for tracebacks")
    parser.add_argument("-q", "--quiet", action="store_true", default=False, help="only errors on stderr")
    parser.add_argument("--version", action="version", version=f"msn-pretrain {__version__}")
    return parser


def _overrides(extra: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Give the `key=value` words among those that the parser did not know; anything else is a mistake."""
    known = [name for action in parser._actions for name in action.option_strings]
    for word in extra:
        if word.startswith("-"):
            name = word.partition("=")[0]
            raise UsageError(f"unknown option {name}.{did_you_mean(name, known)}", hint=f"See {parser.prog} --help.")
        if "=" not in word or "export" in parser.prog:
            raise UsageError(f"unexpected argument {word!r}.", hint=f"See {parser.prog} --help.")
    return list(extra)


def _train(options: argparse.Namespace) -> int:
    from msn_pretrain.distributed.process_group import is_rank, join_ranks, run_local_ranks

    recipe = _read(options)
    if options.dry_run:
        from msn_pretrain.benchmark import describe

        print(describe(recipe))
        return 0
    if options.slurm is not None:
        return _submit(options, recipe)
    devices = recipe.run.device.split(",")
    if len(devices) > 1 and not is_rank():
        return run_local_ranks(options.words, devices)
    from msn_pretrain.training.train import train

    with join_ranks(recipe.run.device) as ranks:
        if not ranks.first:
            logging.getLogger("msn_pretrain").setLevel(logging.ERROR)  # the first rank speaks for all
        code = train(recipe, ranks, allowed=options.allow_config_change, quiet=options.quiet)
    if ranks.first and code:
        print(
            f"Stopped; the state is saved in {recipe.run.dir}, and the same command goes on from it.", file=sys.stderr
        )
    elif ranks.first:
        _log.info("%s is trained to its end: msn-eval --checkpoint %s", recipe.run.dir, recipe.run.dir)
    return code


def _read(options: argparse.Namespace) -> "Recipe":
    from msn_pretrain.config.load import read_recipe

    return read_recipe(_recipe_file(options.recipe), overrides=options.overrides, world_size=_world_size())


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _recipe_file(name: str) -> Path:
    """Give the file called `name`, or the shipped recipe of that bare name."""
    from msn_eval.files.package_data import shipped_folder

    shipped = {path.stem: path for path in (shipped_folder("configs") / "pretrain").glob("*.yaml")}
    if Path(name).exists() or name not in shipped:
        return Path(name)
    return shipped[name]


def _submit(options: argparse.Namespace, recipe: "Recipe") -> int:
    """Hand the same command to Slurm, and say where its output will be."""
    from msn_eval.distributed.slurm import parse_slurm, submit, without_slurm

    words = without_slurm(options.words)
    command = (sys.executable, "-m", "msn_pretrain")
    job = submit(words, parse_slurm(options.slurm), folder=Path(recipe.run.dir) / "slurm", command=command)
    print(f"submitted job {job.job_id}; its output: {', '.join(str(path) for path in job.logs)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from msn_pretrain.export import export

    print(export(Path(options.run), Path(options.out), to=options.to))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from msn_pretrain.benchmark import bench

    if options.steps < 1:
        raise UsageError(f"--steps {options.steps}: out of range", hint="Give at least 1.")
    print(bench(_read(options), steps=options.steps))
    return 0


def _log_to_stderr(verbosity: int, *, quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s" if not verbosity else "%(name)s: %(message)s"))
    for name in ("msn_pretrain", "msn_eval"):
        package = logging.getLogger(name)
        package.handlers[:] = [handler]
        package.setLevel(logging.ERROR if quiet else logging.DEBUG if verbosity else logging.INFO)
        package.propagate = False


def _fail(text: str, code: int, verbosity: int) -> int:
    if verbosity > 1:
        traceback.print_exc()
    print(text, file=sys.stderr)
    return code
