"""Run folder: what msn-pretrain writes, and which of its snapshots is the newest complete one.

RUN/checkpoints/step-00000120/manifest.json     written last: without it, or where a hash differs, there is no snapshot
                              encoder.safetensors   the network that is evaluated
                              state.pt              the state that training continues from
    metrics.jsonl                                   one line per logged step, with a checksum
    eval/                                           records of msn_eval
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from msn_eval.errors import CheckpointError
from msn_eval.files.json_records import remove_seal

CHECKPOINTS, CONFIG, MANIFEST = "checkpoints", "config.yaml", "manifest.json"
METRICS, EVAL = "metrics.jsonl", "eval"
ENCODER, STATE = "encoder.safetensors", "state.pt"
SCHEMA = 1
_MOST_LISTED = 10
_CHECKSUM = re.compile(rb'(?P<line>.*), "crc": "(?P<crc>[0-9a-f]{8})"}')
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class SnapshotFiles:
    """A snapshot with a valid manifest.

    Attributes:
        folder: Where it is.
        step: Number of finished steps.
        epoch: Number of finished epochs.
        world: Number of ranks that trained.
        files: SHA-256 by file name.
        facts: The rest of the manifest.
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
    """Whether msn-pretrain trains in a folder."""
    return (path / CHECKPOINTS).is_dir() and (path / CONFIG).is_file()


def snapshot_folder(run: Path, step: int) -> Path:
    """Return the folder of the snapshot after `step` steps."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def snapshot_folders(run: Path) -> list[Path]:
    """Return the folders of all snapshots, complete or not, the newest first."""
    folders = [path for path in (run / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def newest_snapshot(run: Path) -> tuple[SnapshotFiles | None, tuple[str, ...]]:
    """Return the newest complete snapshot, None without one, and why newer ones were skipped."""
    skipped: list[str] = []
    for folder in snapshot_folders(run):
        try:
            return check_snapshot(folder), tuple(skipped)
        except (OSError, ValueError) as error:
            skipped.append(f"{folder.name}: {error}")
    return None, tuple(skipped)


def check_snapshot(folder: Path) -> SnapshotFiles:
    """Read a snapshot's manifest, and compare all files in it with their hashes.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The manifest is invalid, or a file is not the one that it describes.
    """
    snapshot = read_manifest(folder)
    for name, expected in snapshot.files.items():
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{name} is not the file that its manifest describes")
    return snapshot


def read_manifest(folder: Path) -> SnapshotFiles:
    """Read a snapshot's manifest.

    Raises:
        OSError: There is none.
        ValueError: It is invalid.
    """
    try:
        content: Any = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError("has no manifest: it was never finished") from None
    if isinstance(content, dict) and "seal" in content:  # older ones have none
        content = remove_seal(content)
    match content:
        case {"schema": 1, "step": int(step), "epoch": int(epoch), "world": int(world), "files": dict(files), **facts}:
            if {ENCODER, STATE} <= files.keys() and all(Path(name).name == name for name in files):
                rest = cast("dict[str, Any]", facts)
                return SnapshotFiles(folder=folder, step=step, epoch=epoch, world=world, files=files, facts=rest)
    raise ValueError("its manifest is not one of a snapshot")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_metrics(line: Mapping[str, Any]) -> bytes:
    """Return a line of a journal, which ends with the CRC-32 of the rest of it."""
    text = json.dumps(line, allow_nan=False)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the lines of a journal in the order of their steps, the last line of each step, and the numbers of damaged lines.

    Either all lines have a checksum or, in a journal of an older version, none. Text after the last line is not a damaged line:
    it is being written, or was when the run was killed.
    """
    texts = path.read_bytes().split(b"\n")
    if b"}" not in texts[-1]:
        del texts[-1]
    matches = [_CHECKSUM.fullmatch(text) for text in texts]
    lines: dict[int, dict[str, Any]] = {}
    damaged, any_checksum = [], any(matches)
    for number, (text, match) in enumerate(zip(texts, matches, strict=True), start=1):
        try:
            line: Any = json.loads(text) if _is_intact(match, any_checksum) else None
            match line:
                case {"step": int(step)}:
                    line.pop("crc", None)
                    lines[step] = line
                case _:
                    damaged.append(number)
        except (ValueError, RecursionError):
            damaged.append(number)
    return [lines[step] for step in sorted(lines)], damaged


def _is_intact(match: re.Match[bytes] | None, any_checksum: bool) -> bool:
    return not any_checksum if match is None else zlib.crc32(match["line"] + b"}") == int(match["crc"], 16)


def describe_damage(path: Path, damaged: Sequence[int]) -> str:
    """Describe the damaged lines of a journal, which are left out."""
    numbers = ", ".join(map(str, damaged[:_MOST_LISTED]))
    more = ", …" if len(damaged) > _MOST_LISTED else ""
    return f"{path.name}: {len(damaged)} damaged line{'' if len(damaged) == 1 else 's'} left out ({numbers}{more})"


def evaluated_file(run: Path) -> Path:
    """Return the weights of the newest complete snapshot of a run.

    Raises:
        CheckpointError: There is none.
    """
    snapshot, skipped = newest_snapshot(run)
    if snapshot is None:
        reasons = "".join(f"\n  {reason}" for reason in skipped)
        hint = "Continue the training with the same msn-pretrain command; each epoch ends with a snapshot."
        raise CheckpointError(f"holds no complete snapshot{':' if reasons else ''}{reasons}", where=str(run), hint=hint)
    return snapshot.encoder
