"""A file's content as plain data. Nothing from the file is run."""

import hashlib
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from msn_eval.errors import CheckpointError
from msn_eval.weights.sniff import sniff_container

_OLDEST_TORCH = (2, 10)  # earlier ones have holes in weights_only loading (CVE-2025-32434, CVE-2026-24747)
_HEAD_BYTES = 512
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What was in a file: `content` as it was saved, the SHA-256 of its bytes, the container it came in."""

    content: object
    sha256: str
    container: str


def read_weight_file(path: Path) -> WeightFile:
    """Read a PyTorch or safetensors file without running anything from it.

    Raises CheckpointError naming the file, what is wrong with it, and what to do.
    """
    _check_torch()
    try:
        with path.open("rb") as file:
            container = sniff_container(file.read(_HEAD_BYTES))
            if isinstance(container, tuple):
                raise CheckpointError(container[0], where=str(path), remedy=container[1])
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            content = _read_safetensors(file, path) if container == "safetensors" else _read_torch(file, path)
    except FileNotFoundError:
        raise CheckpointError(
            "no such checkpoint file",
            where=str(path),
            remedy="Give a file, or one of the schemes that `msn-eval ls checkpoints` lists.",
        ) from None
    except IsADirectoryError:
        raise CheckpointError("is a folder, not a checkpoint file", where=str(path), remedy="Name the file.") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}", where=str(path), remedy="Check the path and its permissions."
        ) from error
    return WeightFile(content=content, sha256=digest, container=container)


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        raise CheckpointError(
            f"torch {torch.__version__} does not load strangers' files safely", remedy="Install torch 2.10 or newer."
        )


def _read_safetensors(file: IO[bytes], path: Path) -> object:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load(file.read())  # into memory: a mapped file that shrinks kills the process
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _read_torch(file: IO[bytes], path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = _ANSI.sub("", str(error))
        found = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"blocked|Unsupported operand \d+", text)
        raise CheckpointError(
            f"holds more than tensors and plain values ({found.group() if found else 'a pickle that is not plain data'})",
            where=str(path),
            remedy="Loading it could run code from the file, so it is refused. Where you trust its origin, save its state "
            "dict alone, best as .safetensors.",
        ) from error
    except Exception as error:  # the unpickler also lets struct.error and AssertionError through
        if "TorchScript" in str(error):
            raise CheckpointError(
                "a TorchScript archive, which is a program and not a state dict",
                where=str(path),
                remedy="Save the state_dict() of the module it came from.",
            ) from error
        raise _damaged(path, _ANSI.sub("", str(error)).partition("\n")[0][:160]) from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot be read in full ({path.stat().st_size:,} bytes): {reason}",
        where=str(path),
        remedy="The file is damaged, truncated or of another kind; fetch it again.",
    )
