"""Bank: labelled rows made ready for searches, once: checked, measured, equal ones found."""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msn_eval.errors import NumericalError
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
            hint="The features overflowed; retry with --precision fp32.",
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


GRID = 2.0**-38  # cosines are whole multiples of it: a sixteen-thousandth of what float32 resolves next to 1
_CPU_VALUES = 1 << 18  # float64 values that a folding step holds: 2 MiB, about a core's cache
_GATHERED_VALUES = 1 << 21  # float64 values of rows that are gathered for one product: 16 MiB
_NARROW = 48  # terms a row from which on a row's are too few to be added side by side
_CUDA_VALUES = 1 << 26  # 512 MiB


def folded_sum(terms: Tensor) -> Tensor:
    """Sum each row, half upon half, and give (n,). The terms are used up.

    terms: (n, width) float64, width >= 1
    """
    width = terms.shape[1]
    turned = False
    while width > 1:
        if width <= _NARROW and not turned:  # the same additions in the same order, those of many rows side by side
            terms, turned = terms[:, :width].T.contiguous().T, True
        half = width // 2
        terms[:, :half] += terms[:, half : 2 * half]
        if width % 2:
            terms[:, :1] += terms[:, width - 1 : width]
        width = half
    return terms[:, 0]


def row_lengths(values: Tensor) -> Tensor:
    """Give the L2 length of each row, (n,) float64.

    values: (n, d) float32 or float64
    """
    if not len(values):
        return values.new_empty(0, dtype=torch.float64)
    step = _rows_at_once(values)
    return torch.cat([folded_sum(part.to(torch.float64).square()).sqrt() for part in torch.split(values, step)])


def unit_rows(values: Tensor, lengths: Tensor) -> Tensor:
    """Give rows of unit length in float64; a zero row stays zero. `lengths` are those of `row_lengths`."""
    return values.to(torch.float64) / lengths.where(lengths > 0, torch.ones_like(lengths))[:, None]


def cosines_of_rows(
    queries: Tensor,
    query_lengths: Tensor,
    bank: Tensor,
    bank_lengths: Tensor,
    rows: Tensor,
    *,
    counts: Tensor | None = None,
    wide: Tensor | None = None,
) -> Tensor:
    """Give the cosines of each query with bank rows of its own, multiples of `GRID`; that of a zero row is 0.

    queries, bank: (m, d) and (n, d), float32 or float64, as they are: of float32 values every product is exact
    lengths:       (m,) and (n,) float64, those of `row_lengths`
    rows:          (m, s) int64, rows of the bank
    counts:        (m,) int64, how many of its rows each query wants, the first ones; all where it is None
    wide:          (n, d) float64, the bank's values, where a copy is at hand: faster on a processor, the same cosines
    returns:       (m, s) float64, within GRID / 2 + (d + 16) 2^-53 of the cosine of the values as given, relative to 1;
                   -inf where none was wanted
    """
    if counts is None:
        counts = torch.full((len(rows),), rows.shape[1], device=rows.device)
    wanted = torch.arange(rows.shape[1], device=rows.device) < counts[:, None]
    query, place = wanted.nonzero(as_tuple=True)
    row = rows[query, place]
    scale = query_lengths[query] * bank_lengths[row]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    cosines = torch.full(rows.shape, -torch.inf, dtype=torch.float64, device=rows.device)
    if bank.device.type == "cuda":
        cosines[query, place] = (_folded_dots(queries, bank, query, row) / scale).div_(GRID).round_().mul_(GRID)
        return cosines
    if wide is None:
        dots = _gathered_dots(queries, bank, query, row)
    else:
        dots = _sampled_dots(queries.to(torch.float64), wide, query, row)
    steps = (dots / scale).div_(GRID)
    nearest = steps.round()
    doubtful = ((steps - nearest).abs_() > 0.5 - _distance(bank.shape[1]) / GRID).nonzero()[:, 0]
    folded = _folded_dots(queries, bank, query[doubtful], row[doubtful])
    nearest[doubtful] = (folded / scale[doubtful]).div_(GRID).round_()
    cosines[query, place] = nearest.mul_(GRID)
    return cosines


def _distance(d: int) -> float:
    """Give how far a float64 cosine summed in any order can be from the folded one, relative to 1.

    A sum of d products in any order loses at most d 2^-53 of the lengths' product, one by halves log2 d + 2 for each
    odd term (Higham 2002, section 4.2; Jeannerod and Rump 2013 for the factor without higher terms); both are divided by
    the same number, and put on the grid by a power of two.
    """
    return (d + 2 * math.ceil(math.log2(d + 1)) + 16) * 2.0**-53


def _gathered_dots(queries: Tensor, bank: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Give what `_sampled_dots` gives, of rows that are widened to float64 some at a time."""
    pairs = max(1, _GATHERED_VALUES // bank.shape[1])
    gathered = torch.empty(min(pairs, len(row)), bank.shape[1], dtype=torch.float64)
    parts = [gathered.new_empty(0)]
    for start in range(0, len(row), pairs):
        some, own = row[start : start + pairs], query[start : start + pairs]
        # Gathered as they are and widened on the way into one buffer: half the traffic of float64 rows.
        part = gathered[: len(some)].copy_(bank.index_select(0, some))
        first, last = int(own[0]), int(own[-1])
        asking = queries[first : last + 1].to(torch.float64)
        parts.append(_sampled_dots(asking, part, own - first, torch.arange(len(some))))
    return torch.cat(parts)


def _sampled_dots(queries: Tensor, bank: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Give the products of pairs of float64 rows, (p,), summed in the library's order, without gathering any.

    query, row: (p,) int64, rows of each; those of `query` never fall
    """
    if not len(row):
        return queries.new_empty(0)
    starts = torch.cat([query.new_zeros(1), torch.bincount(query, minlength=len(queries)).cumsum(0)])
    nothing = torch.zeros(len(row), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        size = (len(queries), len(bank))
        pattern = torch.sparse_csr_tensor(starts, row, nothing, size=size, check_invariants=False)
    dots: Tensor = torch.sparse.sampled_addmm(pattern, queries, bank.T, beta=0.0).values()
    return dots


def _folded_dots(queries: Tensor, bank: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Give the products of pairs of rows, (p,) float64, by folded sums."""
    pairs = _rows_at_once(bank)
    terms = torch.empty(min(pairs, len(row)), bank.shape[1], dtype=torch.float64, device=bank.device)
    parts = [terms.new_empty(0)]
    for some, own in zip(torch.split(row, pairs), torch.split(query, pairs), strict=True):
        part = terms[: len(some)].copy_(bank.index_select(0, some)).mul_(queries.index_select(0, own))
        parts.append(folded_sum(part).clone())
    return torch.cat(parts)


def _rows_at_once(values: Tensor) -> int:
    return max(1, (_CUDA_VALUES if values.device.type == "cuda" else _CPU_VALUES) // values.shape[1])
