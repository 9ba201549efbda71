"""Look: what the features of one snapshot of a run are like, besides what probes make of them.

eval/step-00000120.3f9a2c1d.json    one file a snapshot and set of images, beside the records; its name is no record's
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from msn_eval.features.collapse import effective_rank, is_collapsed, spread
from msn_eval.features.extraction import Features
from msn_eval.files.atomic import write_atomically
from msn_eval.files.json_records import parse_json, read_fields
from msn_eval.probes.base import describe_collapse

_SCHEMA = 1
_NAME = re.compile(r"step-\d{8,}\.[0-9a-f]{8}\.json")
_ADDRESS_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How features were made that are looked at; looks at others are not to be compared.

    data_sha256: of the validation images by content
    """

    data_sha256: str
    tap: str
    precision: str


@dataclass(frozen=True, kw_only=True)
class SnapshotFeatures:
    """What the features of one snapshot are like.

    step, epoch:    that were finished
    sha256:         of the encoder's file
    feature_rank:   RankMe, 1 to min(images, width); None where features are not finite
    feature_spread: 0 where all images have the same direction, near 1 where directions are random
    problem:        what is degenerate about them, or empty
    """

    step: int
    epoch: int
    created: str
    sha256: str
    weights_sha256: str
    seen: Seen
    images: int
    feature_rank: float | None
    feature_spread: float | None
    problem: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a run a snapshot stands, and which it is; the fields are those of Look."""

    step: int
    epoch: int
    created: str
    sha256: str
    weights_sha256: str
    seen: Seen


def look_at(features: Features, place: Place) -> SnapshotFeatures:
    """Measure the features of a snapshot, which are finite."""
    rank, width = effective_rank(features.values), spread(features.values)
    problem = describe_collapse(features.values)
    if not problem and is_collapsed({"feature_rank": rank, "feature_spread": width}):
        problem = f"all images look alike: rank {rank:.3g}, spread {width:.2g}"
    return SnapshotFeatures(
        **vars(place),
        images=len(features.values),
        feature_rank=round(rank, 4),
        feature_spread=round(width, 6),
        problem=problem,
    )


def write_snapshot_features(folder: Path, look: SnapshotFeatures) -> None:
    """Write a look under a name that its step, weights and images shape. Raises StoreError where the disk refuses."""
    shaped = json.dumps([look.weights_sha256, asdict(look.seen)], sort_keys=True)
    address = hashlib.sha256(shaped.encode()).hexdigest()[:_ADDRESS_DIGITS]
    content = {"schema": _SCHEMA, **asdict(look)}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / f"step-{look.step:08d}.{address}.json", text.encode())


def read_snapshot_features(folder: Path) -> tuple[list[SnapshotFeatures], list[str]]:
    """Read every look in a folder, by step; give them, and what is wrong with those that cannot be read."""
    found, faults = [], []
    for path in sorted(folder.glob("step-*.json")) if folder.is_dir() else []:
        if not _NAME.fullmatch(path.name):
            continue
        try:
            content = parse_json(path.read_bytes())
            if content.pop("schema") != _SCHEMA:
                raise ValueError("it is of another schema")
            found.append(read_fields(SnapshotFeatures, content))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            faults.append(f"{path.name}: {error}")
    return sorted(found, key=lambda look: look.step), faults


def newest_of_each_step(looks: Iterable[SnapshotFeatures], seen: Seen) -> dict[int, SnapshotFeatures]:
    """Give the looks at features made one way, of each step the newest: a run may have gone through it twice."""
    alike = [look for look in looks if look.seen == seen]
    return {look.step: look for look in sorted(alike, key=lambda look: (look.step, look.created))}
