"""A checkpoint in another format: plain safetensors, timm's names, or a folder that transformers loads."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from torch import Tensor

from msn_eval.checkpoints.checkpoint import weights_sha256
from msn_eval.checkpoints.formats.safetensors import DTYPES, save_tensors
from msn_eval.checkpoints.hf_export import build_folder_content, read_heads_and_epsilon, write_folder
from msn_eval.checkpoints.normalisation import ASSUMED, Normalisation, Triple, set_by_hand
from msn_eval.checkpoints.stored import (
    ARCHITECTURE,
    EPOCH,
    IMAGE_PIXELS,
    POSITIONS,
    Contents,
    StoredCheckpoint,
    check_stored,
    choose_stored,
    describe_normalisation,
    read_contents,
)
from msn_eval.errors import CheckpointError, UsageError, name_place
from msn_eval.files.atomic import written_atomically
from msn_eval.models.architectures import recognise_architecture, spell_architecture
from msn_eval.models.build import outline_network

Target = Literal["safetensors", "timm", "hf"]
_log = logging.getLogger(__name__)
_SLACK_BYTES = 1 << 20
_TIMM = "timm"  # whose interpolation of positions applies where no other is known


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
    if arch is None and (hub := contents.config.hub) is not None:
        hint = "Copy the folder; its save_pretrained writes other formats."
        raise CheckpointError(f"transformers alone runs {hub.name}, from its folder", where=contents.where, hint=hint)
    is_whole = to == "safetensors"
    tensors = _collect_tensors(contents) if is_whole else {}
    stored: StoredCheckpoint | None = None
    try:
        stored = choose_stored(contents, arch=arch, key=key)
        check_stored(stored)
    except CheckpointError:
        if not is_whole or arch is not None or key is not None:
            raise
        stored = None  # several networks, or one that needs --arch before as after
    own = contents.normalisation if stored is None else stored.normalisation
    normalisation = set_by_hand(own or ASSUMED, mean, std)
    if normalisation.is_assumed and not is_whole:
        _log.warning("%s: mean and std are %s; --mean and --std set others", contents.where, normalisation.source)
    written: list[tuple[str, Contents]] = []

    def check(temporary: Path) -> None:
        with name_place(str(out)):  # not the temporary file
            read = read_contents(temporary)
            if is_whole:
                _check_equal(dict(_flatten(read.content)), tensors)
            name = "" if stored is None else _check_same(read, stored, key if is_whole else None)
            written.append(("" if is_whole else name, read))

    if to == "hf":
        _write_folder(out, cast(StoredCheckpoint, stored), normalisation, check)
        return written[0]
    if stored is not None and not is_whole:
        _check_readable_without_name(stored)
        tensors = {**stored.backbone.weights}
    facts = describe_normalisation(normalisation) if stored is None else _state_facts(stored, normalisation)
    with written_atomically(out, f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes") as temporary:
        save_tensors(temporary, tensors, facts)
        check(temporary)
    return written[0]


def _state_facts(stored: StoredCheckpoint, normalisation: Normalisation) -> dict[str, str]:
    """Return what a file has to state for its reader to build the same network: no weight shows these."""
    contents = stored.contents
    facts = {
        ARCHITECTURE: spell_architecture(stored.architecture),
        POSITIONS: stored.positions or _TIMM,
        EPOCH: None if contents.epoch is None else str(contents.epoch),
        IMAGE_PIXELS: None if contents.stated_pixels is None else str(contents.stated_pixels),
    }
    return {name: text for name, text in facts.items() if text is not None} | describe_normalisation(normalisation)


def _check_same(contents: Contents, stored: StoredCheckpoint, key: str | None) -> str:
    """Return the architecture that an evaluation reads from what was written. Raises CheckpointError for another network."""
    written = choose_stored(contents, key=key)
    check_stored(written)
    _check_equal(written.backbone.weights, stored.backbone.weights)
    if _describe_network(written) != _describe_network(stored):
        what = f"It reads back as {written.architecture.name}, not as {stored.architecture.name}"
        raise CheckpointError(what, hint="Use --to hf, whose config.json states what no weight shows.")
    return written.architecture.name


def _describe_network(stored: StoredCheckpoint) -> tuple[object, ...]:
    """Return what no weight's shape shows of a network."""
    outline = outline_network(stored.architecture)
    return type(outline), read_heads_and_epsilon(outline), stored.architecture.stem, stored.positions or _TIMM


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


def _check_equal(written: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless tensors were read back bit by bit as they were to be written."""
    if weights_sha256(written) != weights_sha256(tensors):
        what, hint = "The tensors read back differently; nothing was written", "Use another format, or report this."
        raise CheckpointError(what, hint=hint)


def _check_readable_without_name(stored: StoredCheckpoint) -> None:
    """Refuse a file from which every reader would build another network, with the usual heads or epsilon."""
    try:
        guessed = recognise_architecture(stored.backbone.weights)
    except CheckpointError:
        return  # it needs --arch, before as after
    own, assumed = (read_heads_and_epsilon(outline_network(one)) for one in (stored.architecture, guessed))
    if own not in (None, assumed):
        what = f"{stored.architecture.name} has other heads or another epsilon "
        what += f"than readers would assume ({guessed.name})"
        raise CheckpointError(what, where=stored.contents.where, hint="Use --to hf, whose config.json states them.")


def _write_folder(
    out: Path, stored: StoredCheckpoint, normalisation: Normalisation, check: Callable[[Path], None]
) -> None:
    outline, name = outline_network(stored.architecture), stored.architecture.name
    mean, std = normalisation.mean, normalisation.std
    with name_place(stored.contents.where):
        content = build_folder_content(outline, stored.backbone.weights, name=name, mean=mean, std=std)
    write_folder(out, replace(content, metadata={POSITIONS: stored.positions or _TIMM}), check)
