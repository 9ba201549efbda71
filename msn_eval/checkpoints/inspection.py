"""Inspection: what a checkpoint's file holds and what an evaluation would make of it. Nothing from it is run or built."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from msn_eval.checkpoints.load import fit_weights, not_real
from msn_eval.checkpoints.networks import StoredNetwork
from msn_eval.checkpoints.sanity_checks import TensorInfo, describe_values, find_alarms, join_facts
from msn_eval.checkpoints.stored import Contents, StoredCheckpoint, choose_stored, read_outline
from msn_eval.errors import CheckpointError
from msn_eval.models.build import outline_network
from msn_eval.models.vit import patch_pixels, published_rule, stored_pixels

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """One network of a file. key: as --checkpoint-key takes it; values: of all its tensors, heads included."""

    key: str | None
    tensors: int
    values: int
    used: bool


@dataclass(frozen=True, kw_only=True)
class WeightStatistics:
    """Of all floating-point values that are used; NaN and infinite ones are counted and left out of the rest."""

    values: int
    mean: float | None
    std: float | None
    minimum: float | None
    maximum: float | None
    zeros: int
    not_finite: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `msn-eval inspect` tells. Fields after `problem` are None where the file leaves them open.

    container:     zip, pickle (PyTorch before 1.6) or safetensors
    sha256:        of the file's bytes
    notes:         what reading brought up, such as a matching hash beside the file
    problem:       why an evaluation would refuse the file, None where it would take it
    key, why:      the network that is used, and the reason
    family:        whose layout it is
    params:        values that the architecture has
    matched:       share of them that the file holds
    stored_pixels: side of the images that the positions were learned at
    image_pixels:  side of the images that it is evaluated at
    positions:     how the positions are changed for that, None where they are not
    used, dropped: names of weights, as the network in the file calls them
    missing, left_over: names of weights, as timm calls them
    reshaped:      name, shape in the file, shape in the architecture
    alarms:        reasons to doubt the weights, though they load
    """

    path: str
    container: str
    file_bytes: int
    sha256: str
    notes: tuple[str, ...]
    networks: tuple[NetworkInfo, ...]
    epoch: int | None
    problem: str | None
    key: str | None = None
    why: str | None = None
    family: str | None = None
    arch: str | None = None
    params: int | None = None
    matched: float | None = None
    patch_pixels: int | None = None
    stored_pixels: int | None = None
    image_pixels: int | None = None
    positions: str | None = None
    used: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    statistics: WeightStatistics | None = None
    alarms: tuple[str, ...] = ()


def inspect_checkpoint(path: Path, *, arch: str | None = None, key: str | None = None) -> Inspection:
    """Inspect the file or folder at `path`.

    arch, key: as an evaluation takes them
    Raises CheckpointError where it cannot be read; what can be read and not be evaluated has a `problem` instead.
    """
    contents = read_outline(path)
    facts = _of_contents(contents, used=None)
    try:
        stored = choose_stored(contents, arch=arch, key=key)
        facts = _of_choice(stored)
        return _of_architecture(facts, stored)
    except CheckpointError as error:
        return replace(facts, problem=f"{error.what}\n{error.hint}".strip())


def _of_contents(contents: Contents, *, used: StoredNetwork | None) -> Inspection:
    return Inspection(
        path=contents.where,
        container=contents.container,
        file_bytes=contents.file_bytes,
        sha256=contents.sha256,
        notes=contents.notes,
        networks=tuple(
            NetworkInfo(key=one.key, tensors=len(one.tensors), values=one.values, used=one is used)
            for one in contents.networks
        ),
        epoch=contents.epoch,
        problem=None,
    )


def _of_choice(stored: StoredCheckpoint) -> Inspection:
    choice, trunk = stored.choice, stored.trunk
    facts = _facts(stored)
    return replace(
        _of_contents(stored.contents, used=choice.network),
        key=choice.network.key,
        why=choice.why,
        family=trunk.format,
        arch=stored.architecture.name,
        used=tuple(facts),
        dropped=(*trunk.dropped, *choice.network.beside),
        statistics=_statistics(facts, choice.network.tensors),
        alarms=find_alarms(choice, facts),
    )


def _of_architecture(facts: Inspection, stored: StoredCheckpoint) -> Inspection:
    outline = outline_network(stored.architecture)
    expected, weights = outline.state_dict(), stored.trunk.weights
    fit = fit_weights(weights, expected)
    wrong = facts.statistics is not None and facts.statistics.not_finite > 0
    problem = f"{len(fit.lines)} of {len(expected)} weights do not fit {facts.arch}" if fit.lines else None
    if problem is None and (bad := not_real(weights, expected)):
        problem = f"{len(bad)} weights are no dense real numbers ({', '.join(bad[:_SHOWN])})"
    return replace(
        facts,
        problem=problem or ("weights hold NaN or infinite values" if wrong else None),
        params=sum(parameter.numel() for parameter in outline.parameters()),
        matched=fit.matched,
        patch_pixels=patch_pixels(outline),
        stored_pixels=stored_pixels(outline),
        image_pixels=stored.native_pixels(outline),
        positions=_position_change(outline),
        missing=fit.missing,
        left_over=fit.left_over,
        reshaped=tuple((name, tuple(weights[name].shape), tuple(expected[name].shape)) for name in fit.reshaped),
    )


def _position_change(outline: nn.Module) -> str | None:
    rule, stored, patch = published_rule(outline), stored_pixels(outline), patch_pixels(outline)
    if rule is None or stored is None or patch is None:
        return None
    how = "antialiased" if rule.antialias else f"offset {rule.offset:g}"
    before, after = stored // patch, rule.image_pixels // patch
    return f"{before} x {before} to {after} x {after} patches, bicubic, {how}, as the authors evaluate"


def _facts(stored: StoredCheckpoint) -> dict[str, TensorInfo]:
    """Give the facts of every stored tensor that is used, by the file's names."""
    unused = set(stored.trunk.dropped)
    return {
        name: describe_values(stored.contents.pieces(tensor))
        for name, tensor in stored.choice.network.tensors.items()
        if name not in unused and not tensor.is_complex()  # which no network takes: the problem will say so
    }


def _statistics(facts: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor]) -> WeightStatistics:
    floating = [name for name in facts if tensors[name].is_floating_point()]
    whole = join_facts(facts[name] for name in floating)
    return WeightStatistics(
        values=whole.values,
        mean=whole.mean,
        std=whole.std,
        minimum=whole.lowest if whole.finite else None,
        maximum=whole.highest if whole.finite else None,
        zeros=whole.zeros,
        not_finite=whole.not_finite,
        dtypes=tuple(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in floating})),
    )
