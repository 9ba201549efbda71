"""Bank: labelled rows made ready for searches, once: checked, measured, equal ones found."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msn_eval.errors import NumericalError
from msn_eval.probes.knn_search.cosine import row_lengths, unit_rows
from msn_eval.process import available_bytes

_STEP_VALUES = 1 << 22  # values that a pass over rows holds at once, in float64: 32 MiB
_WIDE_VALUES = 1 << 26  # of a bank that is kept in float64 too: 512 MiB
_WIDE_BYTES = 32  # of free memory for each of them
_SHOWN = 5  # rows in an error


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Which rows of a bank are the same.

    first:  (distinct,) int64, the earliest of each kind, rising
    ids:    (n,) int64, all rows: those of a kind together, the kinds in the order of `first`, each rising
    starts: (distinct + 1,) int64, where each kind's ids begin in `ids`
    """

    first: Tensor
    ids: Tensor
    starts: Tensor


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Rows to search among, each kind of row once.

    values:  (distinct, d) float32 or float64, as given
    lengths: (distinct,) float64
    copies:  None where no row repeats
    """

    values: Tensor
    lengths: Tensor
    copies: Copies | None

    @property
    def rows(self) -> int:
        return len(self.values) if self.copies is None else len(self.copies.ids)

    @cached_property
    def wide(self) -> Tensor | None:
        """The values in float64, on a processor, where they are no more than `_WIDE_VALUES` and memory is not short."""
        free = available_bytes()
        most = _WIDE_VALUES if free is None else min(_WIDE_VALUES, free // _WIDE_BYTES)
        if self.values.device.type != "cpu" or self.values.numel() > most:
            return None
        return self.values.to(torch.float64)

    @cached_property
    def float32(self) -> "Rounded":
        return rounded(self.values, self.lengths, torch.float32)

    @cached_property
    def bfloat16(self) -> "Rounded":
        return rounded(self.values, self.lengths, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Rows of unit length in fewer bits, and what that did to them.

    values: (n, d) in the narrower type
    drift:  (n,) float64, the distance of each row from the unit row that it stands for
    """

    values: Tensor
    drift: Tensor


def index_bank(values: Tensor) -> Bank:
    """Make rows ready for searches.

    values: (n, d) floating, n and d >= 1
    Raises NumericalError for rows that are not finite: in a search NaN ranks before everything.
    """
    kept = as_searched(values)
    check_finite(kept, "labelled row")
    copies = _find_copies(kept)
    distinct = kept if copies is None else kept[copies.first]
    return Bank(values=distinct, lengths=row_lengths(distinct), copies=copies)


def as_searched(values: Tensor) -> Tensor:
    """Give rows in float64 where they came so, else in float32."""
    return (values if values.dtype == torch.float64 else values.to(torch.float32)).contiguous()


def check_finite(values: Tensor, what: str) -> None:
    """Raise NumericalError where a row holds NaN or infinity, with the first such rows."""
    step = max(1, _STEP_VALUES // values.shape[1])
    bad = torch.cat([~part.isfinite().all(dim=1) for part in torch.split(values, step)]).nonzero()[:, 0]
    if len(bad):
        shown = ", ".join(map(str, bad[:_SHOWN].tolist())) + (", …" if len(bad) > _SHOWN else "")
        raise NumericalError(
            f"{len(bad)} of {len(values)} {what}s {'is' if len(bad) == 1 else 'are'} not finite: {shown}",
            remedy="The features overflowed; retry with --precision fp32.",
        )


def rounded(values: Tensor, lengths: Tensor, dtype: torch.dtype) -> Rounded:
    """Round rows of unit length to `dtype`, and measure how far each moved.

    The drift is that of these very rows, computed in float64 and enlarged by what that computation can have lost.
    """
    narrow = torch.empty(values.shape, dtype=dtype, device=values.device)
    drift = torch.empty(len(values), dtype=torch.float64, device=values.device)
    step = max(1, _STEP_VALUES // values.shape[1])
    for start in range(0, len(values), step):
        some = slice(start, start + step)
        unit = unit_rows(values[some], lengths[some])
        narrow[some] = unit.to(dtype)
        drift[some] = (narrow[some].to(torch.float64) - unit).norm(dim=1)
    lost = (values.shape[1] + 16) * 2.0**-53
    return Rounded(values=narrow, drift=drift * (1 + lost) + lost)


def _find_copies(values: Tensor) -> Copies | None:
    """Find equal rows by a hash of their bits, and look at the rows themselves before they count as equal.

    Of two kinds of rows with one hash, which nobody will meet, those unlike the earliest stay kinds by themselves.
    """
    n, place = len(values), torch.arange(len(values), device=values.device)
    by_hash = torch.unique(_hashes(values), return_inverse=True)[1]
    earliest = torch.full((n,), n, device=values.device).scatter_reduce_(0, by_hash, place, "amin")[by_hash]
    later = (earliest != place).nonzero()[:, 0]
    if not len(later):
        return None
    step = max(1, _STEP_VALUES // values.shape[1])
    same = torch.cat([(values[part] == values[earliest[part]]).all(dim=1) for part in torch.split(later, step)])
    if not bool(same.any()):
        return None
    kind = place.clone()
    kind[later[same]] = earliest[later[same]]
    first, counts = torch.unique(kind, return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Copies(first=first, ids=kind.argsort(stable=True), starts=starts)


def _hashes(values: Tensor) -> Tensor:
    """Give (n,) int64: the bits of each row as whole numbers, times fixed odd ones, summed modulo 2^64."""
    generator = torch.Generator().manual_seed(0x6D736E)
    words = values.shape[1] * values.element_size() // 4
    odd = torch.randint(-(2**62), 2**62, (words,), generator=generator).mul_(2).add_(1).to(values.device)
    step = max(1, _STEP_VALUES // words)
    # Minus zero becomes zero, which it equals; whole numbers add up alike in every order.
    parts = ((part + 0.0).view(torch.int32).to(torch.int64).mul_(odd).sum(dim=1) for part in torch.split(values, step))
    return torch.cat(list(parts))
