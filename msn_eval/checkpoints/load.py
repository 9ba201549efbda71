"""Named tensors into a network: all of them, or none."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.sanity_checks import count_not_finite
from msn_eval.errors import CheckpointError

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the weights of a file and those of an architecture compare, by name and shape.

    missing:   names that the file lacks and that nobody allowed to be absent
    left_over: names of the file that have no place in the network
    reshaped:  names that are in both with different shapes
    waived:    names that the file lacks by the user's leave
    matched:   share of the network's values that the file holds, in [0, 1]
    lines:     what does not fit, a line each
    """

    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    reshaped: tuple[str, ...]
    waived: tuple[str, ...]
    matched: float
    lines: tuple[str, ...]


def fit_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], allow_missing: tuple[str, ...] = ()
) -> Fit:
    """Compare the weights of a file with those that an architecture has; only names and shapes are looked at.

    allow_missing: patterns of weights that may be absent
    """
    # Batch norm counts its batches only to average them; files of old PyTorch do not have the count.
    needed = {name for name in expected if not name.endswith("num_batches_tracked")}
    absent = sorted(needed - weights.keys())
    waived = tuple(name for name in absent if any(fnmatch.fnmatch(name, one) for one in allow_missing))
    missing = tuple(name for name in absent if name not in waived)
    left_over = tuple(sorted(weights.keys() - expected.keys()))
    reshaped = tuple(name for name in sorted(needed & weights.keys()) if weights[name].shape != expected[name].shape)
    whole = sum(expected[name].numel() for name in needed)
    lost = sum(expected[name].numel() for name in (*absent, *reshaped))
    return Fit(
        missing=missing,
        left_over=left_over,
        reshaped=reshaped,
        waived=waived,
        matched=1.0 - lost / whole if whole else 0.0,
        lines=(
            *(f"{one}: file {tuple(weights[one].shape)}, model {tuple(expected[one].shape)}" for one in reshaped),
            *(f"{one}: missing in the file" for one in missing),
            *(f"{one}: no place in the model" for one in left_over),
        ),
    )


def check_fit(fit: Fit, *, of: int, arch: str, where: str, hint: str = "") -> None:
    """Raise CheckpointError showing the first weights that do not fit, where any does not.

    of:   how many weights the network has
    arch: what it is called in the error
    hint: what the weights look like instead
    """
    if not fit.lines:
        return
    more = [f"and {len(fit.lines) - _SHOWN} more"] if len(fit.lines) > _SHOWN else []
    listed = "\n".join(f"  {line}" for line in [*fit.lines[:_SHOWN], *more])
    raise CheckpointError(
        f"{len(fit.lines)} of {of} weights do not fit {arch}\n{listed}",
        where=where,
        hint=f"{hint}Name another architecture with --arch, another network of the file with --checkpoint-key, or, where "
        "weights may stay untrained, --allow-missing PATTERN.",
    )


def load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], *, arch: str, allow_missing: tuple[str, ...], where: str
) -> float:
    """Put `weights` into `network`, every one of them into its place, and give the share of values that came from them.

    arch:          what the network is called in errors
    allow_missing: patterns of weights that may stay as they are
    where:         the file, for errors
    Raises CheckpointError where a weight is missing, left over, of another shape, no dense real
    number, or not finite.
    """
    expected = network.state_dict()
    fit = fit_weights(weights, expected, allow_missing)
    check_fit(fit, of=len(expected), arch=arch, where=where)
    _check_plain(weights, expected, where)
    _check_finite(weights, where)
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name in expected}, strict=False)
    return fit.matched


def _check_plain(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Refuse what would turn into other numbers on the way into the network: integers, complex, sparse, no values."""
    bad = list(not_real(weights, expected)) + [
        name for name, tensor in weights.items() if tensor.layout != torch.strided or tensor.device.type != "cpu"
    ]
    if bad:
        raise CheckpointError(
            f"{len(bad)} weights are no dense real numbers ({', '.join(bad[:_SHOWN])})",
            where=where,
            hint="Save them dense and in floating point.",
        )


def not_real(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Give the names of weights that are integers or complex where the network has real numbers, or the reverse."""
    return tuple(name for name in weights if weights[name].is_floating_point() != expected[name].is_floating_point())


def _check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    bad = {name: lost for name, tensor in weights.items() if (lost := count_not_finite(tensor))}
    if bad:
        shown = ", ".join(f"{name}: {lost:,} of {weights[name].numel():,}" for name, lost in list(bad.items())[:_SHOWN])
        raise CheckpointError(
            f"{len(bad)} weights hold NaN or infinite values ({shown})",
            where=where,
            hint="A network with such weights gives no meaningful accuracy; use an earlier checkpoint.",
        )
