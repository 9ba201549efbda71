"""`msn-eval ls checkpoints|subsets|probes|datasets|protocols`: what there is to choose from."""

import argparse
from collections.abc import Sequence
from itertools import product

_KINDS = ("checkpoints", "subsets", "probes", "datasets", "protocols")
_MANY_IMAGES = 1_000_000  # as many as every default hyper-parameter can be used with
_SUBSETS = {
    "1img": "1 labelled image a class, three draws",
    "2imgs": "2 labelled images a class, three draws",
    "5imgs": "5 labelled images a class, three draws",
    "1pct": "1 % of each class, rounded up; on ImageNet the published list, else three draws",
    "10pct": "10 % of each class, rounded up, three draws",
    "full": "every training image",
    "low-shot": "1img, 2imgs, 5imgs and 1pct",
    "FILE": "a list of your own, one CLASS/FILE or file name a line",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("kind", choices=_KINDS, help="which of them")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print names and what they mean, tab between."""
    for name, what in _entries(options.kind).items():
        print(f"{name}\t{what}")
    return 0


def _entries(kind: str) -> dict[str, str]:
    match kind:
        case "checkpoints":
            from msn_eval.checkpoints import read_schemes

            return {name: entry.summary for name, entry in read_schemes().items()}
        case "subsets":
            return _SUBSETS
        case "datasets":
            from msn_eval.data import list_datasets

            return list_datasets()
        case "probes":
            from msn_eval.probes import read_probes

            return {name: entry.summary for name, entry in read_probes().items()}
        case _:
            return _protocols()


def _protocols() -> dict[str, str]:
    from msn_eval.config.request import AUTO, EvaluationConfig
    from msn_eval.data.subsets import LOW_SHOT, Subset
    from msn_eval.evaluation.plan import configure_probes
    from msn_eval.probes import read_probes

    described = {}
    asked = EvaluationConfig(probe=list(read_probes())), EvaluationConfig(probe=["logistic"], lambda_=[AUTO])
    for name, config in product(LOW_SHOT, asked):
        for probe, _ in configure_probes(config, Subset(name=name, draw=1, rule="", image_ids=("",))):
            values: dict[str, dict[str, None]] = {}
            for params in probe.configs(_MANY_IMAGES):
                for key, value in params.items():
                    values.setdefault(key, {})[str(value)] = None
            option = " --lambda auto" if config.chooses_strength else ""
            described[f"{probe.name} {name}{option}"] = ", ".join(
                [f"version {probe.version}", f"tap {','.join(probe.taps)}"]
                + [f"{key}={','.join(several)}" for key, several in values.items()]
            )
    return described
