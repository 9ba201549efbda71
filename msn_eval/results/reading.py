"""Reading: how weights became features. It belongs to the checkpoint and not to the protocol, so equal weights must share it."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from msn_eval.files.json_records import canonical_json
from msn_eval.results.record import CheckpointInfo, FeatureInfo, Result, flatten_fields, omit_unset

Reading = Mapping[str, object]


def describe_reading(result: Result) -> Reading:
    """Return how the weights of a result were read."""
    return make_reading(result.checkpoint, result.features)


def make_reading(checkpoint: CheckpointInfo, features: FeatureInfo) -> Reading:
    """Return how the weights of a checkpoint are read for these features: network, tap and transform."""
    return {
        "architecture": checkpoint.arch,
        "structure": checkpoint.structure_sha256,
        "tap": features.tap,
        "transform": describe_transform(features),
    }


def describe_transform(features: FeatureInfo) -> dict[str, object]:
    """Return the transform as JSON has it, without what states its mean and std."""
    transform: dict[str, object] = json.loads(canonical_json(asdict(features.transform, dict_factory=omit_unset)))
    transform.pop("mean_std_from", None)
    return transform


def list_reading_differences(first: Reading, second: Reading) -> list[str]:
    """Return what differs in how the same weights were read, such as `transform.mean: [0.5, 0.5, 0.5] -> [0, 0, 0]`.

    Architectures are compared as networks where both are known, and otherwise by name. What an older record does not state is
    not compared.
    """
    a, b = flatten_fields(first), flatten_fields(second)
    structures = a.pop("structure", None), b.pop("structure", None)
    same_network = structures[0] is not None and structures[0] == structures[1]
    names = [name for name in a if name in b and a[name] is not None and b[name] is not None and a[name] != b[name]]
    return [f"{name}: {a[name]} -> {b[name]}" for name in names if not (same_network and name == "architecture")]
