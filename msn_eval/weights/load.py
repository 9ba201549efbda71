"""Named tensors into a network: all of them, or none."""

import fnmatch
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from msn_eval.errors import CheckpointError

_SHOWN = 5


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
    # Batch norm counts its batches only to average them; files of old PyTorch do not have the count.
    needed = {name for name in expected if not name.endswith("num_batches_tracked")}
    waived = {name for name in needed - weights.keys() if any(fnmatch.fnmatch(name, one) for one in allow_missing)}
    missing = sorted(needed - weights.keys() - waived)
    left_over = sorted(weights.keys() - expected.keys())
    reshaped = [name for name in sorted(needed & weights.keys()) if weights[name].shape != expected[name].shape]
    if missing or left_over or reshaped:
        raise _misfit(missing, left_over, reshaped, weights, expected, arch, where)
    _check_plain(weights, expected, where)
    _check_finite(weights, where)
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name in expected}, strict=False)
    whole = sum(expected[name].numel() for name in needed)
    return 1.0 if not waived else 1.0 - sum(expected[name].numel() for name in waived) / whole


def _misfit(
    missing: list[str],
    left_over: list[str],
    reshaped: list[str],
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    arch: str,
    where: str,
) -> CheckpointError:
    lines = [f"  {name}: file {tuple(weights[name].shape)}, model {tuple(expected[name].shape)}" for name in reshaped]
    lines += [f"  {name}: missing in the file" for name in missing]
    lines += [f"  {name}: no place in the model" for name in left_over]
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    listed = "\n".join(lines[:_SHOWN] + more)
    return CheckpointError(
        f"{len(lines)} of {len(expected)} weights do not fit {arch}\n{listed}",
        where=where,
        remedy="Name another architecture with --arch, another network of the file with --checkpoint-key, or, where weights "
        "may stay untrained, --allow-missing PATTERN.",
    )


def _check_plain(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Refuse what would turn into other numbers on the way into the network: integers, complex, sparse, no values."""
    bad = [
        name
        for name, tensor in weights.items()
        if tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or tensor.is_floating_point() != expected[name].is_floating_point()
    ]
    if bad:
        raise CheckpointError(
            f"{len(bad)} weights are no dense real numbers ({', '.join(bad[:_SHOWN])})",
            where=where,
            remedy="Save them dense and in floating point.",
        )


def _check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{len(bad)} weights hold NaN or infinite values ({', '.join(bad[:_SHOWN])})",
            where=where,
            remedy="A network with such weights gives no meaningful accuracy; use an earlier checkpoint.",
        )
