"""Strict loading of named tensors into a network: all of them, or an error."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from msn_eval.checkpoints.sanity_checks import TensorInfo
from msn_eval.errors import CheckpointError

MAX_SHOWN = 5


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
    not_finite = {name: info for name, info in infos.items() if info.not_finite}
    if not_finite:
        shown = list(not_finite.items())[:MAX_SHOWN]
        listed = ", ".join(f"{name}: {info.not_finite:,} of {info.values:,}" for name, info in shown)
        raise CheckpointError(
            f"{len(not_finite)} weights hold NaN or infinite values ({listed})",
            where=where,
            hint="A network with such weights gives no meaningful accuracy; use an earlier checkpoint.",
        )
    network.load_state_dict(dict(weights), strict=False)  # what the user allows to be absent stays as it is
