"""Cosines of pairs of rows, the same bits wherever a pair stands: what neighbours are ordered by.

A pair has one cosine, whatever the batch, the chunk, the shard, the number of threads or the device: its *folded* one, rounded
to a multiple of 2^-38. The folded one is a float64 sum in an order that depends on the width alone, by products and
additions of IEEE arithmetic. Such sums are slow on a processor, where a library's float64 product sums in an order of its own
choice. Of that one both are within a proved distance of the true cosine, so that both round to the same multiple, unless the
library's lies so near to the middle between two that the distance reaches across: then, in one of twenty pairs at a width
of 768, the folded sum is taken after all (Ziv 1991, on functions rounded correctly). Pairs that have the same cosine but for
the rounding of float64 are equal, and ties that the protocol's rule decides.
"""

import math
import warnings

import torch
from torch import Tensor

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
