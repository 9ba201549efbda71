"""StoredCheckpoint: what a file or folder of weights holds and which network would be evaluated, before any is built."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.families import Backbone, read_trunk
from msn_eval.checkpoints.formats.contents import Outline
from msn_eval.checkpoints.formats.read import WeightFile, read_weight_file, read_weight_outline
from msn_eval.checkpoints.formats.safetensors import read_metadata
from msn_eval.checkpoints.hf_config import HubConfig, read_config_beside
from msn_eval.checkpoints.hf_folder import CONFIG, weight_files
from msn_eval.checkpoints.load import check_fit, fit_weights, not_real
from msn_eval.checkpoints.networks import ChosenNetwork, StoredNetwork, choose_network, find_networks, stated_epoch
from msn_eval.errors import CheckpointError
from msn_eval.models.architectures import Architecture, name_architecture, recognise_architecture
from msn_eval.models.build import outline_network
from msn_eval.models.vit import native_pixels, stored_pixels

_log = logging.getLogger(__name__)
_SLACK_BYTES = 1 << 20
_MOST_TENSORS = 20_000  # the published networks have a few hundred
# Names of what a safetensors file may say of itself; msn_pretrain writes them.
ARCHITECTURE, EPOCH, IMAGE_PIXELS = "msn_eval.architecture", "epoch", "msn_eval.image_pixels"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that lies in a file, or in the weight files of a folder.

    where:      the path, for errors
    outlines:   of the files whose values were not read
    container:  zip, pickle or safetensors
    sha256:     of the file's bytes; of several files, of their lines `name TAB sha256`
    file_bytes: together
    notes:      what reading them brought up
    networks:   those found
    epoch:      as stated
    config:     of the config.json that belongs to the weights, None where there is none
    stated_arch: what a safetensors file says its architecture is, as `--arch` takes it: heads are in no weight's shape
    stated_pixels: the side of the images that it says it was trained on, which no weight of a convolutional network shows
    """

    where: str
    outlines: tuple[Outline, ...]
    container: str
    sha256: str
    file_bytes: int
    notes: tuple[str, ...]
    content: Mapping[str, object]
    networks: tuple[StoredNetwork, ...]
    epoch: int | None
    config: HubConfig | None
    stated_arch: str | None = None
    stated_pixels: int | None = None

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """Give the values of one of its tensors, flat and piece by piece, from the file where they were left there."""
        for outline in self.outlines:
            if outline.holds(tensor):
                yield from outline.pieces(tensor)
                return
        yield tensor.reshape(-1)

    def values(self, tensor: Tensor) -> Tensor:
        """Give all the values of one of its tensors, in its shape."""
        if tensor.device.type != "meta":
            return tensor
        return torch.cat([torch.empty(0, dtype=tensor.dtype), *self.pieces(tensor)]).reshape(tensor.shape)

    def are_equal(self, one: Tensor, other: Tensor) -> bool:
        """Tell whether two of its tensors hold the same values."""
        pairs = zip_longest(self.pieces(one), self.pieces(other))
        return all(left is not None and right is not None and torch.equal(left, right) for left, right in pairs)


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """The network of a file or folder that is evaluated: its weights by timm's names, and the architecture they belong to."""

    contents: Contents
    choice: ChosenNetwork
    trunk: Backbone
    architecture: Architecture

    @property
    def where(self) -> str:
        return self.contents.where

    def native_pixels(self, network: nn.Module) -> int:
        """Give the native size of the network built for these weights: what position embeddings say, else what the file does."""
        stated = self.contents.stated_pixels
        return native_pixels(network) if stated is None or stored_pixels(network) is not None else stated


def read_contents(path: Path) -> Contents:
    """Read the weights at `path`, a file or a folder in Hugging Face layout. Nothing from them is run.

    Raises CheckpointError naming the file, what is wrong with it, and what to do.
    """
    return _contents(path, lambda file: (read_weight_file(file), None))


def read_outline(path: Path) -> Contents:
    """Read the same without keeping the weights: tensors have shapes and types and no values (on the meta device).

    Raises CheckpointError as `read_contents` does.
    """
    return _contents(path, read_weight_outline)


