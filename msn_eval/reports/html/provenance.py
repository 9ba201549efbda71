"""Provenance: the command that makes a record again, and many records packed into one page without losing a digit."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from msn_eval.config.recipes import recipe_of
from msn_eval.errors import printable
from msn_eval.results.record import SCHEMA, Result
from msn_eval.results.statistics import wilson_interval

_DECIMALS = 4  # of seconds in records
_OWN_OF_PROBE = ("certificate", "objective", "iterations", "chosen")
_PASS_SECONDS = ("extract", "images_per_second", "decode_share", "encode_share")
_PARTS = ("asked", "who", "how", "pass", "split", "created", "chosen")
_OPTIONS = {"lambda": "--lambda", "k": "--k", "temperature": "--temperature"}
_SECTIONS = ("linear", "linear-augmented")  # of a config, called as their probe is, with its settings as keys


def command_of(result: Result) -> str:
    """Give the shell command that makes a record again; its data set is called by the name that the record knows."""
    return " ".join(_command(result).values())


def _command(result: Result) -> dict[str, str]:
    """Give the parts of the command that go with the parts of a packed record, in the order in which they are joined."""
    checkpoint, subset = result.checkpoint, result.split.subset
    who = ["msn-eval", "--checkpoint", checkpoint.path]
    who += [] if checkpoint.key is None else ["--checkpoint-key", checkpoint.key]
    who += [word for pattern in checkpoint.allow_missing for word in ("--allow-missing", pattern)]
    how = ["--precision", result.features.precision, "--seed", str(result.environment.seed)]
    asked = ["--data", result.data.name, "--probe", result.probe.name]
    for name, option in _OPTIONS.items():
        asked += [option, repr(result.probe.params[name])] if name in result.probe.params else []
    if result.probe.name in _SECTIONS:
        section = result.probe.name.replace("-", "_")
        asked += [f"{section}.{name}={_written(value)}" for name, value in result.probe.params.items()]
    if result.probe.name == "finetune":
        asked += [f"finetune.{name}={value!r}" for name, value in recipe_of(result.probe.params).differing.items()]
    asked += ["--lambda", "auto"] if "auto" in result.probe.params else []
    protocol, by_hand = result.protocol, result.protocol.get("by_hand")
    for name, value in sorted(by_hand.items()) if isinstance(by_hand, Mapping) else ():
        asked += [] if name == "seed" else [f"--{name.replace('_', '-')}", str(value)]  # which stands in any command
    asked += [] if protocol.get("limit") is None else ["--limit", str(protocol["limit"])]
    asked += [] if protocol.get("skipped") is None else ["--on-bad-image", "skip"]
    split = ["--subset", f"{subset}@{result.split.draw}" if _has_draws(result) else subset]
    parts = {"who": who, "how": how, "asked": asked, "split": split}
    return {name: shlex.join(map(printable, words)) for name, words in parts.items()}


def _written(value: float | str) -> str:
    """Give a setting as a command line has it: a number with all its digits, a text as it is."""
    return value if isinstance(value, str) else repr(value)


def _has_draws(result: Result) -> bool:
    """Tell a subset by name from a list file, which is a single draw."""
    of = result.protocol.get("subset")
    return not (isinstance(of, Mapping) and str(of.get("rule")).startswith("list:"))


def pack_records(results: Iterable[Result]) -> dict[str, Any]:
    """Give records as a JSON value in which what many share stands once; the page's script gives each back whole.

    asked, who, how, pass, split, created, chosen: the distinct values of seven parts of a record
    commands: the parts of the commands that go with `who`, `how`, `asked` and `split`
    records:  for each its places in the seven, its id, and the numbers that are its own
    """
    places: dict[str, dict[object, int]] = {name: {} for name in _PARTS}
    values: dict[str, list[Any]] = {name: [] for name in _PARTS}
    commands: dict[str, list[str]] = {name: [] for name in ("who", "how", "asked", "split")}
    records = []
    for result in results:
        at = []
        for name, key in _keys(result).items():
            if key not in places[name]:
                places[name][key] = len(values[name])
                values[name].append(_part(result, name))
                if name in commands:
                    commands[name].append(_command(result)[name])
            at.append(places[name][key])
        records.append([*at, *_own(result)])
    return {**values, "commands": commands, "records": records}


def _keys(result: Result) -> dict[str, object]:
    """Give what each shared part of a record is known by: equal keys, equal parts."""
    probe, seconds = result.probe, result.timing_s
    fit = (probe.name, probe.version, repr(probe.params), probe.solver, probe.converged)
    n = None if result.metrics is None else result.metrics.n
    return {
        "asked": (result.status, result.error, result.protocol_id, result.data, fit, n),
        "who": result.checkpoint,
        "how": (result.features, result.environment),
        "pass": tuple(getattr(seconds, name) for name in _PASS_SECONDS),
        "split": (result.split, _has_draws(result)),
        "created": result.created,
        "chosen": repr(probe.chosen),
    }


def _part(result: Result, name: str) -> Any:
    """Give one shared part of a record, its fields as they stand in the file."""
    match name:
        case "asked":
            fit = {name: value for name, value in asdict(result.probe).items() if name not in _OWN_OF_PROBE}
            return {
                "schema": SCHEMA,
                "status": result.status,
                "error": result.error,
                "protocol_id": result.protocol_id,
                "protocol": result.protocol,
                "data": asdict(result.data),
                "probe": fit,
                "n": result.metrics and result.metrics.n,
            }
        case "who":
            return asdict(result.checkpoint)
        case "how":
            return {"features": asdict(result.features), "environment": asdict(result.environment)}
        case "pass":
            return {name: getattr(result.timing_s, name) for name in _PASS_SECONDS}
        case "split":
            return asdict(result.split)
        case "created":
            return result.created
        case _:
            return None if result.probe.chosen is None else dict(result.probe.chosen)


def _own(result: Result) -> list[Any]:
    """Give the values that no other record shares."""
    probe, metrics, seconds = result.probe, result.metrics, result.timing_s
    own: list[Any] = [printable(result.id), probe.certificate, probe.objective, probe.iterations, seconds.probe]
    own.append(None if round(seconds.extract + seconds.probe, _DECIMALS) == seconds.total else seconds.total)
    own.append(True if result.predictions == f"{result.id}.npz" else result.predictions)
    if metrics is not None:
        right = _count(metrics.top1, metrics.n)
        own += [right, _count(metrics.top5, metrics.n)]
        if isinstance(right, list) or wilson_interval(right, metrics.n) != metrics.top1_ci95:
            own += metrics.top1_ci95  # otherwise the script computes the very same floats
    return own


def _count(share: float, n: int) -> int | list[float]:
    """Give the number of images that a share stands for where dividing gives the very same float, else the share itself."""
    count = round(share * n)
    return count if count / n == share else [share]
