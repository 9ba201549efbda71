"""Snapshot: everything that is needed to go on as if training had never stopped.

Written so that a kill at any instant loses nothing: every file under another name first, synced and renamed, the manifest
with their hashes last; read back and compared before an older one goes. What stands where is told by
msn_eval.checkpoints.run_folder, which also chooses the newest whole one.
"""

import contextlib
import json
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from msn_eval.checkpoints.run_folder import (
    ENCODER,
    MANIFEST,
    SCHEMA,
    STATE,
    SnapshotFiles,
    check_snapshot,
    file_sha256,
    read_manifest,
    snapshot_folder,
    snapshot_folders,
)
from msn_eval.checkpoints.stored import ARCHITECTURE, EPOCH, IMAGE_PIXELS
from msn_eval.errors import CheckpointError, NumericalError, StoreError
from msn_eval.files.atomic import remove, sync_folder, write_atomically, written_atomically

_log = logging.getLogger(__name__)
_GENERATIONS = 2
_SHOWN = 3
_HEADER_AT = 8  # bytes, of a safetensors file; its length stands before it


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run between two steps.

    step, epoch: that are finished
    tensors:     model (target encoder and prototypes among it) and optimiser, by section
    rng:         of every rank, as `generator_states` gives them
    watched:     what alarms remember
    """

    step: int
    epoch: int
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    rng: tuple[Mapping[str, Any], ...]
    watched: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluatedEncoder:
    """The network of a snapshot that is evaluated.

    weights:      by timm's names
    architecture: as `msn-eval --arch` takes it
    image_pixels: side of the images that it was trained on, None where that is not known
    """

    weights: Mapping[str, Tensor]
    architecture: str
    image_pixels: int | None = None


def write_snapshot(
    run: Path, snapshot: Snapshot, encoder: EvaluatedEncoder, *, facts: Mapping[str, Any], keep_every: int
) -> SnapshotFiles:
    """Write a snapshot, read it back, and remove those that it makes needless.

    facts:      for the manifest, such as the hash of the configuration
    keep_every: epochs between two snapshots that stay for good, 0 for none
    Raises NumericalError for a state that is not finite, StoreError where the disk refuses or gives back something else;
    older snapshots are then as they were.
    """
    check_finite(snapshot)
    folder = snapshot_folder(run, snapshot.step)
    try:
        remove(folder / MANIFEST)  # of the same step, whatever it was: nothing may be whole while its files change
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        files = {STATE: _write_state(folder / STATE, snapshot), ENCODER: _write_encoder(folder, snapshot, encoder)}
        manifest = {
            "schema": SCHEMA,
            "step": snapshot.step,
            "epoch": snapshot.epoch,
            "world": len(snapshot.rng),
            "files": files,
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **facts,
        }
        write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode())
        written = _read_back(folder, snapshot)
        _remove_needless(run, written, keep_every=keep_every)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"could not write a snapshot: {error}",
            where=str(folder),
            hint="Free space, or go on from the older ones in another folder.",
            kept="Older snapshots are as they were.",
        ) from error
    return written


def _write_state(path: Path, snapshot: Snapshot) -> str:
    state = {name: getattr(snapshot, name) for name in ("step", "model", "optimizer", "watched")}
    state["rng"] = list(snapshot.rng)
    with _written(path) as temporary:
        torch.save(state, temporary)
    return file_sha256(path)


def _write_encoder(folder: Path, snapshot: Snapshot, encoder: EvaluatedEncoder) -> str:
    write_encoder(folder / ENCODER, encoder, epoch=snapshot.epoch)
    return file_sha256(folder / ENCODER)


def write_encoder(path: Path, encoder: EvaluatedEncoder, *, epoch: int, dtype: torch.dtype | None = None) -> None:
    """Write an encoder by timm's names as one safetensors file that says which architecture it belongs to."""
    from safetensors.torch import save

    tensors = {
        name: value.detach().to(device="cpu", dtype=dtype if value.is_floating_point() else None).contiguous().clone()
        for name, value in encoder.weights.items()
    }
    facts = {"format": "pt", ARCHITECTURE: encoder.architecture, EPOCH: str(epoch)}
    if encoder.image_pixels is not None:
        facts[IMAGE_PIXELS] = str(encoder.image_pixels)
    write_atomically(path, _ordered(save(tensors, metadata=facts)))


