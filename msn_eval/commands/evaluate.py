"""`msn-eval --checkpoint X …`: evaluate checkpoints and print their table."""

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msn_eval.checkpoints import find_scheme
from msn_eval.config.recipes import TAP_NAMES
from msn_eval.config.request import BAD_IMAGE_RULES, DECODERS, PRECISIONS, SOLVER_NAMES, EvaluationConfig
from msn_eval.errors import UsageError, did_you_mean, printable
from msn_eval.files.package_data import find_package_folder
from msn_eval.probes import find_probe, read_probes

if TYPE_CHECKING:
    from msn_eval.distributed.group import Group
    from msn_eval.evaluation.cost_estimate import CostEstimate
    from msn_eval.evaluation.evaluate import Preparation
    from msn_eval.evaluation.plan import Plan

_log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options. What is not given does not appear, so that configs and defaults show through."""
    parser.argument_default = argparse.SUPPRESS
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--checkpoint", action="append", metavar="X", help="file or scheme; repeatable (see `ls checkpoints`)"
    )
    what.add_argument("--data", metavar="X", help="image folder or `digits`; default $MSN_EVAL_DATA")
    # Given twice, an option adds: the last alone would be a surprise.
    several: dict[str, Any] = {"type": _names, "action": "extend"}
    what.add_argument("--subset", **several, metavar="A,B", help="1img, 2imgs, 5imgs, 1pct, 10pct, full, each perhaps "
                      "@DRAW; low-shot (default); or a list file")  # fmt: skip
    what.add_argument("--probe", **several, metavar="A,B", help=f"{', '.join(read_probes())}; default logistic")
    what.add_argument("--tap", metavar="NAME", help=f"{', '.join(TAP_NAMES)}; default the probe's own")
    what.add_argument("--lambda", dest="lambda_", **several, metavar="A,B|auto", help="logistic: 0.0025, and 0.075 for "
                      "1pct; auto: chosen from the labelled images alone")  # fmt: skip
    what.add_argument("--k", **several, metavar="A,B", help="knn: 10,20,100,200")
    what.add_argument("--temperature", **several, metavar="A,B", help="knn: 0.07")
    what.add_argument("--image-pixels", metavar="N", help="instead of the native size; interpolates positions")
    what.add_argument(
        "--patch-drop", metavar="F", help="share of patches to drop from labelled images, drawn by --seed"
    )
    what.add_argument("--decoder", metavar="NAME", help=f"{', '.join(DECODERS)}")
    what.add_argument("--canary", action="store_true", help="random labels instead: anything above chance leaks")
    what.add_argument("--limit", metavar="N", help="at most N validation images a class")
    loading = parser.add_argument_group("how a checkpoint is read")
    loading.add_argument("--arch", metavar="NAME", help="timm's name, where the file leaves it open")
    loading.add_argument("--checkpoint-key", metavar="K", help="which of several networks in the file")
    loading.add_argument("--allow-missing", action="append", metavar="PATTERN", help="weights that may be absent")
    how = parser.add_argument_group("how it is computed")
    how.add_argument("--solver", metavar="NAME", help=f"logistic: {', '.join(SOLVER_NAMES)}")
    how.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:N")
    how.add_argument("--precision", metavar="P", help=f"{', '.join(PRECISIONS)}; default fp32 on CPU, bf16 on CUDA")
    how.add_argument("--batch-size", metavar="N", help="images a batch, or auto")
    how.add_argument("--workers", metavar="N", help="decoding processes, or auto")
    how.add_argument("--compile", action="store_true", help="torch.compile the network: slow to start, faster for long")
    how.add_argument("--slurm", metavar="K=V,…", help="submit this command, e.g. partition=gpu,nodes=2,gpus_per_node=8")
    how.add_argument("--seed", metavar="N", help="of untrained weights and --patch-drop; default 0")
    how.add_argument("--on-bad-image", metavar="RULE", help=f"{' or '.join(BAD_IMAGE_RULES)}; default error")
    how.add_argument(
        "--allow-class-mismatch", action="store_true", help="number the union of train's and val's classes"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--config", metavar="FILE", help="YAML of these names; `key=value` arguments override it")
    files.add_argument("--out", metavar="DIR", help="results; an earlier run's folder is continued; default runs")
    files.add_argument("--save", metavar="DIR", help="finetune: the network, as a folder that transformers loads")
    files.add_argument("--cache", metavar="DIR", help="what can be computed again; default the user's cache folder")
    files.add_argument("--no-cache", action="store_true", help="neither read nor write it")
    files.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    files.add_argument("--json", action="store_true", help="results as a JSON list on stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate; give 0, or the exit code of what failed."""
    request = read_request(options, overrides)
    if hasattr(options, "slurm"):
        from msn_eval.distributed.slurm import without_slurm

        return _submit(options.slurm, request, without_slurm(options.words))
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we report a lost rank ourselves, without C++ stacks
    else:
        for name in request.checkpoint:  # before torch is imported; of several ranks, one reports it
            find_scheme(name)
    from msn_eval.distributed.group import join_group

    with join_group() as group:
        if group.rank != 0:
            logging.getLogger("msn_eval").setLevel(logging.ERROR)  # the first rank speaks for all
        return _run(request, options, group)


