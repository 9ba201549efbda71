"""Provenance: the command that reproduces a record, and records packed into one page without losing a digit."""

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from msn_eval.config.recipes import read_finetune_recipe
from msn_eval.errors import printable
from msn_eval.results.record import SCHEMA, Result, omit_unset
from msn_eval.results.statistics import wilson_interval

_DECIMALS = 4  # of seconds in records
_PROBE_OWN = ("certificate", "objective", "iterations", "chosen")  # differ from record to record
_CALIBRATION = ("nll", "brier", "ece")
_SPECTRUM = ("rankme", "alpha", "spectrum_images")
_EXTRACTION = ("extract", "images_per_second", "decode_share", "encode_share")
_OPTIONS = {"lambda": "--lambda", "k": "--k", "temperature": "--temperature"}
_SECTIONS = ("linear", "linear-augmented")  # sections of a config that have the settings of the probe as keys


def format_command(result: Result) -> str:
    """Return the shell command that reproduces a record; it has the data set's name, not its path."""
    return " ".join(_command_parts(result).values())


def _command_parts(result: Result) -> dict[str, str]:
    """Return the command in four parts, each of which belongs to a shared part of `pack_records`."""
    checkpoint, subset, probe, protocol = result.checkpoint, result.split.subset, result.probe, result.protocol
    program = ["msn-eval", "--checkpoint", checkpoint.path]
    program += [] if checkpoint.key is None else ["--checkpoint-key", checkpoint.key]
    program += [argument for pattern in checkpoint.allow_missing for argument in ("--allow-missing", pattern)]
    setup = ["--precision", result.features.precision, "--seed", str(result.environment.seed)]
    measurement = ["--data", result.data.trained_on or result.data.name, "--probe", probe.name]
    if result.data.trained_on is not None:
        measurement += ["--test", "real:real.json" if "labels" in protocol else result.data.name]
        measurement += ["--class-map", "FILE"] if "class_map" in protocol else []
    for name, option in _OPTIONS.items():
        measurement += [option, repr(probe.params[name])] if name in probe.params else []
    if probe.name in _SECTIONS:
        section = probe.name.replace("-", "_")
        # Numbers with all their digits.
        measurement += [
            f"{section}.{name}={value if isinstance(value, str) else repr(value)}"
            for name, value in probe.params.items()
        ]
    if probe.name == "finetune":
        settings = read_finetune_recipe(probe.params).differing
        measurement += [f"finetune.{name}={value!r}" for name, value in settings.items()]
    measurement += ["--lambda", "auto"] if "auto" in probe.params else []
    by_hand = protocol.get("by_hand")
    for name, value in sorted(by_hand.items()) if isinstance(by_hand, Mapping) else ():
        if name != "seed":  # which is in every command
            measurement += [f"--{name.replace('_', '-')}", str(value)]
    measurement += [] if protocol.get("limit") is None else ["--limit", str(protocol["limit"])]
    measurement += [] if protocol.get("skipped") is None else ["--on-bad-image", "skip"]
    split = ["--subset", f"{subset}@{result.split.draw}" if _has_draws(result) else subset]
    parts = {"checkpoint": program, "setup": setup, "measurement": measurement, "split": split}
    return {name: shlex.join(map(printable, arguments)) for name, arguments in parts.items()}


def _has_draws(result: Result) -> bool:
    """Whether the subset is a named one; a list file has a single draw."""
    subset = result.protocol.get("subset")
    return not (isinstance(subset, Mapping) and str(subset.get("rule")).startswith("list:"))