def _contents(path: Path, read: Callable[[Path], tuple[WeightFile, Outline | None]]) -> Contents:
    folder = path if path.is_dir() else path.parent
    files = weight_files(folder) if path.is_dir() else (path,)
    described = path.is_dir() or (path.name in _HUB_FILES and os.path.lexists(folder / CONFIG))
    config = read_config_beside(folder) if described else None
    read_files = [read(file) for file in files]
    parts = [part for part, _ in read_files]
    content: dict[str, object] = {}
    for file, part in zip(files, parts, strict=True):
        twice = content.keys() & part.content.keys()
        if twice:
            raise CheckpointError(
                f"holds {sorted(twice)[0]}, which another file of the folder holds too",
                where=str(file),
                hint="The folder mixes two checkpoints; fetch it again.",
            )
        content.update(part.content)
    stated = read_metadata(files[0]) if len(files) == 1 and parts[0].container == "safetensors" else {}
    lines = "".join(f"{file.name}\t{part.sha256}\n" for file, part in zip(files, parts, strict=True))
    return Contents(
        where=str(path),
        outlines=tuple(outline for _, outline in read_files if outline is not None),
        container=parts[0].container,
        sha256=parts[0].sha256 if len(parts) == 1 else hashlib.sha256(lines.encode()).hexdigest(),
        file_bytes=sum(part.file_bytes for part in parts),
        notes=tuple(note for part in parts for note in part.notes),
        content=content,
        networks=find_networks(content),
        epoch=stated_epoch(stated if EPOCH in stated else content),
        config=config,
        stated_arch=stated.get(ARCHITECTURE),
        stated_pixels=_whole_number(stated.get(IMAGE_PIXELS, "")),
    )


def _whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[1-9]\d{0,4}", text) else None


def choose_stored(contents: Contents, *, arch: str | None = None, key: str | None = None) -> StoredCheckpoint:
    """Choose the network of a file that is evaluated, and recognise its architecture.

    arch: timm's name of it, where the file leaves it open
    key:  which of several networks
    Raises CheckpointError where either stays open.
    """
    choice = choose_network(contents.networks, key, where=contents.where, are_equal=contents.are_equal)
    _check_size(contents, choice.network)
    trunk = read_trunk(choice.network, contents.values)
    try:
        architecture = _architecture(contents.config, trunk, arch or contents.stated_arch)
        reclaimed = _with_own_heads(trunk, choice.network, architecture)
    except CheckpointError as error:
        raise CheckpointError(error.what, where=contents.where, hint=error.hint) from error
    return StoredCheckpoint(contents=contents, choice=choice, trunk=reclaimed, architecture=architecture)


def _check_size(contents: Contents, network: StoredNetwork) -> None:
    """Raise CheckpointError for a network that is more than its file, and for one of more tensors than any has."""
    network_bytes = sum(tensor.numel() * tensor.element_size() for tensor in network.tensors.values())
    if network_bytes > 2 * contents.file_bytes + _SLACK_BYTES or len(network.tensors) > _MOST_TENSORS:
        raise CheckpointError(
            f"holds a network of {len(network.tensors):,} tensors and {network_bytes:,} bytes in a file of "
            f"{contents.file_bytes:,}",
            where=contents.where,
            hint="Weights that share their bytes are refused; where it was made, save them with .clone().",
        )


def _with_own_heads(trunk: Backbone, network: StoredNetwork, architecture: Architecture) -> Backbone:
    """Give back what was dropped as a head and is part of the trunk that timm builds, such as the norm in ConvNeXt's head."""
    if not trunk.dropped:
        return trunk
    expected = outline_network(architecture).state_dict()
    own = {name: network.tensors[name] for name in trunk.dropped if name in expected and name in network.tensors}
    dropped = tuple(name for name in trunk.dropped if name not in own)
    return replace(trunk, weights={**trunk.weights, **own}, dropped=dropped)


def check_stored(stored: StoredCheckpoint, allow_missing: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError where the weights do not fit their architecture in full; nothing is built in memory."""
    expected = outline_network(stored.architecture).state_dict()
    fit = fit_weights(stored.trunk.weights, expected, allow_missing)
    key = stored.choice.network.key
    arch = stored.architecture.name + (f" (network {key!r} of the file)" if key else "")
    check_fit(fit, of=len(expected), arch=arch, where=stored.where, hint=_likeness(stored))
    if bad := not_real(stored.trunk.weights, expected):
        raise CheckpointError(
            f"{len(bad)} weights are no dense real numbers ({', '.join(bad[:5])})",
            where=stored.where,
            hint="Save them dense and in floating point.",
        )
    if fit.waived:
        _log.warning("%s: absent, so left untrained: %s", stored.where, ", ".join(fit.waived))


def _architecture(config: HubConfig | None, trunk: Backbone, arch: str | None) -> Architecture:
    if arch is not None:
        return name_architecture(arch)
    if config is not None and config.architecture is not None:
        return config.architecture
    heads, norm_eps = (trunk.heads, trunk.norm_eps) if config is None else (config.heads, config.norm_eps)
    padded = (
        trunk.format == "solo-learn"
    )  # its resnet18 for CIFAR: nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2)
    return recognise_architecture(trunk.weights, heads=heads, norm_eps=norm_eps, padded_stem=padded)


def _likeness(stored: StoredCheckpoint) -> str:
    """Say which architecture the weights look like, where it is another than the one they were tried on."""
    try:
        like = recognise_architecture(stored.trunk.weights).name
    except CheckpointError:
        return ""
    return f"The weights look like {like}. " if like != stored.architecture.name else ""
