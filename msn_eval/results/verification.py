"""Verification: recompute every metric from the stored predictions, and every id and hash that follows from a record."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from msn_eval.errors import StoreError
from msn_eval.results.folder import scan_results
from msn_eval.results.predictions import list_prediction_faults
from msn_eval.results.record import (
    PROTOCOL_VERSION,
    RESIZED_PROTOCOL_VERSION,
    Predictions,
    Result,
    read_predictions,
    result_id,
)

_READERS = 4  # prediction files that are unpacked at a time
_MAX_GAP = 1e-3  # relative duality gap above which a fit has not converged
_SHA256 = re.compile("[0-9a-f]{64}")
# By what records have in common: the first record, and its hash.
_FirstSeen = dict[tuple[object, ...], tuple[Path, str]]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The outcome of a verification.

    Attributes:
        records: Number of records, readable or not.
        images: Number of stored predictions from which metrics were recomputed.
        faults: Every fault. Each names its file.
        leftovers: Prediction files without a record. A killed run leaves them, and a rerun overwrites them.
    """

    records: int
    images: int
    faults: tuple[StoreError, ...]
    leftovers: tuple[Path, ...]


def verify_results(folders: Iterable[str | Path]) -> Verification:
    """Recompute what can be recomputed of every record in some folders. One fault hides no other.

    Raises:
        UsageError: A folder does not exist or holds no records.
    """
    first_seen: _FirstSeen = {}
    faults: list[StoreError] = []
    leftovers: list[Path] = []
    records = images = 0
    for folder in map(Path, folders):
        scan = scan_results([folder])  # one at a time: a record that is in two folders is checked in both
        faults += scan.faults
        records += len(scan.results) + len(scan.faults)
        with ThreadPoolExecutor(_READERS) as readers:
            all_predictions = readers.map(_read_predictions, scan.results, scan.paths)
            for result, path, predictions in zip(scan.results, scan.paths, all_predictions, strict=True):
                images += len(predictions.label) if isinstance(predictions, Predictions) else 0
                texts = _list_faults(result, path, predictions, first_seen)
                faults += [StoreError(text, where=str(path)) for text in texts]
        paths = {*scan.paths, *(Path(fault.where) for fault in scan.faults)}
        leftovers += sorted(set(folder.glob("*.npz")) - {path.with_suffix(".npz") for path in paths})
    return Verification(records=records, images=images, faults=tuple(faults), leftovers=tuple(leftovers))


def _read_predictions(result: Result, path: Path) -> Predictions | str | None:
    """Return the predictions of a record, what is wrong with their file, or None for a failed record."""
    if result.predictions is None:
        return None
    try:
        return read_predictions(path.with_name(result.predictions), sha256=result.predictions_sha256)
    except StoreError as error:
        return f"predictions: {error.what}"


def _list_faults(
    result: Result, path: Path, predictions: Predictions | str | None, first_seen: _FirstSeen
) -> Iterator[str]:
    yield from _list_record_faults(result)
    yield from _list_protocol_faults(result)
    split = ("split", result.protocol_id, result.split.draw)
    first, digest = first_seen.setdefault(split, (path, result.split.sha256))
    if digest != result.split.sha256:
        yield f"split.sha256: different labelled images than in {first}, of the same protocol and draw"
    if isinstance(predictions, str):
        yield predictions
    elif predictions is not None:
        faults = list_prediction_faults(result, predictions)
        yield from faults or _list_image_faults(result, predictions, path, first_seen)


def _list_record_faults(result: Result) -> Iterator[str]:
    """Yield what contradicts itself in a record. Its protocol_id was already recomputed when it was read."""
    weights, key = result.checkpoint.weights_sha256, result.checkpoint.key
    expected_id = result_id(weights_sha256=weights, key=key, protocol_id=result.protocol_id, draw=result.split.draw)
    if result.id != expected_id:
        yield f"id: recorded {result.id}, computed from weights, key, protocol and draw {expected_id}"
    for section in ("checkpoint", "data", "split"):
        for name, digest in vars(getattr(result, section)).items():
            if name.endswith("sha256") and digest is not None and not _SHA256.fullmatch(digest):
                yield f"{section}.{name}: {digest!r} is not a SHA-256"
    if result.status == "failed":
        return
    if result.predictions is None:
        yield "predictions: none are named, so the metrics cannot be recomputed"
    gap, converged = result.probe.certificate, result.probe.converged
    if (result.status == "not_converged") != (converged is False):
        yield f"status: {result.status}, although probe.converged is {converged}"
    if gap is not None and converged is not None and converged != (gap <= _MAX_GAP):
        yield f"probe.certificate: {gap:g}, although probe.converged is {converged}"


def _list_protocol_faults(result: Result) -> Iterator[str]:
    """Yield where the record and its protocol differ."""
    protocol = result.protocol
    if protocol.get("version") not in (PROTOCOL_VERSION, RESIZED_PROTOCOL_VERSION):
        return  # protocols of another version may have different fields
    expected = {
        "data": {"sha256": result.data.sha256, "class_map_sha256": result.data.class_map_sha256},
        "precision": "exact" if result.features.precision == "fp32" else "reduced",
        "probe": {"name": result.probe.name, "version": result.probe.version, "params": dict(result.probe.params)},
    }
    for name, value in expected.items():
        if protocol.get(name) != value:
            yield f"{name}: the record states {value}, its protocol {protocol.get(name)}"
    subset = protocol.get("subset")
    if not isinstance(subset, dict) or subset.get("name") != result.split.subset:
        yield f"split.subset: the record states {result.split.subset!r}, its protocol {subset}"
    if (protocol.get("skipped") is None) != (result.data.skipped == 0):
        yield f"data.skipped: the record states {result.data.skipped}, its protocol {protocol.get('skipped')}"


def _list_image_faults(result: Result, predictions: Predictions, path: Path, first_seen: _FirstSeen) -> Iterator[str]:
    renamed = {name: result.protocol[name] for name in ("class_map", "labels") if name in result.protocol}
    data = ("images", result.data.sha256, result.data.class_map_sha256, str(renamed))
    content = b"\n".join(predictions.image.tolist()) + predictions.label.astype("<i8").tobytes()
    own_digest = hashlib.sha256(content).hexdigest()
    first, digest = first_seen.setdefault(data, (path, own_digest))
    if digest != own_digest:
        yield f"predictions: different images or labels than in {first}, of the same data.sha256"
    elif first == path and not renamed and not _has_class_map(result, predictions):
        yield "data.class_map_sha256: does not match the class names in the image ids"


def _has_class_map(result: Result, predictions: Predictions) -> bool:
    """Whether the names in `CLASS/FILE` can be the class map. True where a class has no image, so that it is unknown."""
    images, labels = predictions.image.tolist(), predictions.label.tolist()
    if len(set(labels)) != result.data.classes:
        return True
    for split in (bytes.rpartition, bytes.partition):  # a class, or a file, may have a slash in its name
        classes = [split(image, b"/")[0] for image in images]
        names = dict(zip(labels, classes, strict=True))
        lines = b"".join(names[label] + b"\n" for label in sorted(names))
        if hashlib.sha256(lines).hexdigest() == result.data.class_map_sha256:
            return all(names[label] == name for label, name in zip(labels, classes, strict=True))
    return False
