"""The verbs of `msn-eval`, one module per verb: its options and one call."""

import argparse
from collections.abc import Sequence
from typing import Protocol

VERBS = {
    "evaluate": "evaluate checkpoints (no verb needed)",
    "report": "tables from result folders",
    "compare": "two checkpoints, image by image",
    "baseline": "write the file that `check` holds checkpoints against",
    "check": "the regression gate: is a checkpoint worse than a baseline?",
    "card": "a model card for Hugging Face: metadata and tables",
    "reproduce": "a published protocol: expected, measured, tolerance, verdict",
    "watch": "scores each new snapshot of a pre-training run; curve and collapse alarms",
    "show": "pictures: nearest images under masking, attention maps, class map",
    "verify": "recompute every metric of result folders from the stored predictions, and every hash",
    "inspect": "what is in a checkpoint and what would be used; runs nothing from it",
    "convert": "a checkpoint as plain safetensors, by timm's names, or as a folder for transformers",
    "subsets": "the published ImageNet lists: list, verify, fetch; or draw a subset of any data set",
    "data": "verify a data set: read and decode every image; or draw a val split for class folders",
    "cache": "list, verify or prune what is kept of earlier runs",
    "ls": "list checkpoints, subsets, probes, datasets, reports, protocols or recipes",
    "doctor": "what this machine has, what is missing, and how to get it",
    "completion": "a script that completes commands in bash, zsh or fish",
    "demo": "a complete evaluation on embedded images",
}


class Command(Protocol):
    """What every module of this folder offers."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options of the verb."""

    def run(self, options: argparse.Namespace, overrides: Sequence[str]) -> int:
        """Run the verb and return its exit code."""


def load_command(verb: str) -> Command:
    """Import the module of one of VERBS. The other modules are not imported, so that every verb starts fast."""
    match verb:
        case "evaluate":
            from msn_eval.commands import evaluate

            return evaluate
        case "report":
            from msn_eval.commands import report

            return report
        case "compare":
            from msn_eval.commands import compare

            return compare
        case "baseline":
            from msn_eval.commands import baseline

            return baseline
        case "check":
            from msn_eval.commands import check

            return check
        case "card":
            from msn_eval.commands import card

            return card
        case "reproduce":
            from msn_eval.commands import reproduce

            return reproduce
        case "watch":
            from msn_eval.commands import watch

            return watch
        case "show":
            from msn_eval.commands import show

            return show
        case "verify":
            from msn_eval.commands import verify

            return verify
        case "inspect":
            from msn_eval.commands import inspect

            return inspect
        case "convert":
            from msn_eval.commands import convert

            return convert
        case "subsets":
            from msn_eval.commands import subsets

            return subsets
        case "data":
            from msn_eval.commands import data

            return data
        case "cache":
            from msn_eval.commands import cache

            return cache
        case "ls":
            from msn_eval.commands import ls

            return ls
        case "doctor":
            from msn_eval.commands import doctor

            return doctor
        case "completion":
            from msn_eval.commands import completion

            return completion
        case "demo":
            from msn_eval.commands import demo

            return demo
    raise ValueError(f"no verb {verb!r}")
