"""The command line of `msn-pretrain`: its verbs, their options, and one call for each."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import MsnEvalError, UsageError, did_you_mean
from msn_eval.process import keep_freed_memory
from msn_eval.program import ArgumentParser, run_program

if TYPE_CHECKING:
    from msn_pretrain.training.run import Recipe

_TARGETS = ("timm", "hf", "msn", "torchvision")
_RECIPE_HELP = "YAML file, or a name that `msn-eval ls recipes` lists; `key=value` arguments override it"
_KEPT = "Snapshots are kept; run the same command again to continue."
_KEYS = {  # of a recipe, by the option of msn-eval that errors of its data sets and networks name
    "data": "data.root",
    "workers": "data.workers",
    "device": "run.device",
    "arch": "encoder.name",
    "image-pixels": "views.image_pixels",
}
_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `msn-pretrain` and return its exit code."""
    verb = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    kept = "Nothing was written." if verb in ("bench", "export") else _KEPT
    return run_program("msn-pretrain", arguments, _parse, loggers=("msn_pretrain", "msn_eval"), kept=kept)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Callable[[], int]]:
    verbs = {"export": (_export_parser, _export), "bench": (_bench_parser, _bench)}
    verb = arguments[0] if arguments and arguments[0] in verbs else ""
    build_parser, run = verbs.get(verb, (_train_parser, _train))
    rest = arguments[1:] if verb else arguments
    options, overrides = build_parser().parse_with_overrides(rest, takes_overrides=verb != "export")
    options.overrides, options.arguments = overrides, arguments
    return options, partial(_run_with_keys, run, options) if verb != "export" else partial(run, options)


def _run_with_keys(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a verb; in its errors, name keys of the recipe instead of options of msn-eval."""
    try:
        return run(options)
    except MsnEvalError as error:
        for option, key in _KEYS.items():
            pattern = rf"--{option}\b(?!-)"
            error.what, error.hint = re.sub(pattern, key, error.what), re.sub(pattern, key, error.hint)
        raise


def _train_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="msn-pretrain",
        description="Pre-train MSN or SimSiam by a recipe. In the folder of an earlier run, continue that run.",
        epilog="verbs: export (a run's encoder for other programs), bench (how fast a recipe trains here)",
    )
    parser.add_argument(
        "recipe",
        metavar="CONFIG",
        help=_RECIPE_HELP,
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained and stop")
    parser.add_argument("--slurm", metavar="K=V,…", help="submit it, e.g. partition=gpu,nodes=2,gpus_per_node=8")
    parser.add_argument(
        "--allow-config-change", action="append", default=[], metavar="KEY",
        help="continue although this key of the recipe differs from the run's; repeatable",
    )  # fmt: skip
    return parser


def _export_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="msn-pretrain export", description="Write the encoder of a run's newest complete snapshot."
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--to", required=True, choices=_TARGETS, help="whose names and layout")
    parser.add_argument("--out", required=True, metavar="PATH", help="timm: one .safetensors at exactly PATH")
    return parser


def _bench_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="msn-pretrain bench",
        description="Train a recipe for some steps, keep nothing, and print how fast that is.",
    )
    parser.add_argument(
        "recipe",
        metavar="CONFIG",
        help=_RECIPE_HELP,
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps to time, after 2 others; default 10")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a trace of one step in Chrome's format")
    return parser


def _train(options: argparse.Namespace) -> int:
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we report a lost rank ourselves, without C++ stacks
    recipe = _read_recipe(options)
    if options.dry_run:
        from msn_pretrain.benchmark import describe

        print(describe(recipe, allowed=options.allow_config_change, elsewhere=options.slurm is not None))
        return 0
    if options.slurm is not None:
        return _submit(options, recipe)
    from msn_eval.distributed.group import join_group
    from msn_eval.distributed.rank_info import read_rank_info
    from msn_pretrain.local_ranks import choose_rank_device, run_local_ranks
    from msn_pretrain.training.train import train

    devices = recipe.run.device.split(",")
    if len(devices) > 1 and read_rank_info() is None:
        return run_local_ranks(options.arguments, devices)
    keep_freed_memory()
    with join_group() as group:
        if not group.first:
            logging.getLogger("msn_pretrain").setLevel(logging.ERROR)  # rank 0 prints for all
        group = choose_rank_device(group, recipe.run.device)
        code = train(recipe, group, allowed=options.allow_config_change, quiet=options.quiet)
    if group.first and code:
        text = f"Stopped; the state is saved in {recipe.run.dir}. Run the same command again to continue."
        print(text, file=sys.stderr)
    elif group.first:
        _log.info("%s is trained to its end: msn-eval --checkpoint %s", recipe.run.dir, recipe.run.dir)
    return code


def _read_recipe(options: argparse.Namespace) -> "Recipe":
    """Read a recipe from a file, or a shipped one by its bare name."""
    from msn_eval.files.package_data import list_recipes
    from msn_pretrain.config.load import read_recipe

    file, shipped = Path(options.recipe), list_recipes("pretrain")
    if not file.exists():
        if options.recipe not in shipped:
            here = [str(path) for path in file.parent.glob("*.y*ml")]
            guess = did_you_mean(str(file), here) or did_you_mean(file.stem, shipped)
            hint = f"Give a YAML file, or one of {', '.join(shipped)}."
            raise UsageError(f"no such recipe.{guess}", where=options.recipe, hint=hint)
        file = shipped[options.recipe]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return read_recipe(file, overrides=options.overrides, world_size=world_size)


def _submit(options: argparse.Namespace, recipe: "Recipe") -> int:
    """Submit the same command to Slurm, and print where its output will be."""
    from msn_eval.distributed.slurm import parse_slurm, submit, without_slurm

    arguments = without_slurm(options.arguments)
    command = (sys.executable, "-m", "msn_pretrain")
    job = submit(arguments, parse_slurm(options.slurm), folder=Path(recipe.run.dir) / "slurm", command=command)
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
    keep_freed_memory()  # as in training
    print(bench(_read_recipe(options), steps=options.steps, trace=options.profile))
    return 0
