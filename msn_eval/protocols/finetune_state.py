"""Finetune state: what a fine-tuning that was stopped goes on from, whatever stopped it.

    OUT/.finetune/ID.step-00000120.9f86d081884c7d65.pt

Written under another name first, synced and renamed; the end of its name is the start of its SHA-256, and what does not
have it is passed over. The newest two stay until the result is written.
"""

import contextlib
import hashlib
import io
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msn_eval.atomic_file import remove, write_atomically
from msn_eval.errors import NumericalError, StoreError

_log = logging.getLogger(__name__)
_FOLDER = ".finetune"
_NAME = re.compile(r"(?P<id>[0-9a-f]{16})\.step-(?P<step>\d{8,})\.(?P<sha256>[0-9a-f]{16})\.pt")
_GENERATIONS = 2
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class StateFiles:
    """Where the states of one fine-tuning stand.

    out:   result folder
    id:    of the result that it will become
    facts: all besides the id that decides how training goes on, such as the labelled images; a state of others is passed over
    """

    out: Path
    id: str
    facts: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return self.out / _FOLDER

    def found(self) -> list[Path]:
        """Give the files, the newest first."""
        named = [(match, path) for path in self.folder.glob(f"{self.id}.*.pt") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named, key=lambda one: int(one[0]["step"]), reverse=True)]


@dataclass(frozen=True, kw_only=True)
class FinetuneState:
    """A fine-tuning between two steps; all randomness follows from the step.

    step:    that is finished
    network: the trained weights by name
    loss:    sum over the steps of the epoch under way, and their number
    """

    step: int
    network: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    loss: tuple[float, int]


def write_state(files: StateFiles, state: FinetuneState) -> Path:
    """Write a state, read it back, and remove all but the newest two.

    Raises NumericalError for weights that are not finite, StoreError where the disk refuses or gives back something else;
    older ones are then as they were.
    """
    bad = [name for name, one in state.network.items() if not bool(one.isfinite().all())]
    if bad:
        raise NumericalError(
            f"{len(bad)} weights are not finite after step {state.step} ({', '.join(bad[:_SHOWN])})",
            remedy="Train with a smaller finetune.learning_rate.",
        )
    packed = io.BytesIO()
    torch.save({"facts": dict(files.facts), **vars(state)}, packed)
    content = packed.getvalue()
    path = files.folder / f"{files.id}.step-{state.step:08d}.{_digest(content)}.pt"
    with _refusals_named(path):
        files.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    with _refusals_named(path):
        if _digest(path.read_bytes()) != _digest(content):
            path.unlink()
            raise OSError("it read back differently")
        for old in files.found()[_GENERATIONS:]:
            old.unlink(missing_ok=True)
    return path


def read_state(files: StateFiles) -> FinetuneState | None:
    """Read the newest state that is whole and of the same labelled images, network and settings; None where there is none."""
    for path in files.found():
        try:
            content = path.read_bytes()
            if not path.name.endswith(f".{_digest(content)}.pt"):
                raise ValueError("its bytes are not those that its name tells of")
            state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            facts = state.pop("facts")
            differing = [name for name in files.facts if facts.get(name) != files.facts[name]]
            if differing:
                raise ValueError(f"it is of another {', '.join(differing)}")
            return FinetuneState(**state)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            _log.warning("%s is passed over: %s", path, str(error).partition("\n")[0])
    return None


def remove_states(files: StateFiles) -> None:
    """Remove the states of a fine-tuning that has become a result, and the folder with the last of them."""
    for path in files.found():
        with contextlib.suppress(OSError):  # what cannot be removed does no harm
            remove(path)
    with contextlib.suppress(OSError):  # others stand in it
        files.folder.rmdir()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"could not write a state to go on from: {error.strerror or error}",
            where=str(path),
            remedy="Free space or choose another --out folder.",
            kept="Older states are untouched; the same command goes on from them.",
        ) from error
