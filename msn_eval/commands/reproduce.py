"""`msn-eval reproduce NAME|--list`: measures a published number again: expected, measured, tolerance, verdict."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from msn_eval.errors import CheckpointError, DataError, UsageError, format_count, printable

if TYPE_CHECKING:
    from msn_eval.data import DataSet
    from msn_eval.results.record import Result
    from msn_eval.results.reproduction import Reproduction, Verdict

_DIFFERS, _NO_VERDICT = 10, 11
_EVALUATION_OPTIONS = ("device", "batch_size", "workers", "out", "cache", "no_cache")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a published number, or a network for all of its numbers"
    )
    parser.add_argument("--list", action="store_true", help="list every name, what is expected, and what is unknown")
    parser.add_argument("--data", metavar="DIR", help="ImageNet; default $MSN_EVAL_DATA")
    parser.add_argument("--checkpoint", metavar="FILE", help="the network's weights, if you have them in a file")
    parser.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--batch-size", metavar="N", default="auto", help="images per batch, or auto")
    parser.add_argument("--workers", metavar="N", default="auto", help="decoding processes, or auto")
    parser.add_argument("--out", metavar="DIR", default="runs", help="folder of the records; default runs")
    parser.add_argument("--cache", metavar="DIR", help="feature cache; default the user's cache folder")
    parser.add_argument("--no-cache", action="store_true", help="do not cache features")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is missing, and stop")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON on stdout, and nothing else")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the plan, measure, print the verdicts.

    Returns:
        0 where all numbers are reproduced, 10 where a number differs, 11 where there is no verdict.
    """
    from msn_eval.data import DATA_VARIABLE
    from msn_eval.results.reproduction import find_reproductions, list_reproductions

    if options.list:
        print(_list(list_reproductions()))
        return 0
    if options.name is None:
        raise UsageError("no published number is named", hint="See msn-eval reproduce --list.")
    numbers = find_reproductions(options.name)
    options.data = options.data or os.environ.get(DATA_VARIABLE)
    if not options.json:
        print("\n\n".join(_describe_plan(number, options) for number in numbers))
    if options.dry_run:
        return 0
    return _measure(numbers, options, _read_inputs(numbers, options))


