"""The rows to search among, and exact cosines with them."""

import warnings
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from msn_eval.errors import NumericalError

GRID = 2.0**-38  # cosines are rounded to its multiples, so that mathematically equal ones tie
_STEP_VALUES = 1 << 22  # float64 values that a pass over rows holds at once: 32 MiB
_STEP_VALUES_CPU = 1 << 18  # 2 MiB fit into a cache
_WIDE_VALUES = 1 << 26  # a CPU also keeps rows of at most so many values in float64: 512 MiB


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Labelled rows, prepared once for many searches.

    Attributes:
        values: (n, d) float32 or float64, as given.
        lengths: (n,) float64 L2 lengths.
        rounded: By dtype, what `round_rows` returns for the rows, once it has been needed.
    """

    values: Tensor
    lengths: Tensor
    rounded: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def wide(self) -> Tensor | None:
        return self.values.double() if self.values.is_cpu and self.values.numel() <= _WIDE_VALUES else None

    def round(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in self.rounded:
            self.rounded[dtype] = round_rows(self.values, self.lengths, dtype)
        return self.rounded[dtype]


def index_bank(values: Tensor) -> Bank:
    """Prepare (n, d) rows for searches. Raises NumericalError for rows that are not finite."""
    values = as_searched(values)
    check_finite(values, "labelled row")
    return Bank(values=values, lengths=row_lengths(values))


def as_searched(values: Tensor) -> Tensor:
    """Return float64 rows as they are, all others as float32."""
    return (values if values.dtype == torch.float64 else values.float()).contiguous()


def check_finite(values: Tensor, what: str) -> None:
    """Raise NumericalError if a row holds NaN, which would rank first, or infinity."""
    bad = torch.cat([~part.isfinite().all(dim=1) for part in _split(values)]).nonzero()[:, 0]
    if len(bad):
        shown = ", ".join(map(str, bad[:5].tolist())) + (", …" if len(bad) > 5 else "")
        raise NumericalError(
            f"{len(bad)} of {len(values)} {what}s {'is' if len(bad) == 1 else 'are'} not finite: {shown}",
            hint="The features overflowed; retry with --precision fp32.",
        )


def row_lengths(values: Tensor) -> Tensor:
    """Return the L2 lengths of (n, d) rows, (n,) float64."""
    return torch.cat([_folded_sum(part.double().square()).sqrt() for part in _split(values)])


def round_rows(values: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (n, d) rows of length 1 in `dtype`, and bounds of how far rounding moved each, (n,) float64.

    A zero row stays zero.
    """
    narrow, moved = torch.empty(values.shape, dtype=dtype, device=values.device), []
    scales = lengths.where(lengths > 0, 1.0)[:, None]
    for part, scale, target in zip(_split(values), _split(scales.expand_as(values)), _split(narrow), strict=True):
        unit = part.double() / scale
        moved.append((target.copy_(unit).double() - unit).norm(dim=1))
    lost = (values.shape[1] + 16) * 2.0**-53  # of float64, in the unit row and in the distance measured
    return narrow, torch.cat(moved) * (1 + lost) + lost


def exact_cosines(queries: Tensor, lengths: Tensor, bank: Bank, query: Tensor, row: Tensor) -> Tensor:
    """Return the cosines of (p,) pairs, float64 multiples of GRID; a zero row has the cosine 0 to all.

    A pair has the same bits in any batch and on any number of threads: each value is within GRID / 2 + (d + 16) 2^-53 of
    the cosine of the rows as given.

    Args:
        queries: (m, d) float32 or float64.
        lengths: (m,) float64, their lengths.
        bank: The rows to compare with.
        query: (p,) int64 indices of queries.
        row: (p,) int64 indices of rows of the bank, ascending.
    """
    scale, dots, wide_queries = lengths[query] * bank.lengths[row], [lengths.new_empty(0)], queries.double()
    step = len(row) if bank.wide is not None else _STEP_VALUES // queries.shape[1]
    for rows, owners in zip(torch.split(row, max(1, step)), torch.split(query, max(1, step)), strict=True):
        if queries.is_cuda:  # a CUDA reduction adds in an order that depends on the number of pairs
            dots.append(_folded_sum(bank.values[rows].double().mul_(wide_queries[owners])))
            continue
        if bank.wide is not None:
            table, position = bank.wide, rows
        else:
            used, position = torch.unique_consecutive(rows, return_inverse=True)
            table = bank.values[used].double()
        starts = pad(position.bincount(minlength=len(table)).cumsum(0), (1, 0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            zeros, size = scale.new_zeros(len(owners)), (len(table), len(queries))
            pattern = torch.sparse_csr_tensor(starts, owners, zeros, size=size, check_invariants=False)
        # It sums the products of each pair by itself, in an order that depends on d alone, and gathers no rows.
        dots.append(torch.sparse.sampled_addmm(pattern, table, wide_queries.T, beta=0.0).values())
    return torch.cat(dots).div_(scale.where(scale > 0, 1.0)).div_(GRID).round_().mul_(GRID)


def _folded_sum(terms: Tensor) -> Tensor:
    """Return the sums of (n, width) rows, adding half upon half: elementwise, so alike on every device."""
    while (width := terms.shape[1]) > 1:
        half = width // 2
        terms[:, :half] += terms[:, half : 2 * half]
        terms[:, : width % 2] += terms[:, 2 * half :]
        terms = terms[:, :half]
    return terms[:, 0].clone()


def _split(values: Tensor) -> tuple[Tensor, ...]:
    step = _STEP_VALUES if values.is_cuda else _STEP_VALUES_CPU
    return torch.split(values, max(1, step // values.shape[1]))
