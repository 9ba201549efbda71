"""Training state: what the training of a probe goes on from, whatever stopped it.

    OUT/.training/ID.step-00000120.9f86d081884c7d65.pt

Written under another name first, synced and renamed; the end of its name is the start of its bytes' SHA-256, and a file that
does not have it is passed over. The newest two stay until the results are written.
"""

import contextlib
import hashlib
import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msn_eval.errors import StoreError
from msn_eval.files.atomic import free_bytes, remove, write_atomically

_log = logging.getLogger(__name__)
_FOLDER = ".training"
_NAME = re.compile(r"(?P<id>[0-9a-f]{16})\.step-(?P<step>\d{8,})\.(?P<sha256>[0-9a-f]{16})\.pt")
_GENERATIONS = 2


@dataclass(frozen=True, kw_only=True)
class StateFiles:
    """Where the states of one training stand.

    out:   result folder
    facts: all that decides how the training goes on, such as the labelled images; they are its address
    """

    out: Path
    facts: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return self.out / _FOLDER

    @property
    def id(self) -> str:
        return _digest("\n".join(f"{name}\t{value}" for name, value in sorted(self.facts.items())).encode())

    def found(self) -> list[Path]:
        """Give the files, the newest first."""
        named = [(match, path) for path in self.folder.glob(f"{self.id}.*.pt") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named, key=lambda one: int(one[0]["step"]), reverse=True)]


def write_state(files: StateFiles, state: Mapping[str, Any], *, step: int) -> None:
    """Write a state, read it back, and remove all but the newest two.

    Raises StoreError where the disk refuses or gives back something else; older ones are then as they were.
    """
    packed = io.BytesIO()
    torch.save({"step": step, **state}, packed)
    content = packed.getvalue()
    path = files.folder / f"{files.id}.step-{step:08d}.{_digest(content)}.pt"
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        if path.read_bytes() != content:
            path.unlink()
            raise OSError("it read back differently")
        for old in files.found()[_GENERATIONS:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"could not keep the state of a training: {error.strerror or error}",
            where=str(path),
            hint=f"Free space or choose another --out folder; {free_bytes(files.out)}.",
            kept="Older states are as they were; the same command goes on from them.",
        ) from error


def read_state(files: StateFiles) -> dict[str, Any] | None:
    """Read the newest state that is whole, its `step` among it; None where there is none."""
    for path in files.found():
        try:
            content = path.read_bytes()
            if not path.name.endswith(f".{_digest(content)}.pt"):
                raise ValueError("its bytes are not those that its name tells of")
            state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return state
        except (OSError, ValueError, RuntimeError) as error:
            _log.warning("%s is passed over: %s", path, str(error).partition("\n")[0])
    return None


def remove_states(files: StateFiles) -> None:
    """Remove the states of a training that has become results, and the folder with the last of them."""
    for path in files.found():
        with contextlib.suppress(OSError):  # what cannot be removed does no harm
            remove(path)
    with contextlib.suppress(OSError):  # others stand in it
        files.folder.rmdir()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