def _ordered(content: bytes) -> bytes:
    """Give a safetensors file with its header's facts in order, which the library writes in another one every time: the same
    weights are to be the same file."""
    end = _HEADER_AT + int.from_bytes(content[:_HEADER_AT], "little")
    header = json.loads(content[_HEADER_AT:end])
    facts = header.pop("__metadata__")
    text = json.dumps({"__metadata__": dict(sorted(facts.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_AT)
    return len(text).to_bytes(_HEADER_AT, "little") + text + content[end:]


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; torch tells of a full disk by a RuntimeError."""
    with written_atomically(path, path.name) as temporary:
        try:
            yield temporary
        except RuntimeError as error:
            raise OSError(str(error).partition("\n")[0]) from error


def _read_back(folder: Path, snapshot: Snapshot) -> SnapshotFiles:
    """Read what was written as a later run will, and compare. Raises ValueError where it differs."""
    written = check_snapshot(folder)
    state = _load(written)
    if not (equal(state["model"], snapshot.model) and equal(state["optimizer"], snapshot.optimizer)):
        remove(folder / MANIFEST)
        raise ValueError("it read back differently")
    return written


def read_snapshot(files: SnapshotFiles) -> Snapshot:
    """Read a snapshot that `newest_snapshot` chose. Raises CheckpointError where it cannot be."""
    try:
        state = _load(files)
        return Snapshot(
            step=files.step,
            epoch=files.epoch,
            model=state["model"],
            optimizer=state["optimizer"],
            rng=tuple(state["rng"]),
            watched=state["watched"],
        )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"cannot be read: {str(error).partition(chr(10))[0]}",
            where=str(files.state),
            hint="Remove its folder, so that the one before is taken.",
        ) from error


def _load(files: SnapshotFiles) -> dict[str, Any]:
    return cast("dict[str, Any]", torch.load(files.state, map_location="cpu", weights_only=True))


def _remove_needless(run: Path, newest: SnapshotFiles, *, keep_every: int) -> None:
    """Leave the newest whole snapshots and those that stay for good; of a removed one the manifest goes first."""
    whole = 0
    for folder in snapshot_folders(run):
        if folder == newest.folder:
            whole += 1
            continue
        try:
            found = read_manifest(folder)
        except (OSError, ValueError):
            remove(folder)  # never finished: a kill or a full disk came in between
            continue
        whole += 1
        if whole > _GENERATIONS and not _stays(found, keep_every):
            remove(folder / MANIFEST)
            sync_folder(folder)
            remove(folder)


def _stays(files: SnapshotFiles, keep_every: int) -> bool:
    return bool(keep_every) and files.facts.get("epoch_end") is True and files.epoch % keep_every == 0


def check_finite(snapshot: Snapshot) -> None:
    """Raise NumericalError naming tensors that hold NaN or infinity: such a state is never written over a good one."""
    bad = [name for name, tensor in tensors_of(snapshot.model) if not _is_finite(tensor)]
    bad += [f"optimizer {name}" for name, tensor in tensors_of(snapshot.optimizer) if not _is_finite(tensor)]
    if bad:
        raise NumericalError(
            f"{len(bad)} tensors are not finite after step {snapshot.step} ({', '.join(bad[:_SHOWN])})",
            hint="Train with a smaller learning rate from the last snapshot.",
            kept="No snapshot was written; the older ones are as they were.",
        )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def tensors_of(content: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Give every tensor inside of mappings and lists, by its place."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for place, value in enumerate(content):
            yield from tensors_of(value, f"{name}.{place}")


def equal(one: object, other: object) -> bool:
    """Tell whether two states hold the same values, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return one == other


def generator_states(device: torch.device) -> dict[str, Any]:
    """Give where this rank's global generators stand, in what torch.load takes with weights_only."""
    name, keys, place, has_gauss, gauss = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(gauss)),
    }


def seed_generators(seed: int) -> None:
    """Start this rank's global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def set_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Put this rank's global generators where `generator_states` found them."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, cached))
