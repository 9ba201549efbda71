"""Snapshots: everything needed to continue training as if it had never stopped.

A kill at any time loses nothing: each file is written under a temporary name, synced and renamed; the manifest with the hashes
comes last; the snapshot is read back and compared before an older one is removed. `msn_eval.checkpoints.run_folder` describes
the files and finds the newest complete snapshot.
"""

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from msn_eval.checkpoints.formats.safetensors import sort_metadata
from msn_eval.checkpoints.normalisation import IMAGENET
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
from msn_eval.checkpoints.stored import ARCHITECTURE, EPOCH, IMAGE_PIXELS, describe_normalisation
from msn_eval.errors import CheckpointError, NumericalError, StoreError, format_count
from msn_eval.files.atomic import remove, sync_folder, write_atomically, written_atomically
from msn_eval.files.json_records import add_seal

_log = logging.getLogger(__name__)
_GENERATIONS = 2
_SHOWN = 3
_HEADER_AT = 8  # a safetensors file begins with 8 bytes for the length of its header


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run between two steps.

    Attributes:
        step: Finished steps.
        epoch: Finished epochs.
        model: State dict of the model, target encoder and prototypes included.
        optimizer: State dict of the optimiser.
        rng: Random generator states of every rank, as returned by `generator_states`.
        watched: Counters of the alarms.
    """

    step: int
    epoch: int
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    rng: Sequence[Mapping[str, Any]]
    watched: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluatedEncoder:
    """The network of a snapshot that is evaluated.

    Attributes:
        weights: By timm's names.
        architecture: As for `msn-eval --arch`.
        image_pixels: Side of the training images, None if unknown.
    """

    weights: Mapping[str, Tensor]
    architecture: str
    image_pixels: int | None = None


def write_snapshot(
    run: Path, snapshot: Snapshot, encoder: EvaluatedEncoder, *, facts: Mapping[str, Any], keep_every: int
) -> SnapshotFiles:
    """Write a snapshot, read it back, and remove old ones.

    Args:
        run: Folder of the run.
        snapshot: State to write.
        encoder: Network for evaluation.
        facts: Further fields of the manifest, such as the hash of the recipe.
        keep_every: Epochs between two snapshots that are never removed, 0 for none.

    Raises:
        NumericalError: The state is not finite. Older snapshots stay.
        StoreError: The disk refuses, or returns different bytes. Older snapshots stay.
    """
    _check_finite(snapshot)
    folder = snapshot_folder(run, snapshot.step)
    try:
        remove(folder / MANIFEST)  # of an older snapshot of this step: it must not be valid while its files change
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        state = {name: getattr(snapshot, name) for name in ("step", "model", "optimizer", "watched")}
        write_torch_file(folder / STATE, state | {"rng": list(snapshot.rng)})
        write_encoder(folder / ENCODER, encoder, epoch=snapshot.epoch)
        manifest = {
            "schema": SCHEMA,
            "step": snapshot.step,
            "epoch": snapshot.epoch,
            "world": len(snapshot.rng),
            "files": {name: file_sha256(folder / name) for name in (STATE, ENCODER)},
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **facts,
        }
        write_atomically(folder / MANIFEST, (json.dumps(add_seal(manifest), indent=1, allow_nan=False) + "\n").encode())
        written = _read_back(folder, snapshot)
        _remove_old(run, written, keep_every=keep_every)
    except StoreError:
        with suppress(OSError):
            remove(folder)  # an incomplete snapshot would keep the disk full
        raise
    except (OSError, ValueError) as error:
        raise StoreError(
            f"could not write a snapshot: {error}",
            where=str(folder),
            hint="Free space on that disk.",
            kept="Older snapshots are unchanged.",
        ) from error
    return written


def write_torch_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file with torch.save, which replaces `path` at the end. Raises StoreError if the disk refuses."""
    with written_atomically(path, path.name) as temporary:
        try:
            with temporary.open("xb") as file:  # given a path, torch keeps the file open after an error
                torch.save(content, file)
        except RuntimeError as error:  # torch replaces the disk's error
            reason = error.__context__
            raise reason if isinstance(reason, OSError) else OSError(str(error).partition("\n")[0]) from error


