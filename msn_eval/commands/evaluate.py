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
from msn_eval.config.request import BAD_IMAGE_RULES, DECODERS, PRECISIONS, SEARCHES, SOLVER_NAMES, EvaluationConfig
from msn_eval.data import find_data_name
from msn_eval.errors import (
    CheckpointError,
    UsageError,
    did_you_mean,
    format_count,
    format_duration,
    printable,
    suggest_paths,
)
from msn_eval.files.package_data import list_recipes
from msn_eval.probes import find_probe, read_probes
from msn_eval.program import split_list

if TYPE_CHECKING:
    from msn_eval.data.images import ImageSet
    from msn_eval.distributed.group import Group
    from msn_eval.evaluation.cost_estimate import CostEstimate
    from msn_eval.evaluation.evaluate import Preparation
    from msn_eval.evaluation.plan import Plan

_log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options. One that is not given does not appear, so that configs and defaults apply."""
    parser.argument_default = argparse.SUPPRESS
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--checkpoint",
        action="append",
        metavar="[NAME=]X",
        help="file or scheme, and what tables call it; repeatable; see `ls checkpoints`",
    )
    what.add_argument("--data", metavar="X", help="image folder or scheme, see `ls datasets`; default $MSN_EVAL_DATA")
    what.add_argument("--test", action="append", metavar="X", help="also score the fits on the val of this data set, or "
                      "real:FILE for the labels of ImageNet ReaL; repeatable")  # fmt: skip
    what.add_argument("--class-map", metavar="FILE", help="for --test: lines TEST_CLASS,TRAIN_CLASS where names differ")
    # A repeated option adds its values: silently using only the last ones would surprise.
    several: dict[str, Any] = {"type": split_list, "action": "extend"}
    what.add_argument("--subset", **several, metavar="A,B", help="1img, Nimgs, Npct or full, each with an optional "
                      "@DRAW; low-shot (default): 1img, 2imgs, 5imgs and 1pct; or a list file")  # fmt: skip
    what.add_argument("--probe", **several, metavar="A,B", help=f"{', '.join(read_probes())}; default logistic")
    what.add_argument("--tap", metavar="NAME", help=f"{', '.join(TAP_NAMES)}; default: chosen by the probe")
    what.add_argument("--lambda", dest="lambda_", **several, metavar="A,B|auto", help="for logistic; default 0.0025, and "
                      "0.075 for 1pct; auto: chosen from the labelled images alone")  # fmt: skip
    what.add_argument("--k", **several, metavar="A,B", help="for knn; default 10,20,100,200")
    what.add_argument("--temperature", **several, metavar="A,B", help="for knn; default 0.07")
    what.add_argument(
        "--search", metavar="NAME", help=f"for knn: who proposes candidates, {', '.join(SEARCHES)}; same result"
    )
    what.add_argument(
        "--image-pixels", metavar="N", help="image size; default: native; interpolates position embeddings"
    )
    what.add_argument(
        "--patch-drop", metavar="F", help="share of patches to drop from labelled images, drawn by --seed"
    )
    what.add_argument("--decoder", metavar="NAME", help=f"{', '.join(DECODERS)}; default {DECODERS[0]}")
    what.add_argument("--canary", action="store_true", help="use random labels: a result above chance means a leak")
    what.add_argument("--limit", metavar="N", help="at most N validation images per class")
    loading = parser.add_argument_group("how a checkpoint is read")
    loading.add_argument("--arch", action="append", metavar="NAME", help="timm's name of the architecture, if the file "
                         "does not state it; CHECKPOINT=NAME for one of several, written as above or by its NAME")  # fmt: skip
    for name in ("mean", "std"):
        loading.add_argument(f"--{name}", **several, metavar="R,G,B", help=f"{name} of the images' channels, on the "
                             "[0, 1] scale; default: the checkpoint's own")  # fmt: skip
    loading.add_argument("--checkpoint-key", metavar="K", help="which of several networks in the file")
    loading.add_argument("--allow-missing", action="append", metavar="PATTERN", help="weights that may be absent")
    how = parser.add_argument_group("how it is computed")
    how.add_argument("--solver", metavar="NAME", help=f"for logistic: {', '.join(SOLVER_NAMES)}")
    how.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:N")
    how.add_argument("--precision", metavar="P", help=f"{', '.join(PRECISIONS)}; default fp32 on CPU, bf16 on CUDA")
    how.add_argument("--batch-size", metavar="N", help="images per batch, or auto")
    how.add_argument("--workers", metavar="N", help="number of decoding processes, or auto")
    how.add_argument("--compile", action="store_true", help="use torch.compile: slow to start, then faster")
    how.add_argument("--slurm", metavar="K=V,…", help="submit this command, e.g. partition=gpu,nodes=2,gpus_per_node=8")
    how.add_argument("--seed", metavar="N", help="seed of untrained weights, --patch-drop and --canary; default 0")
    how.add_argument("--on-bad-image", metavar="RULE", help=f"{' or '.join(BAD_IMAGE_RULES)}; default error")
    how.add_argument(
        "--allow-class-mismatch", action="store_true", help="use the union of the classes of train and val"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--config", metavar="FILE", help="YAML file of these options; `key=value` arguments override it")
    files.add_argument("--out", metavar="DIR", help="results; an earlier run's folder is continued; default runs")
    files.add_argument(
        "--save", metavar="DIR", help="for finetune: save the network as a folder that transformers loads"
    )
    files.add_argument("--cache", metavar="DIR", help="cached features and hashes; default: the user's cache folder")
    files.add_argument("--no-cache", action="store_true", help="neither read nor write the cache")
    files.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    files.add_argument("--json", action="store_true", help="print the results as a JSON list on stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate, and return 0 or the exit code of what failed."""
    config = read_options(options, overrides)
    if hasattr(options, "slurm"):
        from msn_eval.distributed.slurm import without_slurm

        return _submit(options.slurm, config, without_slurm(options.words))
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we report a lost rank ourselves, without C++ stacks
    else:
        for name in config.checkpoint:  # before torch is imported; of several ranks, one reports it
            find_scheme(name)
    if config.checkpoint and os.environ.get("RANK", "0") == "0":
        _log.info("%s", _describe_request(config))
    from msn_eval.distributed.group import join_group

    with join_group() as group:
        if group.rank != 0:
            logging.getLogger("msn_eval").setLevel(logging.ERROR)  # the first rank reports for all
        return _run(config, options, group)


