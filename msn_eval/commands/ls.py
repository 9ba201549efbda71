"""`msn-eval ls checkpoints|subsets|probes|datasets|reports|protocols|recipes`: what there is to choose from."""

import argparse
from collections.abc import Sequence
from itertools import product

from msn_eval.checkpoints import read_tested_layouts
from msn_eval.errors import UsageError

_KINDS = {
    "checkpoints": "schemes and file formats for --checkpoint",
    "subsets": "for --subset",
    "probes": "for --probe",
    "datasets": "schemes and folder layouts for --data",
    "reports": "formats for report --format",
    "protocols": "each probe's hyper-parameters, by subset",
    "recipes": "config files that ship with the package",
}
_MANY_IMAGES = 1_000_000  # enough for every default hyper-parameter
_SUBSETS = {
    "1img": "1 labelled image per class, three draws",
    "2imgs": "2 labelled images per class, three draws",
    "5imgs": "5 labelled images per class, three draws",
    "Nimgs": "N labelled images per class for any N, three draws",
    "1pct": "1 % of each class, rounded up; on ImageNet the published list, else three draws",
    "Npct": "N % of each class for any N from 1 to 100, rounded up, three draws",
    "full": "every training image",
    "low-shot": "1img, 2imgs, 5imgs and 1pct",
    "FILE": "a list of your own, one CLASS/FILE or file name per line",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("kind", nargs="?", choices=_KINDS, help="what to list; default: what can be listed")
    parser.add_argument(
        "--tested",
        action="store_true",
        help="of checkpoints: the layouts that the test suite compares with their libraries",
    )


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print a line per name: the name, a tab, its summary."""
    if options.tested and options.kind != "checkpoints":
        what = f"--tested is for checkpoints, not for {options.kind or 'all that can be listed'}"
        raise UsageError(what, hint="msn-eval ls checkpoints --tested")
    listed = read_tested_layouts() if options.tested else _list_summaries(options.kind) if options.kind else _KINDS
    for name, summary in listed.items():
        print(f"{name}\t{summary}")
    return 0


def _list_summaries(kind: str) -> dict[str, str]:
    match kind:
        case "checkpoints":
            from msn_eval.checkpoints import read_schemes as read_entries
        case "probes":
            from msn_eval.probes import read_probes as read_entries
        case "reports":
            from msn_eval.reports import list_formats as read_entries
        case "datasets":
            from msn_eval.data import list_datasets

            return list_datasets()
        case "subsets":
            return _SUBSETS
        case "recipes":
            return _list_recipes()
        case _:
            return _list_protocols()
    return {name: entry.summary for name, entry in read_entries().items()}


def _list_recipes() -> dict[str, str]:
    """Return the first line of each shipped YAML file and the command that takes it, by name."""
    from msn_eval.files.package_data import list_recipes

    summaries = {}
    for program, command in (("pretrain", "msn-pretrain"), ("eval", "msn-eval --config")):
        for name, path in list_recipes(program).items():
            with path.open(encoding="utf-8") as lines:
                summaries[name] = f"{next(lines).lstrip('# ').rstrip()} ({command} {name})"
    return summaries


def _list_protocols() -> dict[str, str]:
    from msn_eval.config.request import AUTO, EvaluationConfig
    from msn_eval.data.subsets import LOW_SHOT, Subset
    from msn_eval.evaluation.plan import configure_probes
    from msn_eval.probes import read_probes

    summaries = {}
    configs = EvaluationConfig(probe=list(read_probes())), EvaluationConfig(probe=["logistic"], lambda_=[AUTO])
    for name, config in product(LOW_SHOT, configs):
        for probe, _ in configure_probes(config, Subset(name=name, draw=1, rule="", image_ids=("",))):
            values: dict[str, dict[str, None]] = {}
            for params in probe.configs(_MANY_IMAGES):
                for key, value in params.items():
                    values.setdefault(key, {})[str(value)] = None
            option = " --lambda auto" if config.chooses_strength else ""
            summaries[f"{probe.name} {name}{option}"] = ", ".join(
                [f"version {probe.version}", f"tap {','.join(probe.taps)}"]
                + [f"{key}={','.join(choices)}" for key, choices in values.items()]
            )
    return summaries