def write_encoder(path: Path, encoder: EvaluatedEncoder, *, epoch: int) -> None:
    """Write an encoder with timm's names as a safetensors file whose metadata states the architecture."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in encoder.weights.items()}
    facts = {"format": "pt", ARCHITECTURE: encoder.architecture, EPOCH: str(epoch)} | describe_normalisation(IMAGENET)
    if encoder.image_pixels is not None:
        facts[IMAGE_PIXELS] = str(encoder.image_pixels)
    content = save(tensors, metadata=facts)
    end = _HEADER_AT + int.from_bytes(content[:_HEADER_AT], "little")
    write_atomically(path, content[:_HEADER_AT] + sort_metadata(content[_HEADER_AT:end]) + content[end:])


def _read_back(folder: Path, snapshot: Snapshot) -> SnapshotFiles:
    """Read the snapshot as a later run would, and compare. Raises ValueError if it differs."""
    written = check_snapshot(folder)
    state = _load(written)
    if not (equal(state["model"], snapshot.model) and equal(state["optimizer"], snapshot.optimizer)):
        remove(folder / MANIFEST)
        raise ValueError("it read back differently")
    return written


def read_snapshot(files: SnapshotFiles) -> Snapshot:
    """Read a snapshot that `newest_snapshot` found. Raises CheckpointError if it cannot be read."""
    try:
        return Snapshot(epoch=files.epoch, **_load(files))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        what = f"cannot be read: {str(error).partition(chr(10))[0]}"
        hint = "Remove its folder to use the previous snapshot."
        raise CheckpointError(what, where=str(files.state), hint=hint) from error


def _load(files: SnapshotFiles) -> dict[str, Any]:
    return cast("dict[str, Any]", torch.load(files.state, map_location="cpu", weights_only=True))


def _remove_old(run: Path, newest: SnapshotFiles, *, keep_every: int) -> None:
    """Remove all except the newest complete snapshots and those that are never removed. Manifests are removed first."""
    complete = 0
    for folder in snapshot_folders(run):
        if folder == newest.folder:
            complete += 1
            continue
        try:
            files = read_manifest(folder)
        except (OSError, ValueError):
            remove(folder)  # incomplete because of a kill or a full disk
            continue
        complete += 1
        is_permanent = keep_every and files.facts.get("epoch_end") is True and files.epoch % keep_every == 0
        if complete > _GENERATIONS and not is_permanent:
            remove(folder / MANIFEST)
            sync_folder(folder)
            remove(folder)


def _check_finite(snapshot: Snapshot) -> None:
    """Raise NumericalError that names tensors with NaN or infinity. Such a state is never written."""
    tensors = [*_iterate_tensors(snapshot.model, ""), *_iterate_tensors(snapshot.optimizer, "optimizer ")]
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        tensors_are = format_count(len(bad), "tensor is", "tensors are")
        what = f"{tensors_are} not finite after step {snapshot.step} ({', '.join(bad[:_SHOWN])})"
        hint = "Train with a smaller learning rate from the last snapshot."
        raise NumericalError(what, hint=hint, kept="No snapshot was written; older ones are unchanged.")


def _iterate_tensors(content: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor inside of nested mappings with its path."""
    if isinstance(content, Tensor):
        yield name.removesuffix("."), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _iterate_tensors(value, f"{name}{key}.")


def equal(first: object, second: object) -> bool:
    """Whether two states hold the same values, bit for bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        bits = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
        return torch.equal(*bits)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(equal(*pair) for pair in zip(first, second, strict=True))
    return first == second


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of this rank's global random generators, in types that torch.load accepts with weights_only."""
    name, keys, position, has_gauss, gauss = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
    }


def seed_generators(seed: int) -> None:
    """Seed this rank's global random generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def set_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore this rank's global random generators from `generator_states`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
