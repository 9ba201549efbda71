"""A checkpoint in another container: plain safetensors, timm's names, or a folder that transformers loads."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.formats.safetensors import DTYPES, save_tensors
from msn_eval.checkpoints.hf_export import PlainNetwork, folder_content, heads_and_epsilon, write_folder
from msn_eval.checkpoints.stored import Contents, StoredCheckpoint, check_stored, choose_stored, read_contents
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.files.atomic import remove, written_atomically
from msn_eval.models.architectures import recognise_architecture
from msn_eval.models.build import outline_network

Target = Literal["safetensors", "timm", "hf"]
TARGETS: tuple[Target, ...] = ("safetensors", "timm", "hf")
_SLACK_BYTES = 1 << 20


def convert_checkpoint(
    source: Path, out: Path, *, to: Target, arch: str | None = None, key: str | None = None
) -> StoredCheckpoint | Contents:
    """Write the checkpoint at `source` to `out`, read it back, and give what was written.

    safetensors: every tensor of the file under its own name, without what a pickle may hold besides
    timm:        the evaluated network's trunk by timm's names, one safetensors file
    hf:          the same as a folder in Hugging Face layout
    Raises CheckpointError for what cannot be read, or not be written without changing what it computes; UsageError where
    `out` exists; StoreError when the disk refuses.
    """
    if os.path.lexists(out) and not (to == "hf" and _is_empty_folder(out)):
        raise UsageError("is there already", where=str(out), hint="Name another, or remove it first.")
    if not os.path.isdir(out.parent):  # noqa: PTH112 - Path.is_dir raises on names too long for the disk
        raise UsageError("no such folder", where=str(out.parent), hint="Make it first.")
    contents = read_contents(source)
    if to == "safetensors":
        tensors = _every_tensor(contents)
        _write(out, tensors)
        return _same(read_contents(out), tensors)
    stored = choose_stored(contents, arch=arch, key=key)
    check_stored(stored)
    if to == "timm":
        _check_readable_without_name(stored)
        _write(out, dict(stored.trunk.weights))
    else:
        _write_folder(out, stored)
    back = choose_stored(read_contents(out), arch=arch if to == "timm" else None)
    _check_same(back.trunk.weights, stored.trunk.weights, out)
    return back


def _is_empty_folder(out: Path) -> bool:
    """Tell whether a folder may be put in the place of another; the working folder may not, somebody stands in it."""
    try:
        return not out.is_symlink() and out.is_dir() and not any(out.iterdir()) and out.resolve() != Path.cwd()
    except OSError:  # it cannot be looked into
        return False


def _every_tensor(contents: Contents) -> dict[str, Tensor]:
    """Give all tensors of a file by one name each. Raises CheckpointError for what safetensors cannot hold."""
    tensors: dict[str, Tensor] = {}
    problem = None
    for name, tensor in _flat(contents.content):
        if name in tensors:
            problem = f"has two tensors {name!r:.80}, one in another"
        elif name == "__metadata__":
            problem = f"has a tensor {name!r}, a name that safetensors keeps for itself"
        elif tensor.dtype not in DTYPES.values():
            problem = (
                f"has a tensor {name!r:.80} of {str(tensor.dtype).removeprefix('torch.')}, which safetensors has not"
            )
        elif name != name.encode("utf-8", "replace").decode():
            problem = f"has a tensor {name!r:.80}, which is no text"
        tensors[name] = tensor
    size = sum(one.nbytes for one in tensors.values())
    if not tensors:
        problem = "holds no tensors"
    elif size > 2 * contents.file_bytes + _SLACK_BYTES:
        problem = f"holds tensors of {size:,} bytes in a file of {contents.file_bytes:,}: many names for the same bytes"
    if problem is not None:
        raise CheckpointError(
            problem, where=contents.where, hint="Convert the evaluated network alone: --to timm or --to hf."
        )
    return tensors


def _flat(content: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


def _write(out: Path, tensors: Mapping[str, Tensor]) -> None:
    with written_atomically(out, f"{sum(one.nbytes for one in tensors.values()):,} bytes") as temporary:
        save_tensors(temporary, tensors)


def _same(contents: Contents, tensors: Mapping[str, Tensor]) -> Contents:
    _check_same(dict(_flat(contents.content)), tensors, Path(contents.where))
    return contents


def _check_same(back: Mapping[str, Tensor], tensors: Mapping[str, Tensor], out: Path) -> None:
    """Refuse to call a conversion done that does not read back bit by bit as what was to be written."""
    differing = [name for name in tensors.keys() | back.keys() if not _equal(tensors.get(name), back.get(name))]
    if differing:
        remove(out)
        raise CheckpointError(
            f"{len(differing)} tensors read back differently ({', '.join(sorted(differing)[:3])}); it was removed",
            where=str(out),
            hint="Convert to another format, or report this.",
        )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _check_readable_without_name(stored: StoredCheckpoint) -> None:
    """Refuse a file from which everybody would build another network: one whose heads or epsilon are not the usual ones."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(outline_network(stored.architecture), VisionTransformer | Beit):
        return
    try:
        guessed = recognise_architecture(stored.trunk.weights)
    except CheckpointError:
        return  # it needs --arch, before as after
    if heads_and_epsilon(outline_network(guessed)) != heads_and_epsilon(outline_network(stored.architecture)):
        raise CheckpointError(
            f"{stored.architecture.name} has other heads or another epsilon than its weights would be read with ({guessed.name})",
            where=stored.where,
            hint="Use --to hf, whose config.json states them.",
        )


def _write_folder(out: Path, stored: StoredCheckpoint) -> None:
    outline = outline_network(stored.architecture)
    mean, std = _normalisation(outline, stored)
    network = PlainNetwork(
        outline=outline,
        weights=stored.trunk.weights,
        gated=stored.architecture.gated,
        mean=mean,
        std=std,
        name=stored.architecture.name,
        where=stored.where,
    )
    write_folder(out, folder_content(network))


def _normalisation(outline: nn.Module, stored: StoredCheckpoint) -> tuple[object, object]:
    """Give the mean and std that the weights are evaluated with here: the folder's, a timm tag's, or ImageNet's."""
    config = stored.contents.config
    if config is not None and config.statistics is not None:
        return config.statistics
    tagged = "." in (stored.architecture.timm_name or "")
    stated = cast(Mapping[str, object], getattr(outline, "pretrained_cfg", None) or {}) if tagged else {}
    return stated.get("mean") or IMAGENET_MEAN, stated.get("std") or IMAGENET_STD