def _list(numbers: "Sequence[Reproduction]") -> str:
    rows = [("name", "published", "lambda", "weights", "source")]
    for number in numbers:
        known = "–" if number.probe == "knn" else "unknown"
        strength = f"{number.strength[0]:g}" if number.strength else known
        weights = number.network.checkpoint or "--checkpoint FILE"
        rows.append((number.name, _show_expected(number), strength, weights, number.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _show_expected(number: "Reproduction") -> str:
    return str(number.expected) if number.spread is None else f"{number.expected} ± {number.spread}"


def _describe_plan(number: "Reproduction", options: argparse.Namespace) -> str:
    network = number.network
    probe = "logistic, tap cls, the published lambda is unknown, measured with the default of this package"
    if number.probe == "knn":
        probe = "knn, tap cls-norm, k = 10, 20, 100, 200, T = 0.07"
    elif number.strength is not None:
        probe = f"logistic, tap cls, lambda {number.strength[0]:g} ({number.strength[1]})"
    fields = {
        "network": f"{network.method} {network.printed_arch}, {number.epochs} epochs on ImageNet-1K",
        "weights": _describe_weights(number, options.checkpoint),
        "data": f"ImageNet, 50,000 validation images: {options.data or 'missing (give --data or set $MSN_EVAL_DATA)'}",
        "labelled": _describe_labelled_images(number),
        "probe": probe,
        "computing": "fp32, decoded by pillow",
        "published": f"{_show_expected(number)} ({number.source})",
        "tolerance": "unknown" if number.tolerance is None else f"± {number.tolerance}, the published spread",
    }
    if number.why_no_verdict:
        fields["verdict"] = f"not possible: {number.why_no_verdict}"
    return printable("\n".join([number.name, *(f"  {name:<10} {text}" for name, text in fields.items())]))


def _describe_weights(number: "Reproduction", checkpoint: str | None) -> str:
    from msn_eval.checkpoints.msn_release import MSN_RELEASES, find_weights_folder

    network = number.network
    if checkpoint is not None:
        return f"{checkpoint}, which must be a {network.arch}"
    if network.checkpoint is None:
        return f"missing (give --checkpoint FILE): {network.by_hand}"
    scheme, _, name = network.checkpoint.partition(":")
    if scheme != "msn":
        return f"{network.checkpoint}, from timm's cache or its hub"
    path = find_weights_folder() / MSN_RELEASES[name]
    return f"{network.checkpoint}, {'in' if path.is_file() else 'not yet in'} {path.parent}"


def _describe_labelled_images(number: "Reproduction") -> str:
    from msn_eval.data.imagenet_subsets import find_list, read_publication

    if number.subset == "full":
        return "every training image"
    lists = read_publication().lists_of(number.subset)
    count = sum(find_list(entry) is not None for entry in lists)
    hint = "" if count == len(lists) else " (run msn-eval subsets fetch)"
    return f"{number.subset}, {count} of {format_count(len(lists), 'published list')} found{hint}"


def _read_inputs(numbers: "Sequence[Reproduction]", options: argparse.Namespace) -> "DataSet":
    """Read ImageNet, and check that weights and published lists are available."""
    from msn_eval.data import read_dataset
    from msn_eval.data.dataset import class_map_sha256
    from msn_eval.data.imagenet_subsets import read_publication, read_published_list

    if options.data is None:
        hint = "Pass --data DIR or set $MSN_EVAL_DATA to ImageNet as it is distributed; --dry-run lists what else is needed."
        raise DataError("ImageNet is missing: the published numbers need its images", hint=hint)
    network = numbers[0].network
    if options.checkpoint is None and network.checkpoint is None:
        hint = f"Give --checkpoint FILE: {network.by_hand}."
        raise CheckpointError("its weights have no checkpoint name", where=network.name, hint=hint)
    data, publication = read_dataset(options.data), read_publication()
    if class_map_sha256(data.classes) != publication.class_map_sha256 or len(data.val) != publication.val_images:
        counts = f"{len(data.classes):,} classes and {len(data.val):,} validation images"
        what = f"is not ImageNet: {counts}, instead of 1,000 and {publication.val_images:,}"
        hint = "The published numbers were measured on ImageNet; different images do not reproduce them."
        raise DataError(what, where=options.data, hint=hint)
    for subset in dict.fromkeys(number.subset for number in numbers):
        for entry in publication.lists_of(subset):
            read_published_list(entry)
    return data


def _measure(numbers: "Sequence[Reproduction]", options: argparse.Namespace, data: "DataSet") -> int:
    from msn_eval.data.subsets import make_subsets
    from msn_eval.results.reproduction import judge

    verdicts: list[tuple[Reproduction, Verdict]] = []
    code = 0
    for number in numbers:
        results, failure = _evaluate(number, options)
        code = code or failure
        draws = len(make_subsets([number.subset], data.train))
        verdicts += [(number, verdict) for verdict in judge(number, results, draws=draws)]
    if options.json:
        print(json.dumps([_to_json(*pair) for pair in verdicts], indent=1, allow_nan=False))
    else:
        print("\n" + "\n".join(printable(_describe_verdict(*pair)) for pair in verdicts))
    judgements = {verdict.judgement for _, verdict in verdicts}
    return code or (_DIFFERS if "differs" in judgements else _NO_VERDICT if judgements != {"reproduced"} else 0)


def _evaluate(number: "Reproduction", options: argparse.Namespace) -> "tuple[list[Result], int]":
    from msn_eval.commands.progress import evaluate_with_progress
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.config.yaml_config import read_config
    from msn_eval.evaluation.evaluate import prepare
    from msn_eval.evaluation.plan import make_plan
    from msn_eval.results.reproduction import request_options

    checkpoint = str(options.checkpoint or number.network.checkpoint)
    given = {name: getattr(options, name) for name in _EVALUATION_OPTIONS}
    given |= {"checkpoint": [checkpoint], "data": options.data, **request_options(number)}
    plan = make_plan(read_config(EvaluationConfig, given=given))
    prepared = prepare(plan, checkpoint)
    if prepared.encoder.arch.partition(".")[0] != number.network.arch:
        what = f"is {prepared.encoder.arch}, and {number.name} was published for {number.network.arch}"
        raise CheckpointError(what, where=checkpoint, hint="Give the weights of that network, or another NAME.")
    return evaluate_with_progress(plan, prepared={checkpoint: prepared})[:2]


def _to_json(number: "Reproduction", verdict: "Verdict") -> Mapping[str, object]:
    fields = ("name", "source", "expected", "spread", "tolerance")
    return {name: getattr(number, name) for name in fields} | asdict(verdict)


def _describe_verdict(number: "Reproduction", verdict: "Verdict") -> str:
    params = ", ".join(f"{name} {value:g}" for name, value in verdict.params.items())
    std = "" if verdict.std is None else f" ± {verdict.std:.1f}"
    measured = "–" if verdict.measured is None else f"{verdict.measured:.1f}{std} ({verdict.draws})"
    judgement = verdict.judgement.upper() if verdict.judgement == "differs" else verdict.judgement
    reason = f": {verdict.reason}" if verdict.reason else ""
    return f"{number.name} ({params})  expected {_show_expected(number)}  measured {measured}  {judgement}{reason}"
