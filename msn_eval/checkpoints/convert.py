"""A checkpoint in another format: plain safetensors, timm's names, or a folder that transformers loads."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.formats.safetensors import DTYPES, save_tensors
from msn_eval.checkpoints.hf_export import PlainNetwork, build_folder_content, read_heads_and_epsilon, write_folder
from msn_eval.checkpoints.stored import Contents, StoredCheckpoint, check_stored, choose_stored, read_contents
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.files.atomic import remove, written_atomically
from msn_eval.models.architectures import recognise_architecture
from msn_eval.models.build import outline_network

Target = Literal["safetensors", "timm", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)
_SLACK_BYTES = 1 << 20


def convert_checkpoint(
    source: Path, out: Path, *, to: Target, arch: str | None = None, key: str | None = None
) -> StoredCheckpoint | Contents:
    """Write the checkpoint at `source` to `out`, read it back, and return what was written.

    Args:
        to: safetensors: every tensor of the file under its own name, without anything else that a pickle may hold;
            timm: the evaluated network's backbone by timm's names, one safetensors file;
            hf: the same as a folder in Hugging Face layout.

    Raises:
        CheckpointError: The source cannot be read, or not be written without changing what it computes.
        UsageError: `out` exists already.
        StoreError: The disk refuses.
    """
    if os.path.lexists(out) and not (to == "hf" and _is_empty_folder(out)):
        raise UsageError("OUT exists already", where=str(out), hint="Choose another name, or remove it first.")
    if not os.path.isdir(out.parent):  # noqa: PTH112 - Path.is_dir raises on names too long for the disk
        raise UsageError("No such folder", where=str(out.parent), hint="Create it first.")
    contents = read_contents(source)
    if to == "safetensors":
        tensors = _collect_tensors(contents)
        _write(out, tensors)
        written = read_contents(out)
        _check_equal(dict(_flatten(written.content)), tensors, out)
        return written
    stored = choose_stored(contents, arch=arch, key=key)
    check_stored(stored)
    if to == "timm":
        _check_readable_without_name(stored)
        _write(out, stored.backbone.weights)
    else:
        _write_folder(out, stored)
    written_back = choose_stored(read_contents(out), arch=arch if to == "timm" else None)
    _check_equal(written_back.backbone.weights, stored.backbone.weights, out)
    return written_back


def _is_empty_folder(out: Path) -> bool:
    """Whether another folder may replace a folder; the working folder may not be replaced."""
    try:
        return not out.is_symlink() and out.is_dir() and not any(out.iterdir()) and out.resolve() != Path.cwd()
    except OSError:
        return False


def _collect_tensors(contents: Contents) -> dict[str, Tensor]:
    """Return all tensors of a file under one name each. Raises CheckpointError for what safetensors cannot hold."""
    tensors: dict[str, Tensor] = {}
    problem = None
    for name, tensor in _flatten(contents.content):
        if name in tensors:
            problem = f"Two tensors have the same name {name!r:.80}"
        elif name == "__metadata__":
            problem = f"A tensor is called {name!r}, a name that safetensors reserves"
        elif tensor.dtype not in DTYPES.values():
            problem = (
                f"{name!r:.80} is of {str(tensor.dtype).removeprefix('torch.')}, which safetensors does not support"
            )
        elif name != name.encode("utf-8", "replace").decode():
            problem = f"The tensor name {name!r:.80} is not valid text"
        tensors[name] = tensor
    size = sum(tensor.nbytes for tensor in tensors.values())
    if not tensors:
        problem = "The file holds no tensors"
    elif size > 2 * contents.file_bytes + _SLACK_BYTES:
        problem = f"The tensors have {size:,} bytes, the file {contents.file_bytes:,}: many names share the same bytes"
    if problem is not None:
        hint = "Convert the evaluated network alone: --to timm or --to hf."
        raise CheckpointError(problem, where=contents.where, hint=hint)
    return tensors


def _flatten(content: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")


def _write(out: Path, tensors: Mapping[str, Tensor]) -> None:
    with written_atomically(out, f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes") as temporary:
        save_tensors(temporary, tensors)


def _check_equal(written: Mapping[str, Tensor], tensors: Mapping[str, Tensor], out: Path) -> None:
    """Raise CheckpointError, and remove `out`, unless it reads back bit by bit as what was to be written."""
    names = tensors.keys() | written.keys()
    differing = sorted(name for name in names if not _is_equal(tensors.get(name), written.get(name)))
    if differing:
        remove(out)
        raise CheckpointError(
            f"{len(differing)} tensors read back differently ({', '.join(differing[:3])}); the output was removed",
            where=str(out),
            hint="Convert to another format, or report this.",
        )


def _is_equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    # As bytes, because NaN is not equal to itself, and -0 is equal to 0.
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(first, second)


def _check_readable_without_name(stored: StoredCheckpoint) -> None:
    """Refuse a file from which every reader would build another network, with the usual heads or epsilon."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    outline = outline_network(stored.architecture)
    if not isinstance(outline, VisionTransformer | Beit):
        return
    try:
        guessed = recognise_architecture(stored.backbone.weights)
    except CheckpointError:
        return  # it needs --arch, before as after
    if read_heads_and_epsilon(outline_network(guessed)) != read_heads_and_epsilon(outline):
        raise CheckpointError(
            f"{stored.architecture.name} has other heads or another epsilon than a reader of its weights would assume "
            f"({guessed.name})",
            where=stored.contents.where,
            hint="Use --to hf, whose config.json states them.",
        )


def _write_folder(out: Path, stored: StoredCheckpoint) -> None:
    outline = outline_network(stored.architecture)
    mean, std = _normalisation(outline, stored)
    network = PlainNetwork(
        outline=outline,
        weights=stored.backbone.weights,
        gated=stored.architecture.gated,
        mean=mean,
        std=std,
        name=stored.architecture.name,
        where=stored.contents.where,
    )
    write_folder(out, build_folder_content(network))


def _normalisation(outline: nn.Module, stored: StoredCheckpoint) -> tuple[object, object]:
    """Return the mean and std of the evaluation: the folder's, a timm tag's, or ImageNet's."""
    config = stored.contents.config
    if config is not None and config.statistics is not None:
        return config.statistics
    has_tag = "." in (stored.architecture.timm_name or "")
    stated = cast(Mapping[str, object], getattr(outline, "pretrained_cfg", None) or {}) if has_tag else {}
    return stated.get("mean") or IMAGENET_MEAN, stated.get("std") or IMAGENET_STD
