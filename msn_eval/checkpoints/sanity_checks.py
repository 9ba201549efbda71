"""TensorFacts: what is to be said of a tensor's values, gathered in one pass and little memory."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from msn_eval.checkpoints.families import classifier_classes
from msn_eval.checkpoints.networks import ChosenNetwork

_CHUNK_VALUES = 1 << 15  # as many as torch computes on one core: beside a busy neighbour two are slower than one


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Of one tensor's values, or of several tensors' together.

    values:           all of them
    not_finite:       those that are NaN, or infinite in float32, which networks are in; left out of everything below
    zeros:            exact ones
    total, squares:   sums in float64
    lowest, highest:  inf and -inf where there is none
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
        """Tell whether there are values and every one of them is `value`."""
        return self.values > 0 and not self.not_finite and self.lowest == self.highest == value

    @property
    def mean(self) -> float | None:
        return self.total / self.finite if self.finite else None

    @property
    def std(self) -> float | None:
        """Give the standard deviation of the finite values, as of a whole population."""
        if not self.finite:
            return None
        return math.sqrt(max(0.0, self.squares / self.finite - (self.total / self.finite) ** 2))


def describe_values(pieces: Iterable[Tensor]) -> TensorInfo:
    """Gather the facts of tensors of any dtype and shape; complex numbers count as two."""
    real = (torch.view_as_real(piece) if piece.is_complex() else piece for piece in pieces)
    return join_facts(_of_chunk(chunk) for piece in real for chunk in chunks(piece))


def join_facts(several: Iterable[TensorInfo]) -> TensorInfo:
    """Give the facts of several tensors together."""
    facts = list(several)
    return TensorInfo(
        values=sum(one.values for one in facts),
        not_finite=sum(one.not_finite for one in facts),
        zeros=sum(one.zeros for one in facts),
        total=math.fsum(one.total for one in facts),
        squares=math.fsum(one.squares for one in facts),
        lowest=min((one.lowest for one in facts), default=math.inf),
        highest=max((one.highest for one in facts), default=-math.inf),
    )


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Give a tensor's values piece by piece, so that what is computed from them stays small."""
    yield from torch.split(tensor.detach().reshape(-1), _CHUNK_VALUES)


def count_not_finite(tensor: Tensor) -> int:
    """Count values that are NaN or infinite in float32."""
    if not tensor.is_floating_point():
        return 0
    return sum(_of_chunk(chunk).not_finite for chunk in chunks(tensor))


def _of_chunk(chunk: Tensor) -> TensorInfo:
    if not chunk.numel():
        return TensorInfo()
    exact = (chunk.float() if chunk.is_floating_point() else chunk).double()
    lowest, highest = (float(one) for one in exact.aminmax())
    values = chunk.numel()
    if not (math.isfinite(lowest) and math.isfinite(highest)):  # one NaN makes NaN of both
        exact = exact[exact.isfinite()]
        if not exact.numel():
            return TensorInfo(values=values, not_finite=values)
        lowest, highest = (float(one) for one in exact.aminmax())
    return TensorInfo(
        values=values,
        not_finite=values - exact.numel(),
        zeros=exact.numel() - int(exact.count_nonzero()),
        total=float(exact.sum()),
        squares=float(exact.square().sum()),  # no product of BLAS, whose threads wait for each other
        lowest=lowest,
        highest=highest,
    )


_SHOWN = 3


def find_alarms(choice: ChosenNetwork, facts: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Give what is doubtful about the network chosen for evaluation, a sentence each.

    facts: of the weights that are used, by name
    NaN and infinite values; matrices of zeros alone; norms that were never trained; a student where there is a teacher; a
    classifier on top, which means that labels were seen.
    """
    found = []
    not_finite = [name for name, one in facts.items() if one.not_finite]
    if not_finite:
        found.append(f"NaN or infinite values in {_listed(not_finite)}")
    zero = [name for name, one in facts.items() if name.endswith("weight") and one.all_equal(0)]
    if zero:
        found.append(f"nothing but zeros in {_listed(zero)}")
    if _are_untouched(facts):
        found.append("every norm has its initial values (scale 1, shift 0): these weights look untrained")
    if choice.passed_over is not None:
        found.append(f"{choice.passed_over.key!r} stands beside it, and is what the method's authors evaluate")
    classes = classifier_classes(choice.network)
    if classes is not None:
        found.append(
            f"a classifier of {classes:,} classes is on top: the weights were trained or fine-tuned with labels"
        )
    return tuple(found)


def _are_untouched(facts: Mapping[str, TensorInfo]) -> bool:
    """Tell whether every norm is as it was initialised: a vector of scales beside a vector of shifts as long."""
    norms = []
    for name, scale in facts.items():
        shift = facts.get(name.removesuffix("weight") + "bias") if name.endswith(".weight") else None
        if shift is not None and shift.values == scale.values:
            norms.append((scale, shift))
    return bool(norms) and all(scale.all_equal(1) and shift.all_equal(0) for scale, shift in norms)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
