"""StoredCheckpoint: the network of a file or folder that is evaluated, and strict loading of its weights."""

import fnmatch
import hashlib
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from msn_eval.checkpoints.families import Backbone, rename_weights
from msn_eval.checkpoints.formats.read import read_weight_file
from msn_eval.checkpoints.formats.sharded import check_not_flat, check_not_sharded
from msn_eval.checkpoints.hf_config import HubConfig, check_sizes, read_config_beside
from msn_eval.checkpoints.hf_folder import CONFIG, WEIGHT_FILES, find_weight_files
from msn_eval.checkpoints.networks import ChosenNetwork, StoredNetwork, choose_network, find_networks, stated_epoch
from msn_eval.checkpoints.normalisation import IMAGENET, Normalisation, choose_normalisation, read_normalisation
from msn_eval.checkpoints.sanity_checks import TensorInfo, find_alarms
from msn_eval.checkpoints.timm_names import convert_names
from msn_eval.errors import CheckpointError, format_count, list_first, name_place
from msn_eval.models.architectures import (
    IMAGE_CHANNELS,
    Architecture,
    check_channels,
    name_architecture,
    recognise_architecture,
)
from msn_eval.models.build import outline_network
from msn_eval.models.hub import HubNetwork, load_hub
from msn_eval.models.readout import Readout, find_readout
from msn_eval.models.vit import find_other_grid, native_pixels, stored_pixels

_log = logging.getLogger(__name__)
_SLACK_BYTES = 1 << 20
_MAX_SHOWN = 5
_MAX_TENSORS = 20_000  # the published networks have a few hundred
# Names of what a safetensors file may state about itself; msn_pretrain and `convert` write them.
ARCHITECTURE, EPOCH, IMAGE_PIXELS = "msn_eval.architecture", "epoch", "msn_eval.image_pixels"
MEAN, STD = "msn_eval.mean", "msn_eval.std"
POSITIONS = "msn_eval.positions"  # by `convert`: whose interpolation of position embeddings applies


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file, or the weight files of a folder, hold.

    Attributes:
        where: The path, for errors.
        container: zip, pickle or safetensors.
        sha256: Of the file's bytes; of several files, of their lines `name TAB sha256`.
        file_bytes: Size of all files.
        notes: What the user may want to know about the reading.
        content: Tensors and plain values by name.
        networks: The networks in it.
        epoch: As stated.
        config: What the config.json that belongs to the weights states.
        stated_arch: The architecture that a safetensors file states, as `--arch` takes it: no weight's shape shows heads.
        stated_pixels: Side of the images that it states to be trained on; no weight of a convolutional network shows it.
        normalisation: Mean and std that the file or folder states.
        stated_positions: Whose interpolation of position embeddings it states to apply, as `Backbone.positions`.
    """

    where: str
    container: str
    sha256: str
    file_bytes: int
    notes: tuple[str, ...]
    content: Mapping[str, object]
    networks: tuple[StoredNetwork, ...]
    epoch: int | None
    config: HubConfig
    stated_arch: str | None = None
    stated_pixels: int | None = None
    normalisation: Normalisation | None = None
    stated_positions: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The comparison of a file's weights with those of an architecture, by name and shape.

    Attributes:
        missing: Names that the file lacks and that must not be absent.
        left_over: Names of the file that the network does not have.
        reshaped: Names that both have, with different shapes.
        waived: Names that the file lacks and that the user allows to be absent.
        matched: Share of the network's values that the file holds, in [0, 1].
        lines: What does not fit, one line per weight: names, shapes, and integers or complex numbers.
    """

    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    reshaped: tuple[str, ...]
    waived: tuple[str, ...]
    matched: float
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """The evaluated network of a file or folder: its weights by timm's names, and their architecture."""

    contents: Contents
    choice: ChosenNetwork
    backbone: Backbone
    architecture: Architecture
    is_named: bool = False  # whether the user named the architecture
    network: HubNetwork | None = None  # loaded in full, where transformers runs it
    readout: Readout | None = None  # of that network

    @property
    def normalisation(self) -> Normalisation:
        """Mean and std of the images, and where they come from."""
        stated, family = self.contents.normalisation, self.backbone.format
        return choose_normalisation(self.architecture, stated=stated, family=family)

    def native_pixels(self, network: nn.Module) -> int:
        """Return the native image size of the network: by its position embeddings, or else as the file states."""
        stated = self.contents.stated_pixels
        return native_pixels(network) if stated is None or stored_pixels(network) is not None else stated

    @property
    def positions(self) -> str | None:
        """Whose interpolation of position embeddings applies, as `Backbone.positions`."""
        own, contents = self.backbone.positions, self.contents
        tag = (self.architecture.timm_name or "").partition(".")[2]
        if contents.stated_positions is not None:
            return contents.stated_positions
        if contents.config.model_type is not None:
            # DINO is published there as a ViT without classifier and pooler.
            return {"vit_msn": "msn", "vit": "dino" if own == "msn" else None}.get(contents.config.model_type, own)
        if contents.stated_arch is not None:  # by msn_pretrain
            return "msn"
        if own == "open" and tag:
            return "dino" if tag == "dino" else None
        return own