def _run(request: EvaluationConfig, options: argparse.Namespace, group: "Group") -> int:
    from msn_eval.commands.progress import evaluate_with_progress
    from msn_eval.distributed.group import barrier
    from msn_eval.evaluation.canary import describe_canary, judge_canary, refuse_leaks
    from msn_eval.evaluation.cost_estimate import estimate_cost
    from msn_eval.evaluation.plan import make_plan

    if group.rank != 0:
        barrier(group, "plan")  # what the first rank has hashed and listed, the others find in the cache
    plan = make_plan(request, local_rank=group.local_rank if group.world > 1 else None)
    if group.rank == 0:
        barrier(group, "plan")
    dry_run = getattr(options, "dry_run", False)
    prepared: dict[str, Preparation] = {}
    if group.rank == 0 and (dry_run or not options.json_output):
        forecasts, prepared = estimate_cost(plan, run_own_code=dry_run)
        text = f"{describe_plan(plan)}\n{describe_forecasts(forecasts, ranks=group.world)}"
        if dry_run:
            print(text)
        else:
            _log.info("%s", text)
    if dry_run:
        return 0
    results, code = evaluate_with_progress(plan, prepared=prepared, group=group)
    if group.rank != 0:
        return code
    canaries = judge_canary(results) if request.canary else ()
    if options.json_output:
        from msn_eval.results.record import encode_result

        print(json.dumps([encode_result(result) for result in results], indent=1, allow_nan=False))
    elif request.canary:
        print(printable(describe_canary(canaries)))
    elif results:
        from msn_eval.reports.terminal import print_table
        from msn_eval.results.table import make_table

        print_table(make_table(results))
    refuse_leaks(canaries)
    return code


def read_request(options: argparse.Namespace, overrides: Sequence[str]) -> EvaluationConfig:
    """Put together defaults, the config file, the options and the overrides."""
    from msn_eval.config.yaml_config import read_config

    given = {name: value for name, value in vars(options).items() if name in EvaluationConfig.__dataclass_fields__}
    options.json_output = getattr(options, "json", False)
    config = getattr(options, "config", None)
    file = _config_file(config) if config else None
    request = read_config(EvaluationConfig, file=file, given=given, overrides=overrides, translate=_translated)
    for name in request.probe:
        find_probe(name)  # before a job is submitted
    return request


def _translated(content: Mapping[str, object], where: str) -> Mapping[str, object]:
    """Give a config file's content in our words: the MSN repository's linear-evaluation files are read as they are."""
    from msn_eval.config.reference_yaml import is_reference, map_reference_config

    return map_reference_config(content, where=where) if is_reference(content) else content


def _config_file(name: str) -> Path:
    """Give the file called `name`, or the shipped config of that bare name."""
    shipped = {path.stem: path for path in (find_package_folder("configs") / "eval").glob("*.yaml")}
    if Path(name).exists():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise UsageError(
        f"no such config file.{did_you_mean(name, shipped)}", where=name, hint=f"Shipped: {', '.join(sorted(shipped))}."
    )


def _submit(text: str, request: EvaluationConfig, words: Sequence[str]) -> int:
    """Hand the same command to Slurm, and say where its output will be."""
    from msn_eval.distributed.slurm import parse_slurm, submit

    job = submit(words, parse_slurm(text), folder=Path(request.out) / "slurm")
    print(f"submitted job {job.job_id}; its output: {', '.join(str(path) for path in job.logs)}")
    return 0


def describe_plan(plan: "Plan") -> str:
    """Say what a plan comes to, the checkpoints apart."""
    from msn_eval.data.subsets import merge_subsets

    pool = merge_subsets(plan.subsets, plan.train)
    listed = sum(len(subset) for subset in plan.subsets)
    where = "with random labels, not written" if plan.request.canary else f"into {plan.request.out}"
    dropped = f", {plan.request.patch_drop:.3g} of the patches of each dropped" if plan.request.patch_drop else ""
    lines = [
        f"data       {plan.data_name}: {len(plan.val):,} validation images, {len(plan.val.classes)} classes",
        f"labelled   {len(pool):,} images for {len(plan.subsets)} draws ({listed:,} if each draw were read by itself){dropped}",
        f"results    {len(plan.tasks)} for each of {len(plan.request.checkpoint)} checkpoints, {where}",
        f"computing  {plan.precision} on {plan.device}, decoded by {plan.request.decoder}",
    ]
    return printable("\n".join(lines))


def describe_forecasts(forecasts: "Sequence[CostEstimate]", *, ranks: int = 1) -> str:
    """Say what each checkpoint will cost, and all of them together: images to read and to reuse, passes, bytes, time."""
    lines = []
    for one in forecasts:
        text = f"would be refused: {one.problem}" if one.problem else _cost([one], ranks)
        lines.append(f"checkpoint {one.name}: {text}")
    if len(forecasts) > 1:
        lines.append(f"in all     {_cost(forecasts, ranks)}")
    return printable("\n".join(lines))


def _cost(forecasts: "Sequence[CostEstimate]", ranks: int) -> str:
    finished, read, reused, size, augmented = (
        sum(getattr(one, name) for one in forecasts) for name in ("finished", "read", "reused", "bytes", "augmented")
    )
    passes = sum(1 for one in forecasts if one.read)
    parts = [f"{finished:,} results are there already"] if finished else []
    parts.append(f"{read:,} images to read ({size:,} bytes, {passes} pass{'' if passes == 1 else 'es'})")
    parts.append(f"{reused:,} features to reuse")
    parts += [f"{augmented:,} augmented images to encode"] if augmented else []
    if tuned := sum(one.tuned for one in forecasts):
        parts.append(f"fine-tuning on {tuned:,} images, seen again and again")
    if measured := [one.seconds for one in forecasts if one.seconds is not None]:
        parts.append(f"about {_duration(sum(measured) / ranks)}")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 100 else f"{hours} h"


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
