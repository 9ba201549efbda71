"""Statistics of the features of a run's snapshots.

eval/step-00000120.3f9a2c1d.json    one file per snapshot and set of images, beside the records, whose names differ
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from msn_eval.features.collapse import effective_rank, is_collapsed, measure_spectrum, spread
from msn_eval.files.atomic import write_atomically
from msn_eval.files.json_records import add_seal, parse_json, read_fields, remove_seal
from msn_eval.probes.base import describe_collapse

_SCHEMA = 2  # sealed; files of schema 1 are read as they are
_NAME = re.compile(r"step-\d{8,}\.[0-9a-f]{8}\.json")
_DIGEST_LENGTH = 8


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How features were made; only those made in the same way are comparable.

    Attributes:
        data_sha256: Of the validation images by content.
        tap: Which vector is the feature.
        precision: `exact` or `reduced`.
    """

    data_sha256: str
    tap: str
    precision: str


@dataclass(frozen=True, kw_only=True)
class SnapshotFeatures:
    """Statistics of the features of one snapshot.

    Attributes:
        step: Finished steps.
        epoch: Finished epochs.
        created: When the snapshot was made.
        sha256: Of the encoder's file.
        weights_sha256: Of the encoder's weights.
        seen: How the features were made.
        images: Number of validation images.
        feature_rank: RankMe, 1 to min(images, width); None if features are not finite.
        feature_spread: 0 if all images have the same direction, near 1 if directions are random.
        problem: Why they are degenerate, or empty.
        feature_alpha: Exponent of the eigenspectrum. None likewise, with few eigenvalues, and in older files.
    """

    step: int
    epoch: int
    created: str
    sha256: str
    weights_sha256: str
    seen: ExtractionSettings
    images: int
    feature_rank: float | None
    feature_spread: float | None
    problem: str
    feature_alpha: float | None = None


def measure_features(features: Tensor) -> tuple[float, float, str, float | None]:
    """Return rank, spread, problem and alpha, as in SnapshotFeatures, of finite (n, d) features."""
    rank, feature_spread = effective_rank(features), spread(features)
    problem = describe_collapse(features)
    if not problem and is_collapsed({"feature_rank": rank, "feature_spread": feature_spread}):
        problem = f"all images look alike: rank {rank:.3g}, spread {feature_spread:.2g}"
    return round(rank, 4), round(feature_spread, 6), problem, measure_spectrum(features).alpha


def write_snapshot_features(folder: Path, snapshot: SnapshotFeatures) -> None:
    """Write the statistics; step, weights and images determine the file name. Raises StoreError on a full or failing disk."""
    identity = json.dumps([snapshot.weights_sha256, asdict(snapshot.seen)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:_DIGEST_LENGTH]
    text = json.dumps(add_seal({"schema": _SCHEMA, **asdict(snapshot)}), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / f"step-{snapshot.step:08d}.{digest}.json", text.encode())


def read_snapshot_features(folder: Path) -> tuple[list[SnapshotFeatures], list[str]]:
    """Return the statistics in a folder, by step, and a description of each file that cannot be read."""
    snapshots, faults = [], []
    for path in sorted(folder.glob("step-*.json")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            content = parse_json(path.read_bytes())
            if content["schema"] != 1:
                content = remove_seal(content)
            if content.pop("schema") not in (1, _SCHEMA):
                raise ValueError("unknown schema")
            snapshots.append(read_fields(SnapshotFeatures, content))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            faults.append(f"{path.name}: {error}")
    return sorted(snapshots, key=lambda snapshot: snapshot.step), faults


def select_newest(snapshots: Iterable[SnapshotFeatures], settings: ExtractionSettings) -> dict[int, SnapshotFeatures]:
    """Return the newest statistics of each step with these settings: a run may have passed a step twice."""
    matches = [snapshot for snapshot in snapshots if snapshot.seen == settings]
    return {snapshot.step: snapshot for snapshot in sorted(matches, key=lambda match: (match.step, match.created))}
