"""A checkpoint in another format: plain safetensors, timm's names, or a folder that transformers loads."""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from msn_eval.checkpoints.checkpoint import weights_sha256
from msn_eval.checkpoints.formats.safetensors import DTYPES, save_tensors
from msn_eval.checkpoints.hf_export import PlainNetwork, build_folder_content, read_heads_and_epsilon, write_folder
from msn_eval.checkpoints.normalisation import ASSUMED, Normalisation, Triple, set_by_hand
from msn_eval.checkpoints.stored import (
    Contents,
    StoredCheckpoint,
    check_stored,
    choose_stored,
    describe_normalisation,
    read_contents,
)
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.files.atomic import remove, written_atomically
from msn_eval.models.architectures import recognise_architecture
from msn_eval.models.build import outline_network

Target = Literal["safetensors", "timm", "hf"]
_log = logging.getLogger(__name__)
_SLACK_BYTES = 1 << 20


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    to: Target,
    arch: str | None = None,
    key: str | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
) -> tuple[str, Contents]:
    """Write the checkpoint at `source` to `out`, and read it back.

    Args:
        to: safetensors: every tensor of the file under its own name, without anything else that a pickle may hold;
            timm: the evaluated network's backbone by timm's names, one safetensors file;
            hf: the same as a folder in Hugging Face layout.
        arch: timm's name of the architecture, where the source leaves it open.
        key: Which of several networks.
        mean: A value per channel that the output states instead of the source's own, on the [0, 1] scale.
        std: The same.

    Returns:
        The name of the evaluated architecture (for safetensors an empty string), and what was written.

    Raises:
        CheckpointError: The source cannot be read, or not be written without changing what it computes.
        UsageError: `out` exists already.
        StoreError: The disk refuses.
    """
    if os.path.lexists(out):
        raise UsageError("OUT exists already", where=str(out), hint="Choose another name, or remove it first.")
    if not os.path.isdir(out.parent):  # noqa: PTH112 - Path.is_dir raises on names too long for the disk
        raise UsageError("No such folder", where=str(out.parent), hint="Create it first.")
    contents = read_contents(source)
    if to == "safetensors":
        tensors = _collect_tensors(contents)
        known = contents.normalisation
        if known is not None or mean is not None or std is not None:
            known = set_by_hand(known or ASSUMED, mean, std)
        _write(out, tensors, known)
        written = read_contents(out)
        _check_equal(dict(_flatten(written.content)), tensors, out)
        return "", written
    stored = choose_stored(contents, arch=arch, key=key)
    check_stored(stored)
    normalisation = set_by_hand(stored.normalisation, mean, std)
    if normalisation.is_assumed:
        _log.warning("%s: mean and std are %s; --mean and --std set others", contents.where, normalisation.source)
    if to == "timm":
        _check_readable_without_name(stored)
        _write(out, stored.backbone.weights, normalisation)
    else:
        _write_folder(out, stored, normalisation)
    written_back = choose_stored(read_contents(out), arch=arch if to == "timm" else None)
    _check_equal(written_back.backbone.weights, stored.backbone.weights, out)
    return written_back.architecture.name, written_back.contents


def _collect_tensors(contents: Contents) -> dict[str, Tensor]:
    """Return all tensors of a file under one name each. Raises CheckpointError for what safetensors cannot hold."""
    tensors: dict[str, Tensor] = {}
    problem = ""
    for name, tensor in _flatten(contents.content):
        if name in tensors or name == "__metadata__":
            problem = f"The name {name!r:.80} occurs twice or is reserved by the format"
        elif tensor.dtype not in DTYPES.values() or name != name.encode("utf-8", "replace").decode():
            problem = f"safetensors supports no tensor {name!r:.80} of {str(tensor.dtype).removeprefix('torch.')}"
        tensors[name] = tensor
    size = sum(tensor.nbytes for tensor in tensors.values())
    if not tensors:
        problem = "The file holds no tensors"
    elif size > 2 * contents.file_bytes + _SLACK_BYTES:
        problem = f"The tensors have {size:,} bytes, the file {contents.file_bytes:,}: many names share the same bytes"
    if problem:
        hint = "Convert the evaluated network alone: --to timm or --to hf."
        raise CheckpointError(problem, where=contents.where, hint=hint)
    return tensors


def _flatten(content: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")


def _write(out: Path, tensors: Mapping[str, Tensor], normalisation: Normalisation | None) -> None:
    stated = {} if normalisation is None else describe_normalisation(normalisation)
    with written_atomically(out, f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes") as temporary:
        save_tensors(temporary, tensors, stated)


def _check_equal(written: Mapping[str, Tensor], tensors: Mapping[str, Tensor], out: Path) -> None:
    """Raise CheckpointError, and remove `out`, unless it reads back bit by bit as what was to be written."""
    if weights_sha256(written) != weights_sha256(tensors):
        remove(out)
        what, hint = "The tensors read back differently; the output was removed", "Use another format, or report this."
        raise CheckpointError(what, where=str(out), hint=hint)


def _check_readable_without_name(stored: StoredCheckpoint) -> None:
    """Refuse a file from which every reader would build another network, with the usual heads or epsilon."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    outline = outline_network(stored.architecture)
    try:
        guessed = recognise_architecture(stored.backbone.weights)
    except CheckpointError:
        return  # it needs --arch, before as after
    is_transformer = isinstance(outline, VisionTransformer | Beit)
    if is_transformer and read_heads_and_epsilon(outline_network(guessed)) != read_heads_and_epsilon(outline):
        what = (
            f"{stored.architecture.name} has other heads or another epsilon than readers would assume ({guessed.name})"
        )
        raise CheckpointError(what, where=stored.contents.where, hint="Use --to hf, whose config.json states them.")


def _write_folder(out: Path, stored: StoredCheckpoint, normalisation: Normalisation) -> None:
    network = PlainNetwork(
        outline=outline_network(stored.architecture),
        weights=stored.backbone.weights,
        gated=stored.architecture.gated,
        mean=normalisation.mean,
        std=normalisation.std,
        name=stored.architecture.name,
        where=stored.contents.where,
    )
    write_folder(out, build_folder_content(network))
