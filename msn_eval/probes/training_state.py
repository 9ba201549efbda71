"""Training state: what an interrupted training of a probe resumes from.

    OUT/.training/ID.step-00000120.9f86d081884c7d65.pt

A file is written under a temporary name, synced and renamed. The end of its name is the start of the SHA-256 of its bytes; a
file for which that is wrong is ignored. The newest two stay until the results are written.
"""

import contextlib
import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msn_eval.distributed.group import Group, broadcast_from_rank0
from msn_eval.errors import StoreError
from msn_eval.files.atomic import describe_free_space, remove, write_atomically

_log = logging.getLogger(__name__)
_GENERATIONS = 2


@dataclass(frozen=True, kw_only=True)
class StateFiles:
    """The state files of one training.

    Attributes:
        out: Result folder.
        facts: Everything that decides how the training continues, such as the labelled images. The files are named by it.
    """

    out: Path
    facts: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return self.out / ".training"

    @property
    def id(self) -> str:
        return _digest("\n".join(f"{name}\t{value}" for name, value in sorted(self.facts.items())).encode())

    def find(self) -> list[Path]:
        """Return the files, the newest first."""
        return sorted(self.folder.glob(f"{self.id}.step-*.pt"), reverse=True)


def write_state(files: StateFiles, state: Mapping[str, Any], *, step: int) -> None:
    """Write a state, read it back, and remove all except the newest two.

    Raises:
        StoreError: The disk refuses, or reads back something else. Older states are then unchanged.
    """
    buffer = io.BytesIO()
    torch.save({"step": step, **state}, buffer)
    content = buffer.getvalue()
    path = files.folder / f"{files.id}.step-{step:08d}.{_digest(content)}.pt"
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        if path.read_bytes() != content:
            path.unlink()
            raise OSError("it read back differently")
        for old in files.find()[_GENERATIONS:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"could not keep the state of a training: {error.strerror or error}",
            where=str(path),
            hint=f"Free space or choose another --out folder; {describe_free_space(files.out)}.",
            kept="Older states are unchanged; the same command resumes from them.",
        ) from error


def read_state(files: StateFiles) -> dict[str, Any] | None:
    """Read the newest undamaged state, with its `step`; None if there is none."""
    for path in files.find():
        try:
            content = path.read_bytes()
            if not path.name.endswith(f".{_digest(content)}.pt"):
                raise ValueError("its bytes do not match its name")
            state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return state
        except (OSError, ValueError, RuntimeError) as error:
            _log.warning("%s is damaged and ignored: %s", path, str(error).partition("\n")[0])
    return None


def read_shared_state(files: StateFiles | None, group: Group) -> dict[str, Any] | None:
    """Read the newest state on rank 0, whose folder the others may not see, and return it on all ranks of a process group."""
    return broadcast_from_rank0(group, "state", lambda: None if files is None else read_state(files))


def remove_states(files: StateFiles) -> None:
    """Remove the states of a training that has become results, and the folder with the last of them."""
    with contextlib.suppress(OSError):  # what cannot be removed does no harm
        for path in files.find():
            remove(path)
        files.folder.rmdir()  # fails while other trainings have states in it


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
