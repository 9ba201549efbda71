"""Verification: records against their stored predictions, and every id and hash that follows from what is stored."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import StoreError
from msn_eval.results.folder import scan_results
from msn_eval.results.record import PROTOCOL_VERSION, Predictions, Result, read_predictions, result_id
from msn_eval.results.statistics import measure

_AT_ONCE = 4  # prediction files that are unpacked at a time
_HIGHEST_GAP = 1e-3  # relative duality gap above which a fit has not converged
_SHA256_DIGITS = 64


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with one file."""

    path: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was looked at, and all that is wrong.

    records, images: records, readable or not, and predictions of single images from which their metrics were recomputed
    leftovers:       prediction files without a record: what a killed run leaves, and a rerun overwrites
    """

    records: int
    images: int
    faults: tuple[Fault, ...]
    leftovers: tuple[Path, ...]


@dataclass
class _Common:
    """What records must have in common, by the first record that said it."""

    images: dict[object, tuple[str, str]] = field(default_factory=dict)
    splits: dict[object, tuple[str, str]] = field(default_factory=dict)


def verify_results(folders: Iterable[str | Path]) -> Verification:
    """Recompute what can be recomputed of every record in some folders; one fault hides no other.

    Raises UsageError for a folder that is not there or holds no records.
    """
    common = _Common()
    faults: list[Fault] = []
    leftovers: list[Path] = []
    records = images = 0
    for folder in map(Path, folders):
        scan = scan_results([folder])  # one at a time: a record that stands in two folders is checked in both
        faults += [Fault(path=fault.where, what=fault.what) for fault in scan.faults]
        records += len(scan.results) + len(scan.faults)
        with ThreadPoolExecutor(_AT_ONCE) as readers:
            all_read = readers.map(_read_beside, scan.results, scan.paths)
            for result, path, read in zip(scan.results, scan.paths, all_read, strict=True):
                images += 0 if read is None or isinstance(read, str) else len(read.label)
                faults += [Fault(path=str(path), what=what) for what in _faults_of_one(result, path, read, common)]
        kept = {path.with_suffix(".npz") for path in scan.paths} | {
            Path(one.where).with_suffix(".npz") for one in scan.faults
        }
        leftovers += sorted(set(folder.glob("*.npz")) - kept)
    return Verification(records=records, images=images, faults=tuple(faults), leftovers=tuple(leftovers))


def _faults_of_one(result: Result, path: Path, read: Predictions | str | None, common: _Common) -> Iterator[str]:
    yield from _faults_of_record(result)
    yield from _faults_among(result, path, common)
    if isinstance(read, str):
        yield read
    elif read is not None:
        yield from _faults_of_predictions(result, read, path, common)


def _read_beside(result: Result, path: Path) -> Predictions | str | None:
    """Give the predictions of a record, what is wrong with their file, or None for a failed record."""
    if result.predictions is None:
        return None
    if result.predictions != f"{result.id}.npz":
        return f"its predictions are in {result.predictions!r}, not in the file of its id"
    try:
        return read_predictions(path.with_name(result.predictions))
    except StoreError as error:
        return f"its predictions: {error.what}"


def _faults_of_record(result: Result) -> Iterator[str]:
    """Tell what a record contradicts of itself. Its protocol_id was recomputed when it was read."""
    own_id = result_id(
        weights_sha256=result.checkpoint.weights_sha256,
        key=result.checkpoint.key,
        protocol_id=result.protocol_id,
        draw=result.split.draw,
    )
    if result.id != own_id:
        yield f"id: recorded {result.id}, its weights, key, protocol and draw give {own_id}"
    for name, digest in (
        ("checkpoint.sha256", result.checkpoint.sha256),
        ("checkpoint.weights_sha256", result.checkpoint.weights_sha256),
        ("data.sha256", result.data.sha256),
        ("data.class_map_sha256", result.data.class_map_sha256),
        ("split.sha256", result.split.sha256),
    ):
        if digest is not None and (len(digest) != _SHA256_DIGITS or set(digest) - set("0123456789abcdef")):
            yield f"{name}: {digest!r} is no SHA-256"
    yield from _unequal_to_protocol(result)
    yield from _faults_of_status(result)
    try:
        datetime.strptime(result.created, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        yield f"created: {result.created!r} is no time"


def _unequal_to_protocol(result: Result) -> Iterator[str]:
    """Tell where the record says one thing and its protocol another."""
    protocol = result.protocol
    if protocol.get("version") != PROTOCOL_VERSION:
        return  # another version's protocol may be laid out in another way
    stated = {
        "data": {"sha256": result.data.sha256, "class_map_sha256": result.data.class_map_sha256},
        "precision": "exact" if result.features.precision == "fp32" else "reduced",
        "probe": {
            "name": result.probe.name,
            "version": result.probe.version,
            "params": dict(result.probe.params),
        },
    }
    for name, value in stated.items():
        if protocol.get(name) != value:
            yield f"{name}: the record says {value}, its protocol {protocol.get(name)}"
    subset = protocol.get("subset")
    if not isinstance(subset, dict) or subset.get("name") != result.split.subset:
        yield f"split.subset: the record says {result.split.subset!r}, its protocol {subset}"
    if (protocol.get("skipped") is None) != (result.data.skipped == 0):
        yield f"data.skipped: the record says {result.data.skipped}, its protocol {protocol.get('skipped')}"


def _faults_of_status(result: Result) -> Iterator[str]:
    if result.status == "failed":
        if not result.error:
            yield "error: a failed result that does not say why"
        if result.predictions is not None:
            yield "predictions: a failed result that names some"
        return
    if result.error is not None:
        yield f"error: {result.error!r} on a result that did not fail"
    if result.predictions is None:
        yield "predictions: none are named, so its metrics cannot be recomputed"
    gap, converged = result.probe.certificate, result.probe.converged
    if (result.status == "not_converged") != (converged is False):
        yield f"status: {result.status}, although probe.converged is {converged}"
    if gap is not None and converged is not None and converged != (gap <= _HIGHEST_GAP):
        yield f"probe.certificate: {gap:g}, although probe.converged is {converged}"


def _faults_among(result: Result, path: Path, common: _Common) -> Iterator[str]:
    """Tell where records that would share a column were not measured with the same labelled images."""
    key = (result.protocol_id, result.split.draw)
    first, digest = common.splits.setdefault(key, (str(path), result.split.sha256))
    if digest != result.split.sha256:
        yield f"split.sha256: other labelled images than in {first}, of the same protocol and draw"


def _faults_of_predictions(result: Result, read: Predictions, path: Path, common: _Common) -> list[str]:
    shape = _faults_of_shape(read)
    if shape:
        return shape
    faults = [*_faults_of_ranks(result, read)]
    if result.data.val_images != len(read.label):
        faults.append(f"data.val_images: recorded {result.data.val_images}, {len(read.label)} images are stored")
    if result.metrics is not None:
        again = measure(read.rank_of_label)
        faults += [
            f"metrics.{name}: recorded {recorded}, the predictions give {getattr(again, name)}"
            for name, recorded in vars(result.metrics).items()
            if recorded != getattr(again, name)
        ]
    faults += _faults_of_images(result, read, path, common)
    return faults


def _faults_of_shape(read: Predictions) -> list[str]:
    arrays = vars(read)
    lengths = {name: array.shape for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or read.label.ndim != 1:
        return [f"its predictions: arrays of different lengths, {lengths}"]
    kinds = {name: array.dtype.kind for name, array in arrays.items()}
    if kinds != {"image": "S", "label": "i", "prediction": "i", "rank_of_label": "i"}:
        return [f"its predictions: arrays of other types than these are stored as, {kinds}"]
    return [] if len(read.label) else ["its predictions: no image at all"]


def _faults_of_ranks(result: Result, read: Predictions) -> Iterator[str]:
    classes = result.data.classes
    for name, values, least, most in (
        ("label", read.label, 0, classes - 1),
        ("prediction", read.prediction, 0, classes - 1),
        ("rank_of_label", read.rank_of_label, 1, classes),
    ):
        outside = (values < least) | (values > most)
        if outside.any():
            yield f"its predictions: {name} {values[outside][0]} of {_id(read, outside)} is outside {least} to {most}"
    wrong = (read.rank_of_label == 1) != (read.prediction == read.label)
    if wrong.any():
        yield f"its predictions: the rank and the prediction of {_id(read, wrong)} contradict each other"


def _faults_of_images(result: Result, read: Predictions, path: Path, common: _Common) -> Iterator[str]:
    if len(np.unique(read.image)) != len(read.image):
        yield "its predictions: an image stands there twice"
    key = (result.data.sha256, result.data.class_map_sha256)
    digest = hashlib.sha256(b"\n".join(read.image.tolist()) + read.label.astype("<i8").tobytes()).hexdigest()
    first, known = common.images.setdefault(key, (str(path), digest))
    if known != digest:
        yield f"its predictions: other images or labels than in {first}, of the same data.sha256"
    elif first == str(path) and not _classes_fit(read.image, read.label, result):
        yield "data.class_map_sha256: is not that of the class names in the image ids"


def _classes_fit(image: NDArray[np.bytes_], label: NDArray[np.int64], result: Result) -> bool:
    """Say whether the names in `CLASS/FILE` can be the class map. Where a class has no image there is nothing to say."""
    if len(np.unique(label)) != result.data.classes:
        return True
    for split in (bytes.rpartition, bytes.partition):  # a class, or a file, may have a slash of its own
        names = {int(place): split(one, b"/")[0] for one, place in zip(image.tolist(), label, strict=True)}
        lines = b"".join(names[place] + b"\n" for place in sorted(names))
        if hashlib.sha256(lines).hexdigest() == result.data.class_map_sha256:
            return all(split(one, b"/")[0] == names[int(place)] for one, place in zip(image, label, strict=True))
    return False


def _id(read: Predictions, chosen: NDArray[np.bool_]) -> str:
    return repr(read.image[chosen][0].decode("utf-8", "backslashreplace"))