def read_contents(path: Path) -> Contents:
    """Read the weights at `path`, a file or a folder in Hugging Face layout, without executing anything from them.

    Raises:
        CheckpointError: They are missing, damaged or hostile.
    """
    check_not_sharded(path)
    folder = path if path.is_dir() else path.parent
    files = find_weight_files(folder) if path.is_dir() else (path,)
    has_config = path.is_dir() or (path.name in WEIGHT_FILES and os.path.lexists(folder / CONFIG))
    config = read_config_beside(folder) if has_config else HubConfig()
    weights = [read_weight_file(file) for file in files]
    content: dict[str, object] = {}
    for file, part in zip(files, weights, strict=True):
        if duplicates := content.keys() & part.content.keys():
            what = f"holds {min(duplicates)}, which another file of the folder holds too"
            raise CheckpointError(what, where=str(file), hint="The folder mixes two checkpoints; fetch it again.")
        content |= part.content
    check_not_flat(content, path)
    stated = weights[0].metadata if len(files) == 1 else {}
    lines = "".join(f"{file.name}\t{part.sha256}\n" for file, part in zip(files, weights, strict=True))
    pixels = stated.get(IMAGE_PIXELS, "")
    return Contents(
        where=str(path),
        container=weights[0].container,
        sha256=weights[0].sha256 if len(files) == 1 else hashlib.sha256(lines.encode()).hexdigest(),
        file_bytes=sum(part.file_bytes for part in weights),
        notes=tuple(note for part in weights for note in part.notes),
        content=content,
        networks=find_networks(content),
        epoch=stated_epoch(stated if EPOCH in stated else content),
        config=config,
        stated_arch=stated.get(ARCHITECTURE),
        stated_pixels=int(pixels) if re.fullmatch(r"[1-9]\d{0,4}", pixels) else config.pixels,
        normalisation=_read_normalisation(stated, str(path)) or config.normalisation,
        stated_positions=stated.get(POSITIONS),
    )


def describe_normalisation(normalisation: Normalisation) -> dict[str, str]:
    """Return what a safetensors file states about its mean and std; nothing where they are a guess."""
    stated = {} if normalisation.is_assumed else {MEAN: normalisation.mean, STD: normalisation.std}
    return {name: ",".join(map(repr, values)) for name, values in stated.items()}


def _read_normalisation(stated: Mapping[str, str], where: str) -> Normalisation | None:
    """Return mean and std that a file states; ImageNet's for files of msn-pretrain from before it stated them."""
    if not stated.keys() & {MEAN, STD}:
        return replace(IMAGENET, source="msn-pretrain") if ARCHITECTURE in stated else None
    numbers: dict[str, object] = {**stated}
    for name in stated.keys() & {MEAN, STD}:
        with suppress(ValueError):  # what is no number is refused as it is
            numbers[name] = [float(number) for number in stated[name].split(",")]
    return read_normalisation(numbers, where=where, source="the file", prefix=MEAN.removesuffix("mean"))


def choose_stored(contents: Contents, *, arch: str | None = None, key: str | None = None) -> StoredCheckpoint:
    """Choose the network that is evaluated, rename its weights, and recognise its architecture.

    Args:
        contents: Of the file or folder.
        arch: timm's name of the architecture, where the file leaves it open.
        key: Which of several networks.

    Raises:
        CheckpointError: The network or its architecture stays open.
    """
    hub = contents.config.hub if arch is None else None
    if hub is not None:  # transformers gets all weights
        tensors = {name: value for name, value in contents.content.items() if isinstance(value, Tensor)}
        contents = replace(contents, networks=(StoredNetwork(key=None, words=(), tensors=tensors),))
    choice = choose_network(contents.networks, key, where=contents.where)
    _check_size(contents, choice.network)
    common: dict[str, Any] = {"contents": contents, "choice": choice, "is_named": arch is not None}
    with name_place(contents.where):
        if hub is None:
            backbone = rename_weights(choice.network)
            architecture = _find_architecture(contents, backbone, arch)
            backbone = _convert_names(backbone, choice.network, architecture)
            return StoredCheckpoint(backbone=backbone, architecture=architecture, **common)
        outline_network(hub)  # before memory is taken for what the config claims
        network, dropped = load_hub(cast(Mapping[str, object], hub.hub), choice.network.tensors)
        backbone = Backbone(format="huggingface", weights=network.state_dict(), dropped=dropped)
        stored = StoredCheckpoint(backbone=backbone, architecture=hub, network=network, **common)
        # Tried once: what cannot be evaluated is refused here.
        return replace(stored, readout=find_readout(network, stored.native_pixels(network)))