def _run(config: EvaluationConfig, options: argparse.Namespace, group: "Group") -> int:
    from msn_eval.commands.progress import evaluate_with_progress
    from msn_eval.distributed.group import barrier
    from msn_eval.evaluation.canary import describe_canary, judge_canary, refuse_leaks
    from msn_eval.evaluation.cost_estimate import CostEstimate, estimate_cost
    from msn_eval.evaluation.plan import make_plan

    if group.rank != 0:
        barrier(group, "plan")  # the first rank fills the cache with hashes and listings
    plan = make_plan(config, local_rank=group.local_rank if group.world > 1 else None)
    if group.rank == 0:
        barrier(group, "plan")
    dry_run = getattr(options, "dry_run", False)
    costs: Sequence[CostEstimate] = ()
    prepared: dict[str, Preparation] = {}
    if group.rank == 0 and (dry_run or not options.json_output):
        costs, prepared = estimate_cost(plan, run_own_code=dry_run)
        # A refusal is the error that ends the run; it is told once.
        shown = costs if dry_run else [cost for cost in costs if not cost.problem]
        text = f"{describe_plan(plan)}\n{describe_costs(shown, ranks=group.world)}".rstrip()
        if dry_run:
            print(text)
        else:
            _log.info("%s", text)
    if dry_run:
        return CheckpointError.exit_code if any(cost.problem for cost in costs) else 0
    results, code, refused = evaluate_with_progress(plan, prepared=prepared, group=group)
    if group.rank != 0:
        return code
    canaries = judge_canary(results) if config.canary else ()
    if options.json_output:
        from msn_eval.results.record import encode_result

        print(json.dumps([encode_result(result) for result in results], indent=1, allow_nan=False))
    elif config.canary:
        print(printable(describe_canary(canaries)))
    elif results:
        from msn_eval.reports.terminal import print_table
        from msn_eval.results.table import make_table

        print_table(make_table(results, refused=refused))
    refuse_leaks(canaries)
    return code


def read_options(options: argparse.Namespace, overrides: Sequence[str]) -> EvaluationConfig:
    """Combine defaults, the config file, the options and the overrides."""
    from msn_eval.config.yaml_config import read_config

    given = {name: value for name, value in vars(options).items() if name in EvaluationConfig.__dataclass_fields__}
    options.json_output = getattr(options, "json", False)
    file = _find_config_file(options.config) if hasattr(options, "config") else None
    config = read_config(EvaluationConfig, file=file, given=given, overrides=overrides, translate=_translate)
    for name in config.probe:
        find_probe(name)  # before a job is submitted
    return config


