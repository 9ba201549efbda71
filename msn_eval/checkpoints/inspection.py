"""Inspection: what a checkpoint's file holds and what an evaluation would use. Nothing from it is executed or built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from msn_eval.checkpoints.sanity_checks import describe_values, join_statistics
from msn_eval.checkpoints.stored import (
    StoredCheckpoint,
    choose_stored,
    describe_misfits,
    fit_weights,
    list_alarms,
    read_contents,
)
from msn_eval.errors import CheckpointError
from msn_eval.models.build import outline_network
from msn_eval.models.vit import find_position_rule, is_dinov2, native_pixels, patch_pixels, stored_pixels


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """One network of a file: its key as --checkpoint-key takes it, and the number of its tensors and values with heads."""

    key: str | None
    tensors: int
    values: int
    used: bool


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `msn-eval inspect` reports. Fields after `problem` are None where the file leaves them open.

    Attributes:
        container: zip, pickle (PyTorch before 1.6) or safetensors.
        sha256: Of the file's bytes.
        notes: What the user may want to know about the reading, such as a matching hash beside the file.
        problem: Why an evaluation would refuse the file, None where it would not.
        key: The network that is used.
        why: The reason for it.
        family: Whose layout it is.
        params: Number of the architecture's values.
        matched: Share of them that the file holds.
        stored_pixels: Side of the images that the positions were learned at.
        image_pixels: Side of the images that it is evaluated at.
        mean: A value per channel of the images, on the [0, 1] scale.
        std: The same.
        mean_std_from: What states them.
        positions: How the positions are interpolated for that, None where they are not.
        used: Names of weights, as the network in the file calls them.
        dropped: The same, of weights that are not used.
        missing: Names of weights, as timm calls them.
        left_over: The same, of weights that the architecture does not have.
        reshaped: Name, shape in the file, shape in the architecture.
        statistics: `values` (their number), `mean`, `std`, `minimum`, `maximum`, `zeros`, `not_finite` and `dtypes` of all
            floating-point values that are used. NaN and infinite values are counted and otherwise excluded.
        alarms: Reasons to doubt the weights, though they load.
    """

    path: str
    container: str
    file_bytes: int
    sha256: str
    notes: tuple[str, ...]
    networks: tuple[NetworkInfo, ...]
    epoch: int | None
    problem: str | None = None
    key: str | None = None
    why: str | None = None
    family: str | None = None
    arch: str | None = None
    params: int | None = None
    matched: float | None = None
    patch_pixels: int | None = None
    stored_pixels: int | None = None
    image_pixels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    mean_std_from: str | None = None
    positions: str | None = None
    used: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    statistics: dict[str, Any] | None = None
    alarms: tuple[str, ...] = ()


def inspect_checkpoint(path: Path, *, arch: str | None = None, key: str | None = None) -> Inspection:
    """Inspect the file or folder at `path`, which is held in memory once; `arch` and `key` as for an evaluation.

    Raises:
        CheckpointError: It cannot be read. What can be read but not evaluated has a `problem` instead.
    """
    contents = read_contents(path)
    found: dict[str, Any] = {}
    used = None
    try:
        stored = choose_stored(contents, arch=arch, key=key)
        contents, used = stored.contents, stored.choice.network
        found |= _describe_choice(stored)
        found |= _describe_fit(stored, found["statistics"]["not_finite"])
    except CheckpointError as error:
        found["problem"] = f"{error.what}\n{error.hint}".strip()
    networks = tuple(
        NetworkInfo(key=network.key, tensors=len(network.tensors), values=network.values, used=network is used)
        for network in contents.networks
    )
    stated = {name: getattr(contents, name) for name in ("container", "file_bytes", "sha256", "notes", "epoch")}
    return Inspection(path=contents.where, networks=networks, **stated, **found)


def _describe_choice(stored: StoredCheckpoint) -> dict[str, Any]:
    """Return the fields about the network that is used."""
    network, dropped = stored.choice.network, set(stored.backbone.dropped)
    used = {name: tensor for name, tensor in network.tensors.items() if name not in dropped}
    # Complex weights become the problem.
    infos = {name: describe_values(tensor) for name, tensor in used.items() if not tensor.is_complex()}
    floating = [name for name in infos if used[name].is_floating_point()]
    info = join_statistics(infos[name] for name in floating)
    return {
        "key": network.key,
        "why": stored.choice.why,
        "family": stored.backbone.format,
        "arch": stored.architecture.name,
        "used": tuple(infos),
        "dropped": (*stored.backbone.dropped, *network.beside),
        "statistics": {
            **{name: getattr(info, name) for name in ("values", "mean", "std", "zeros", "not_finite")},
            "minimum": info.lowest if info.finite else None,
            "maximum": info.highest if info.finite else None,
            "dtypes": sorted({str(used[name].dtype).removeprefix("torch.") for name in floating}),
        },
        "alarms": list_alarms(stored, infos),
    }


def _describe_fit(stored: StoredCheckpoint, not_finite: int) -> dict[str, Any]:
    """Return the fields about the architecture, and how the weights fit it."""
    outline = outline_network(stored.architecture)
    expected, weights = outline.state_dict(), stored.backbone.weights
    fit, normalisation = fit_weights(weights, expected), stored.normalisation
    problem = "weights hold NaN or infinite values" if not_finite else None
    if fit.lines:
        problem = f"{describe_misfits(len(fit.lines), len(expected))} {stored.architecture.name}"
    return {
        "problem": problem,
        "params": sum(parameter.numel() for parameter in outline.parameters()),
        **{name: getattr(fit, name) for name in ("matched", "missing", "left_over")},
        "patch_pixels": patch_pixels(outline),
        "stored_pixels": stored_pixels(outline),
        "image_pixels": stored.native_pixels(outline),
        **{name: getattr(normalisation, name) for name in ("mean", "std")},
        "mean_std_from": normalisation.source,
        "positions": _describe_positions(outline),
        "reshaped": tuple((name, tuple(weights[name].shape), tuple(expected[name].shape)) for name in fit.reshaped),
    }


def _describe_positions(outline: nn.Module) -> str | None:
    stored, patch = stored_pixels(outline), patch_pixels(outline)
    if not is_dinov2(outline) or stored is None or patch is None:
        return None
    before, after = stored // patch, native_pixels(outline) // patch
    rule = find_position_rule(outline, "dinov2")
    return f"{before} x {before} to {after} x {after} patches, {rule}, as the authors evaluate"