def pack_records(results: Iterable[Result]) -> dict[str, Any]:
    """Return records as a JSON value without repetition; the page's script restores each of them exactly.

    It leaves out `predictions_sha256` and `seal`, which protect the files and would double the records in the page.

    Returns:
        measurement, checkpoint, setup, extraction, split, created, chosen: The distinct values of seven parts of a record.
        commands: The parts of the commands that belong to the values of `checkpoint`, `setup`, `measurement` and `split`.
        records: For each record its indices into the seven, its id, and the numbers that only it has.
    """
    names = ("measurement", "checkpoint", "setup", "extraction", "split", "created", "chosen")
    indices: dict[str, dict[object, int]] = {name: {} for name in names}
    values: dict[str, list[Any]] = {name: [] for name in names}
    commands: dict[str, list[str]] = {"checkpoint": [], "setup": [], "measurement": [], "split": []}
    records = []
    for result in results:
        record = []
        for name, (key, make_value) in _shared_parts(result).items():
            known = indices[name]
            if key not in known:
                known[key] = len(known)
                values[name].append(make_value())
                if name in commands:
                    commands[name].append(_command_parts(result)[name])
            record.append(known[key])
        records.append([*record, *_own_values(result)])
    return {**values, "commands": commands, "records": records}


def _shared_parts(result: Result) -> dict[str, tuple[object, Callable[[], Any]]]:
    """Return a key of each part that records share, and a function that makes its JSON value; equal keys, equal values."""
    probe = result.probe
    n = None if result.metrics is None else result.metrics.n
    fit = (probe.name, probe.version, repr(probe.params), probe.solver, probe.converged)
    extraction = tuple(getattr(result.timing_s, name) for name in _EXTRACTION)
    spectrum = tuple(getattr(result.features, name) for name in _SPECTRUM)
    features = replace(result.features, rankme=None, alpha=None, spectrum_images=None)  # shared by checkpoints

    def measurement() -> dict[str, Any]:
        own_probe = {name: value for name, value in asdict(probe).items() if name not in _PROBE_OWN}
        fields = {name: getattr(result, name) for name in ("status", "error", "protocol_id", "protocol")}
        return {
            "schema": SCHEMA,
            **fields,
            "data": asdict(result.data, dict_factory=omit_unset),
            "probe": own_probe,
            "n": n,
        }

    return {
        "measurement": ((result.status, result.error, result.protocol_id, result.data, fit, n), measurement),
        "checkpoint": (result.checkpoint, lambda: asdict(result.checkpoint, dict_factory=omit_unset)),
        "setup": (
            (features, result.environment),
            lambda: {
                "features": asdict(features, dict_factory=omit_unset),
                "environment": asdict(result.environment, dict_factory=omit_unset),
            },
        ),
        "extraction": (
            (extraction, spectrum),
            lambda: {
                **dict(zip(_EXTRACTION, extraction, strict=True)),
                "spectrum": {} if spectrum[-1] is None else dict(zip(_SPECTRUM, spectrum, strict=True)),
            },
        ),
        "split": ((result.split, _has_draws(result)), lambda: asdict(result.split)),
        "created": (result.created, lambda: result.created),
        "chosen": (repr(probe.chosen), lambda: None if probe.chosen is None else dict(probe.chosen)),
    }


def _own_values(result: Result) -> list[Any]:
    """Return the values that no other record shares."""
    probe, metrics, seconds = result.probe, result.metrics, result.timing_s
    own: list[Any] = [printable(result.id), probe.certificate, probe.objective, probe.iterations, seconds.probe]
    own.append(None if round(seconds.extract + seconds.probe, _DECIMALS) == seconds.total else seconds.total)
    own.append(True if result.predictions == f"{result.id}.npz" else result.predictions)
    is_calibrated = metrics is not None and metrics.brier is not None
    own.append([getattr(metrics, name) for name in _CALIBRATION] if is_calibrated else 0)
    if metrics is not None:
        right = _count_right(metrics.top1, metrics.n)
        own += [right, _count_right(metrics.top5, metrics.n)]
        if isinstance(right, list) or wilson_interval(right, metrics.n) != metrics.top1_ci95:
            own += metrics.top1_ci95  # otherwise the script computes the same floats
    return own


def _count_right(fraction: float, n: int) -> int | list[float]:
    """Return the number of correct images if dividing it gives the same float, else the fraction in a list."""
    count = round(fraction * n)
    return count if count / n == fraction else [fraction]
