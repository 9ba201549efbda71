"""Write what is known of every published number that `msn-eval reproduce` names, the command that measures it, and its verdict.

    python benchmarks/audit.py --out reports/audit.md                            # no data: nothing is measured
    python benchmarks/audit.py --out reports/audit.md --data /datasets/imagenet  # measures what has weights
    python benchmarks/audit.py --out reports/audit.md --data /datasets/imagenet --weights ibot-vits16=FILE

Published lists come from `msn-eval subsets fetch`. Weights are downloaded by the commands that need them, or are given
by `--weights`. Results are kept in the folder `--runs`: a second call measures only what is missing.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from msn_eval.cli import main as msn_eval
from msn_eval.results.reproduction import NETWORKS, Reproduction, list_reproductions

_INTRODUCTION = """# Audit of the published low-shot numbers

Written by `make audit` (with `DATA=FOLDER`, it also measures). Accuracies in percent on ImageNet's 50,000 validation
images. A number can be reproduced or contradicted only if its publication states lambda and the spread over draws.

- {numbers} numbers of {networks} networks: {without_lambda} are published without lambda, {without_spread} without a
  spread, such as all numbers with 1 % of the labels, which have one list.
- {possible} can have a verdict, {judged} have one.
- Known of the logistic numbers, from the authors' released code: images (short side 256, bilinear, centre crop of 224,
  ImageNet's mean and std, no augmentation), the tap (CLS token of the last block, before the final norm), the rows
  (centred and normalised one by one), no intercept, the solver's tolerance of 1e-3, and the lists of labelled images.
  Whether the tables were made by exactly this code is not stated."""
_MEASURED = (0, 10, 11)  # exit codes of `reproduce` that come with verdicts
_HEADER = "| number | published | lambda | known of the protocol | verdict |\n| --- | ---: | ---: | --- | --- |"


def write_audit(*, data: str | None, weights: Mapping[str, str], runs: str) -> str:
    """Return the page.

    Args:
        data: ImageNet; None measures nothing.
        weights: Files of networks, by the network's name.
        runs: Folder of the results.
    """
    numbers = list_reproductions()
    verdicts = {number.name: _measure(number, data=data, weights=weights, runs=runs) for number in numbers}
    introduction = _INTRODUCTION.format(
        numbers=len(numbers),
        networks=len(NETWORKS),
        without_lambda=sum(number.strength is None and number.probe == "logistic" for number in numbers),
        without_spread=sum(number.spread is None for number in numbers),
        possible=sum(not number.why_no_verdict for number in numbers),
        judged=sum(text.startswith(("reproduced", "differs")) for text in verdicts.values()),
    )
    lines = [introduction]
    for network in NETWORKS:
        own = [number for number in numbers if number.network == network]
        where = network.checkpoint or f"`--checkpoint FILE` ({network.by_hand})"
        given = " --checkpoint FILE" if network.checkpoint is None else ""
        lines += [
            "",
            f"## {network.method} {network.printed_arch}, {own[0].epochs} epochs",
            "",
            f"Weights: {where}. `msn-eval reproduce {network.name} --data /datasets/imagenet{given}` measures these:",
            "",
            _HEADER,
        ]
        lines += [_row(number, verdicts[number.name]) for number in own]
    return "\n".join(lines) + "\n"


def _row(number: Reproduction, verdict: str) -> str:
    spread = "" if number.spread is None else f" ± {number.spread}"
    strength = f"{number.strength[0]:g}" if number.strength else "–" if number.probe == "knn" else "unknown"
    known = number.why_no_verdict or "everything that a verdict needs"
    if number.strength is not None:
        known += f"; lambda from {number.strength[1]}"
    cells = (number.name, f"{number.expected}{spread}", strength, f"{known} ({number.source})", verdict)
    return f"| {' | '.join(cells)} |"


def _measure(number: Reproduction, *, data: str | None, weights: Mapping[str, str], runs: str) -> str:
    checkpoint = weights.get(number.network.name, number.network.checkpoint)
    if data is None:
        return "not measured"
    if checkpoint is None:
        return "not measured: no weights"
    arguments = ["reproduce", number.name, "--data", data, "--checkpoint", checkpoint, "--out", runs, "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = msn_eval(arguments)
    if code not in _MEASURED:
        return f"not measured: `msn-eval {' '.join(arguments)}` ends with {code}"
    return "; ".join(_show(verdict) for verdict in json.loads(output.getvalue()))


def _show(verdict: Mapping[str, float | str | None]) -> str:
    measured = "" if verdict["measured"] is None else f" at {verdict['measured']:.1f}"
    return f"{verdict['judgement']}{measured} ({verdict['reason']})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--data", metavar="DIR", help="ImageNet as it is distributed; without it nothing is measured")
    parser.add_argument("--weights", metavar="NETWORK=FILE", action="append", default=[], help="repeatable")
    parser.add_argument("--runs", metavar="DIR", default="runs/audit", help="folder of the results")
    options = parser.parse_args(arguments)
    weights = dict(text.split("=", 1) for text in options.weights)
    options.out.write_text(write_audit(data=options.data, weights=weights, runs=options.runs), encoding="utf-8")


if __name__ == "__main__":
    main()