def check_stored(stored: StoredCheckpoint, allow_missing: tuple[str, ...] = ()) -> float:
    """Check the weights against an outline of the network, without building it in memory.

    Returns:
        The share of the network's values that the weights hold, in (0, 1].

    Raises:
        CheckpointError: They do not fit the architecture in full.
    """
    weights = stored.backbone.weights
    expected = outline_network(stored.architecture).state_dict()
    fit = fit_weights(weights, expected, allow_missing)
    for name in fit.reshaped:
        own, model = weights[name].shape, expected[name].shape
        if len(own) == 4 and model[1] == IMAGE_CHANNELS and own[:1] + own[2:] == model[:1] + model[2:]:
            check_channels(own[1], where=stored.contents.where)
    if fit.lines:
        key = stored.choice.network.key
        arch = stored.architecture.name + (f" (network {key!r} of the file)" if key else "")
        listed = list_first(fit.lines, _MAX_SHOWN, "\n  ")
        what = f"{describe_misfits(len(fit.lines), len(expected))} {arch}\n  {listed}"
        raise CheckpointError(what, where=stored.contents.where, hint=_suggest_options(stored, allow_missing))
    if fit.waived:
        _log.warning("%s: absent, so left untrained: %s", stored.contents.where, ", ".join(fit.waived))
    return fit.matched


def describe_misfits(misfits: int, weights: int) -> str:
    """Return how many weights do not fit, such as `1 of 150 weights does not fit`."""
    return f"{misfits} of {format_count(weights, 'weight')} {'does' if misfits == 1 else 'do'} not fit"


