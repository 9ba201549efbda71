"""`msn-eval reproduce NAME|--list`: a published protocol measured again: expected, measured, tolerance, verdict."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from msn_eval.errors import CheckpointError, DataError, UsageError, printable

if TYPE_CHECKING:
    from msn_eval.data import DataSet
    from msn_eval.results.record import Result
    from msn_eval.results.reproduction import Reproduction, Verdict

_DIFFERS, _NO_VERDICT = 10, 11


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a published number, or a network for all of its numbers"
    )
    parser.add_argument("--list", action="store_true", help="every name, what is expected, and what is unknown of it")
    parser.add_argument("--data", metavar="DIR", help="ImageNet; default $MSN_EVAL_DATA")
    parser.add_argument("--checkpoint", metavar="FILE", help="the network's weights, where you have them in a file")
    parser.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--batch-size", metavar="N", default="auto", help="images a batch, or auto")
    parser.add_argument("--workers", metavar="N", default="auto", help="decoding processes, or auto")
    parser.add_argument("--out", metavar="DIR", default="runs", help="records; default runs")
    parser.add_argument("--cache", metavar="DIR", help="features; default the user's cache folder")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is missing, and stop")
    parser.add_argument("--json", action="store_true", help="the verdicts as JSON on stdout, and nothing else there")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the plan, measure, print the verdicts; give 0 where all is reproduced, 10 where a number differs, 11 where no
    verdict can be given."""
    from msn_eval.results.reproduction import find_reproductions, list_reproductions

    if options.list:
        print(_listing(list_reproductions()))
        return 0
    if options.name is None:
        raise UsageError("no published number is named", hint="See msn-eval reproduce --list.")
    wanted = find_reproductions(options.name)
    name = options.data or _environment_data()
    if not options.json:
        print("\n\n".join(_plan(one, options.checkpoint, name) for one in wanted))
    if options.dry_run:
        return 0
    _check_weights(wanted, options.checkpoint, name)
    data = _read_imagenet(name)
    _check_lists(wanted)
    return _measure(wanted, options, data)


def _environment_data() -> str | None:
    from msn_eval.evaluation.plan import DATA_VARIABLE

    return os.environ.get(DATA_VARIABLE)


def _listing(known: "Sequence[Reproduction]") -> str:
    lines = [("name", "published", "lambda", "weights", "source")]
    for one in known:
        spread = "" if one.expected.spread is None else f" ± {one.expected.spread}"
        strength = "–" if one.probe == "knn" else "unknown" if one.strength is None else f"{one.strength[0]:g}"
        weights = one.network.checkpoint or "--checkpoint FILE"
        lines.append((one.name, f"{one.expected.value}{spread}", strength, weights, one.expected.source))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _plan(one: "Reproduction", checkpoint: str | None, data: str | None) -> str:
    network, expected = one.network, one.expected
    spread = "" if expected.spread is None else f" ± {expected.spread}"
    entries = {
        "network": f"{network.method} {network.printed_arch}, {expected.epochs} epochs on ImageNet-1K",
        "weights": _weights_state(one, checkpoint),
        "data": f"ImageNet, 50,000 validation images: {data or 'missing (give --data or set $MSN_EVAL_DATA)'}",
        "labelled": _labelled_state(one),
        "probe": _probe_text(one),
        "computing": "fp32, decoded by pillow",
        "published": f"{expected.value}{spread} ({expected.source})",
        "tolerance": "unknown" if one.tolerance is None else f"± {one.tolerance}, the published spread",
    }
    if one.why_no_verdict:
        entries["verdict"] = f"none will be given: {one.why_no_verdict}"
    return printable("\n".join([one.name, *(f"  {name:<10} {text}" for name, text in entries.items())]))


def _probe_text(one: "Reproduction") -> str:
    if one.probe == "knn":
        return "knn, tap cls-norm, k = 10, 20, 100, 200, T = 0.07"
    if one.strength is None:
        return "logistic, tap cls; the published lambda is unknown, measured at this package's own"
    return f"logistic, tap cls, lambda {one.strength[0]:g} ({one.strength[1]})"


def _weights_state(one: "Reproduction", checkpoint: str | None) -> str:
    from msn_eval.checkpoints.msn_release import MSN_RELEASES, weights_folder

    if checkpoint is not None:
        return f"{checkpoint}, which must turn out to be {one.network.arch}"
    if one.network.checkpoint is None:
        return f"missing (give --checkpoint FILE): {one.network.by_hand}"
    scheme, _, name = one.network.checkpoint.partition(":")
    if scheme != "msn":
        return f"{one.network.checkpoint}, from timm's cache or its hub"
    path = weights_folder() / MSN_RELEASES[name].file
    return f"{one.network.checkpoint}, {'in' if path.is_file() else 'not yet in'} {path.parent}"


