"""Sanity checks of weights: statistics of tensors, and reasons to doubt a network that loads."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msn_eval.checkpoints.families import classifier_classes
from msn_eval.checkpoints.networks import ChosenNetwork
from msn_eval.errors import list_first

_CHUNK_VALUES = 1 << 15  # as many as torch computes on one core: on a busy machine two are slower than one
_MAX_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Statistics of the values of one or several tensors.

    Attributes:
        values: Number of values.
        not_finite: Number of values that are NaN, or infinite in float32, which networks use; excluded from all below.
        zeros: Number of exact zeros.
        total: Sum in float64.
        squares: Sum of squares in float64.
        lowest: Minimum, inf where there is none.
        highest: Maximum, -inf where there is none.
    """

    values: int = 0
    not_finite: int = 0
    zeros: int = 0
    total: float = 0.0
    squares: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf

    @property
    def finite(self) -> int:
        return self.values - self.not_finite

    def all_equal(self, value: float) -> bool:
        """Whether there are values, and all are `value`."""
        return self.values > 0 and not self.not_finite and self.lowest == self.highest == value

    @property
    def mean(self) -> float | None:
        return self.total / self.finite if self.finite else None

    @property
    def std(self) -> float | None:
        """Population standard deviation of the finite values."""
        if not self.finite:
            return None
        return math.sqrt(max(0.0, self.squares / self.finite - (self.total / self.finite) ** 2))


def describe_values(tensor: Tensor) -> TensorInfo:
    """Compute the statistics of a tensor of any dtype and shape. A complex number counts as two values."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return join_statistics(map(_describe_chunk, torch.split(real.detach().reshape(-1), _CHUNK_VALUES)))


def join_statistics(infos: Iterable[TensorInfo]) -> TensorInfo:
    """Compute the statistics of several tensors together."""
    infos = list(infos)
    return TensorInfo(
        values=sum(info.values for info in infos),
        not_finite=sum(info.not_finite for info in infos),
        zeros=sum(info.zeros for info in infos),
        total=math.fsum(info.total for info in infos),
        squares=math.fsum(info.squares for info in infos),
        lowest=min((info.lowest for info in infos), default=math.inf),
        highest=max((info.highest for info in infos), default=-math.inf),
    )


def _describe_chunk(chunk: Tensor) -> TensorInfo:
    if not chunk.numel():
        return TensorInfo()
    numbers = chunk.float() if chunk.is_floating_point() else chunk.double()
    lowest, highest = (float(bound) for bound in numbers.aminmax())
    if not (math.isfinite(lowest) and math.isfinite(highest)):  # one NaN makes both NaN
        finite = _describe_chunk(numbers[numbers.isfinite()])
        return replace(finite, values=chunk.numel(), not_finite=chunk.numel() - finite.values)
    exact = numbers.double()
    return TensorInfo(
        values=chunk.numel(),
        zeros=chunk.numel() - int(numbers.count_nonzero()),
        total=float(exact.sum()),
        squares=float(exact.square_().sum()),  # not a BLAS product, whose threads wait for each other
        lowest=lowest,
        highest=highest,
    )


def find_alarms(choice: ChosenNetwork, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the reasons to doubt the chosen network, a sentence each.

    They are: NaN and infinite values, matrices of zeros, norms at their initial values, a student where the file has a
    teacher, a classifier on top, which means that the network was trained with labels.

    Args:
        choice: The network.
        infos: Statistics of the weights that are used, by name.
    """
    alarms = []
    if not_finite := [f"{name:.80}" for name, info in infos.items() if info.not_finite]:
        alarms.append(f"NaN or infinite values in {list_first(not_finite, _MAX_SHOWN)}")
    if zero := [f"{name:.80}" for name, info in infos.items() if name.endswith("weight") and info.all_equal(0)]:
        alarms.append(f"nothing but zeros in {list_first(zero, _MAX_SHOWN)}")
    if _are_norms_untrained(infos):
        alarms.append("every norm has its initial values (scale 1, shift 0): these weights look untrained")
    if choice.passed_over is not None:
        alarms.append(f"{choice.passed_over.key!r} stands beside it, and is what the method's authors evaluate")
    if (classes := classifier_classes(choice.network)) is not None:
        alarms.append(
            f"a classifier of {classes:,} classes is on top: the weights were trained or fine-tuned with labels"
        )
    return tuple(alarms)


def _are_norms_untrained(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether all norms, vectors of scales beside equally long vectors of shifts, have their initial values."""
    shifts = {name: infos.get(f"{name.removesuffix('weight')}bias") for name in infos if name.endswith(".weight")}
    pairs = [(infos[name], shift) for name, shift in shifts.items() if shift is not None]
    norms = [(scale, shift) for scale, shift in pairs if shift.values == scale.values]
    return bool(norms) and all(scale.all_equal(1) and shift.all_equal(0) for scale, shift in norms)