def list_alarms(stored: StoredCheckpoint, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the reasons to doubt the chosen network, a sentence each: those of `find_alarms`, and positions of another grid.

    Args:
        stored: The network.
        infos: Statistics of the weights that are used, by name.
    """
    alarms, positions = find_alarms(stored.choice, infos), stored.backbone.weights.get("pos_embed")
    if positions is None or (other := find_other_grid(positions)) is None:
        return alarms
    rows, columns = other
    side = math.isqrt(rows * columns)
    alarm = (
        f"the position embeddings look as if learned for {rows} x {columns} patches; they are read as {side} x {side}. "
    )
    alarm += "Wrap a network for images that are no squares: py:package.module:factory"
    return (*alarms, alarm)


def _check_size(contents: Contents, network: StoredNetwork) -> None:
    """Refuse a network that is larger than its file, and one of more tensors than any network has."""
    network_bytes = sum(tensor.nbytes for tensor in network.tensors.values())
    if network_bytes > 2 * contents.file_bytes + _SLACK_BYTES or len(network.tensors) > _MAX_TENSORS:
        what = f"holds a network of {len(network.tensors):,} tensors and {network_bytes:,} bytes "
        what += f"in a file of {contents.file_bytes:,}"
        hint = "Weights that share their bytes are refused; where it was made, save them with .clone()."
        raise CheckpointError(what, where=contents.where, hint=hint)


def _find_architecture(contents: Contents, backbone: Backbone, arch: str | None) -> Architecture:
    """Return the architecture that the user, the file or its config names, or else the one that the shapes imply."""
    config, name = contents.config, arch or contents.stated_arch
    if name is not None:
        return name_architecture(name)
    if config.architecture is not None:
        return config.architecture
    is_described = config.model_type is not None
    heads, norm_eps = (config.heads, config.norm_eps) if is_described else (backbone.heads, backbone.norm_eps)
    # solo-learn's resnet18 for CIFAR begins with nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2).
    is_padded = backbone.format == "solo-learn"
    recognised = recognise_architecture(backbone.weights, heads=heads, norm_eps=norm_eps, padded_stem=is_padded)
    if config.sizes:
        check_sizes(config, backbone.weights, recognised, where=contents.where)
    return recognised


def _convert_names(backbone: Backbone, network: StoredNetwork, architecture: Architecture) -> Backbone:
    """Let timm convert the names of its own architecture where the families' do not fit, such as the norm in ConvNeXt's head."""
    if architecture.timm_name is None:
        return backbone
    expected = outline_network(architecture).state_dict()
    fit = fit_weights(backbone.weights, expected)
    if not fit.lines:
        # Other networks of timm have BEiT's scales.
        is_known = backbone.format != "other" and (backbone.format != "beit" or "beit" in architecture.timm_name)
        return backbone if is_known else replace(backbone, format="timm")
    try:
        converted = convert_names(network, architecture)
    except ValueError as error:
        if backbone.weights.keys() & expected.keys():
            return backbone  # whose misfits are listed
        hint = "Use the architecture, and the image size, of the file; `msn-eval inspect` lists what it holds."
        raise CheckpointError(str(error), hint=hint) from error
    if fit_weights(converted[0], expected).matched <= fit.matched:
        return backbone
    return Backbone(format="timm", weights=converted[0], dropped=converted[1])


def _suggest_options(stored: StoredCheckpoint, allow_missing: tuple[str, ...]) -> str:
    """Return a hint with the architecture that the weights look like, and the options that the user has not given."""
    hint = ""
    with suppress(CheckpointError):
        if (name := recognise_architecture(stored.backbone.weights).name) != stored.architecture.name:
            hint = f"The weights look like {name}. "
    options = [] if stored.is_named else ["another architecture with --arch"]
    options += ["another network of the file with --checkpoint-key"] if len(stored.contents.networks) > 1 else []
    options += [] if allow_missing else ["the weights that may stay untrained with --allow-missing PATTERN"]
    hint += f"Name {' or '.join(options)}. " if options else ""
    return f"{hint}`msn-eval inspect` lists the file's names and shapes."


def fit_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], allow_missing: tuple[str, ...] = ()
) -> Fit:
    """Compare the names and shapes of a file's weights with those that an architecture has.

    Args:
        weights: Of the file.
        expected: The architecture's state dict.
        allow_missing: Patterns of weights that may be absent.
    """
    # Batch norm counts its batches only to average them, and files of old PyTorch do not have the count.
    needed = {name for name in expected if not name.endswith("num_batches_tracked")}
    absent = sorted(needed - weights.keys())
    waived = tuple(name for name in absent if any(fnmatch.fnmatch(name, pattern) for pattern in allow_missing))
    missing = tuple(name for name in absent if name not in waived)
    left_over = tuple(sorted(weights.keys() - expected.keys()))
    reshaped = tuple(name for name in sorted(needed & weights.keys()) if weights[name].shape != expected[name].shape)
    # Integers and complex numbers would become different numbers in the network.
    shared = [(name, weights[name].dtype, expected[name].dtype) for name in sorted(weights.keys() & expected.keys())]
    retyped = [(name, own, dtype) for name, own, dtype in shared if own.is_floating_point != dtype.is_floating_point]
    total = sum(expected[name].numel() for name in needed)
    lost = sum(expected[name].numel() for name in (*absent, *reshaped))
    return Fit(
        missing=missing,
        left_over=left_over,
        reshaped=reshaped,
        waived=waived,
        matched=1.0 - lost / total if total else 0.0,
        lines=(
            *(f"{name}: file {tuple(weights[name].shape)}, model {tuple(expected[name].shape)}" for name in reshaped),
            *(f"{name}: file {own}, model {dtype}" for name, own, dtype in retyped),
            *(f"{name}: missing in the file" for name in missing),
            *(f"{name}: no place in the model" for name in left_over),
        ),
    )


def load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], infos: Mapping[str, TensorInfo], *, where: str
) -> None:
    """Load weights that fit into a network.

    Args:
        network: Gets the weights.
        weights: By the network's names.
        infos: Statistics of the weights, by the same names.
        where: The file, for the error.

    Raises:
        CheckpointError: A weight is not finite.
    """
    counts = [f"{name:.80}: {info.not_finite:,} of {info.values:,}" for name, info in infos.items() if info.not_finite]
    if counts:
        weights_hold = format_count(len(counts), "weight holds", "weights hold")
        what = f"{weights_hold} NaN or infinite values ({list_first(counts, _MAX_SHOWN)})"
        hint = "A network with such weights gives no meaningful accuracy; use an earlier checkpoint."
        raise CheckpointError(what, where=where, hint=hint)
    network.load_state_dict(dict(weights), strict=False)  # what the user allows to be absent stays as it is