def _translate(content: Mapping[str, object], where: str) -> Mapping[str, object]:
    """Return a config file's content under our names: linear-evaluation files of the MSN repository are supported."""
    from msn_eval.config.reference_yaml import is_reference, map_reference_config

    return map_reference_config(content, where=where) if is_reference(content) else content


def _find_config_file(name: str) -> Path:
    """Return the file called `name`, else the shipped config of that name."""
    shipped = list_recipes("eval")
    if Path(name).exists():
        return Path(name)
    if name in shipped:
        return shipped[name]
    suggestion = did_you_mean(Path(name).stem, shipped) or suggest_paths(name)
    raise UsageError(f"no such config file.{suggestion}", where=name, hint=f"Shipped: {', '.join(sorted(shipped))}.")


def _submit(text: str, config: EvaluationConfig, arguments: Sequence[str]) -> int:
    """Submit the same command to Slurm, and print where its output will be."""
    from msn_eval.distributed.slurm import parse_slurm, submit

    job = submit(arguments, parse_slurm(text), folder=Path(config.out) / "slurm")
    print(f"submitted job {job.job_id}; its output: {', '.join(str(path) for path in job.logs)}")
    return 0


def _describe_request(config: EvaluationConfig) -> str:
    """Return the line that is printed at once; importing torch and reading the data take seconds."""
    names = config.checkpoint
    checkpoints = ", ".join(names) if len(names) < 4 else f"{len(names)} checkpoints"
    return f"evaluating {checkpoints} on {find_data_name(config.data)}: {','.join(config.subset)} by {','.join(config.probe)}"


def describe_plan(plan: "Plan") -> str:
    """Return the size of a plan as text, without its checkpoints' costs."""
    from msn_eval.data.subsets import merge_subsets

    config = plan.config
    labelled = format_count(len(merge_subsets(plan.subsets, plan.train)), "image")
    listed = sum(len(subset) for subset in plan.subsets)
    checkpoints = format_count(len(config.checkpoint), "checkpoint")
    where = "with random labels, not written" if config.canary else f"into {config.out}"
    dropped = f", {config.patch_drop:.3g} of the patches of each dropped" if config.patch_drop else ""
    lines = [
        f"data       {plan.data_name}: {_describe_size(plan.val, 'validation image')}",
        *(f"test       {test.name}: {_describe_size(test.images, 'image')}" for test in plan.tests),
        f"labelled   {labelled} for {format_count(len(plan.subsets), 'draw')} ({listed:,} with repetitions){dropped}",
        f"results    {len(plan.tasks)} for {'each of ' if len(config.checkpoint) > 1 else ''}{checkpoints}, {where}",
        f"computing  {plan.precision} on {plan.device}, decoded by {config.decoder}",
    ]
    return printable("\n".join(lines))


def _describe_size(images: "ImageSet", noun: str) -> str:
    return f"{format_count(len(images), noun)}, {format_count(len(images.classes), 'class', 'classes')}"


def describe_costs(costs: "Sequence[CostEstimate]", *, ranks: int = 1) -> str:
    """Return a line per checkpoint, and one for several together: images to read and reuse, passes, bytes, time."""
    lines = [
        f"checkpoint {cost.name}: {f'would be refused: {cost.problem}' if cost.problem else _describe_cost([cost], ranks)}"
        for cost in costs
    ]
    if len(costs) > 1:
        lines.append(f"total      {_describe_cost(costs, ranks)}")
    return printable("\n".join(lines))


def _describe_cost(costs: "Sequence[CostEstimate]", ranks: int) -> str:
    finished, read, reused, size, augmented, tuned = (
        sum(getattr(cost, name) for cost in costs)
        for name in ("finished", "read", "reused", "bytes", "augmented", "tuned")
    )
    passes = format_count(sum(1 for cost in costs if cost.read), "pass", "passes")
    texts = [f"{format_count(finished, 'result')} finished before"] if finished else []
    texts.append(f"{format_count(read, 'image')} to read ({format_count(size, 'byte')}, {passes})")
    texts.append(f"{format_count(reused, 'feature')} to reuse")
    texts += [f"{format_count(augmented, 'augmented image')} to encode"] if augmented else []
    texts += [f"{format_count(tuned, 'image')} to fine-tune on, over all epochs"] if tuned else []
    if measured := [cost.seconds for cost in costs if cost.seconds is not None]:
        texts.append(f"about {format_duration(sum(measured) / ranks)}")
    return ", ".join(texts)
