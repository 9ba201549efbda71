"""Run folder: what msn-pretrain leaves of a run, and which of its snapshots is the newest that can be trusted.

RUN/checkpoints/step-00000120/manifest.json     written last: without it, or where a hash differs, there is no snapshot
                              encoder.safetensors   the network that is evaluated
                              state.pt              what training goes on from
    metrics.jsonl                                   one line a logged step
    eval/                                           records of msn_eval
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msn_eval.errors import CheckpointError

CHECKPOINTS, CONFIG, MANIFEST = "checkpoints", "config.yaml", "manifest.json"
METRICS, EVAL = "metrics.jsonl", "eval"
ENCODER, STATE = "encoder.safetensors", "state.pt"
SCHEMA = 1
_NAME = re.compile(r"step-(\d{8,})")
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class SnapshotFiles:
    """A snapshot whose manifest could be read.

    step, epoch: that are finished
    world:       ranks that trained
    files:       SHA-256 of each by its name
    facts:       the rest of the manifest
    """

    folder: Path
    step: int
    epoch: int
    world: int
    files: dict[str, str]
    facts: dict[str, Any]

    @property
    def encoder(self) -> Path:
        return self.folder / ENCODER

    @property
    def state(self) -> Path:
        return self.folder / STATE


def is_run_folder(path: Path) -> bool:
    """Tell whether a folder is one that msn-pretrain trains in."""
    return (path / CHECKPOINTS).is_dir() and (path / CONFIG).is_file()


def snapshot_folder(run: Path, step: int) -> Path:
    """Give where the snapshot after `step` steps stands."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def snapshot_folders(run: Path) -> list[Path]:
    """Give the folders of all snapshots, whole or not, the newest first."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def newest_snapshot(run: Path) -> tuple[SnapshotFiles | None, tuple[str, ...]]:
    """Give the newest snapshot that is whole, None where there is none, and why newer ones were passed over."""
    skipped: list[str] = []
    for found, problem in _looked_over(run):
        if found is not None:
            return found, tuple(skipped)
        skipped.append(problem)
    return None, tuple(skipped)


def _looked_over(run: Path) -> Iterator[tuple[SnapshotFiles | None, str]]:
    for folder in snapshot_folders(run):
        try:
            yield check_snapshot(folder), ""
        except (OSError, ValueError) as error:
            yield None, f"{folder.name}: {error}"


def check_snapshot(folder: Path) -> SnapshotFiles:
    """Read a snapshot's manifest, and every file that it names against its hash.

    Raises OSError or ValueError saying what is wrong.
    """
    found = read_manifest(folder)
    for name, expected in found.files.items():
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{name} is not the file that its manifest describes")
    return found


def read_manifest(folder: Path) -> SnapshotFiles:
    """Read a snapshot's manifest. Raises OSError where there is none, ValueError where it is none."""
    try:
        content: Any = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError("has no manifest: it was never finished") from None
    match content:
        case {"schema": 1, "step": int(step), "epoch": int(epoch), "world": int(world), "files": dict(files), **facts}:
            whole = {str(name): str(sha256) for name, sha256 in files.items()}
            if {ENCODER, STATE} <= whole.keys() and all(Path(name).name == name for name in whole):
                return SnapshotFiles(
                    folder=folder,
                    step=step,
                    epoch=epoch,
                    world=world,
                    files=whole,
                    facts={str(name): value for name, value in facts.items()},
                )
    raise ValueError("its manifest is of another kind")


def file_sha256(path: Path) -> str:
    """Give the SHA-256 of a file's bytes."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            whole.update(piece)
    return whole.hexdigest()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Give the lines of a journal in the order of their steps, the last one of each step; torn ones are passed over."""
    found: dict[int, dict[str, Any]] = {}
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found[line["step"]] = line
    return [found[step] for step in sorted(found)]


def evaluated_file(run: Path) -> Path:
    """Give the weights of the newest whole snapshot of a run. Raises CheckpointError where there is none."""
    found, skipped = newest_snapshot(run)
    if found is None:
        reasons = "".join(f"\n  {reason}" for reason in skipped)
        raise CheckpointError(
            f"holds no whole snapshot{':' if reasons else ''}{reasons}",
            where=str(run),
            hint="Train on: the same msn-pretrain command goes on; each epoch ends with a snapshot.",
        )
    return found.encoder