def _labelled_state(one: "Reproduction") -> str:
    from msn_eval.data.imagenet_subsets import find_list, read_publication

    if one.subset == "full":
        return "every training image"
    lists = read_publication().lists_of(one.subset)
    found = sum(find_list(entry) is not None for entry in lists)
    return f"{one.subset}, {found} of {len(lists)} published lists found" + (
        "" if found == len(lists) else " (run msn-eval subsets fetch)"
    )


def _check_weights(wanted: "Sequence[Reproduction]", checkpoint: str | None, data: str | None) -> None:
    """Raise CheckpointError where no name and no file gives the weights; data that are missing too are told first."""
    network = wanted[0].network
    if checkpoint is None and network.checkpoint is None and data is not None:
        raise CheckpointError(
            "no name brings its weights", where=network.name, hint=f"Give --checkpoint FILE: {network.by_hand}."
        )


def _read_imagenet(name: str | None) -> "DataSet":
    from msn_eval.data import read_dataset
    from msn_eval.data.dataset import class_map_sha256
    from msn_eval.data.imagenet_subsets import read_publication

    if name is None:
        raise DataError(
            "ImageNet is missing: the published numbers were measured on it, and no other images give them",
            hint="Pass --data DIR or set $MSN_EVAL_DATA to ImageNet as it is distributed; --dry-run says what else it takes.",
        )
    data, publication = read_dataset(name), read_publication()
    if class_map_sha256(data.classes) != publication.class_map_sha256 or len(data.val) != publication.val_images:
        raise DataError(
            f"is not ImageNet: {len(data.classes):,} classes and {len(data.val):,} validation images, "
            f"not its own 1,000 and {publication.val_images:,}",
            where=name,
            hint="The published numbers were measured on ImageNet, and no other images give them.",
        )
    return data


def _check_lists(wanted: "Sequence[Reproduction]") -> None:
    from msn_eval.data.imagenet_subsets import read_publication, read_published_list

    for subset in dict.fromkeys(one.subset for one in wanted):
        for entry in read_publication().lists_of(subset):
            read_published_list(entry)


def _measure(wanted: "Sequence[Reproduction]", options: argparse.Namespace, data: "DataSet") -> int:
    from msn_eval.data.subsets import make_subsets
    from msn_eval.results.reproduction import judge

    verdicts: list[tuple[Reproduction, Verdict]] = []
    code = 0
    for one in wanted:
        results, failure = _evaluate(one, options)
        code = code or failure
        draws = len(make_subsets([one.subset], data.train))
        verdicts += [(one, verdict) for verdict in judge(one, results, draws=draws)]
    if options.json:
        print(json.dumps([_as_json(one, verdict) for one, verdict in verdicts], indent=1, allow_nan=False))
    else:
        print("\n" + "\n".join(printable(_verdict_text(one, verdict)) for one, verdict in verdicts))
    judgements = {verdict.judgement for _, verdict in verdicts}
    return code or (_DIFFERS if "differs" in judgements else _NO_VERDICT if judgements != {"reproduced"} else 0)


def _evaluate(one: "Reproduction", options: argparse.Namespace) -> "tuple[list[Result], int]":
    from msn_eval.commands.progress import evaluate_with_progress
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.config.yaml_config import read_config
    from msn_eval.evaluation.evaluate import prepare
    from msn_eval.evaluation.plan import make_plan
    from msn_eval.results.reproduction import request_options

    checkpoint = str(options.checkpoint or one.network.checkpoint)
    given = {
        "checkpoint": [checkpoint],
        "data": options.data or _environment_data(),
        "device": options.device,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "out": options.out,
        "cache": options.cache,
        "no_cache": options.no_cache,
    }
    plan = make_plan(read_config(EvaluationConfig, given=given | request_options(one)))
    ready = prepare(plan, checkpoint)
    if ready.encoder.arch.partition(".")[0] != one.network.arch:
        raise CheckpointError(
            f"is {ready.encoder.arch}, and {one.name} was published for {one.network.arch}",
            where=checkpoint,
            hint="Give the weights of that network, or another NAME.",
        )
    return evaluate_with_progress(plan, prepared={checkpoint: ready})


def _as_json(one: "Reproduction", verdict: "Verdict") -> Mapping[str, object]:
    return {
        "name": one.name,
        "source": one.expected.source,
        "expected": one.expected.value,
        "spread": one.expected.spread,
        "tolerance": one.tolerance,
        **asdict(verdict),
    }


def _verdict_text(one: "Reproduction", verdict: "Verdict") -> str:
    spread = "" if one.expected.spread is None else f" ± {one.expected.spread}"
    params = ", ".join(f"{name} {value:g}" for name, value in verdict.params.items())
    std = "" if verdict.std is None else f" ± {verdict.std:.1f}"
    measured = "–" if verdict.measured is None else f"{verdict.measured:.1f}{std} ({verdict.draws})"
    judgement = verdict.judgement.upper() if verdict.judgement == "differs" else verdict.judgement
    reason = f": {verdict.reason}" if verdict.reason else ""
    return f"{one.name} ({params})  expected {one.expected.value}{spread}  measured {measured}  {judgement}{reason}"
