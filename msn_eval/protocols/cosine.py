"""Cosines of pairs of rows, the same bits wherever a pair stands: what neighbours are ordered by.

A pair has one cosine, whatever the batch, the chunk, the shard, the number of threads or the device: its *folded* one, rounded
to a multiple of 2^-38. The folded one is a float64 sum in an order that depends on the width alone, by products and
additions of IEEE arithmetic. Such sums are slow on a processor, where a library's float64 product sums in an order of its own
choice. Of that one both are within a proved distance of the true cosine, so that both round to the same multiple, unless the
library's lies so near to the middle between two that the distance reaches across: then, in one of twenty pairs at a width
of 768, the folded sum is taken after all (Ziv 1991, on functions rounded correctly). Pairs that have the same cosine but for
the rounding of float64 are equal now, and ties that the protocol's rule decides.
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
    wide: Tensor | None = None,
) -> Tensor:
    """Give the cosines of each query with bank rows of its own, multiples of `GRID`; that of a zero row is 0.

    queries, bank: (m, d) and (n, d), float32 or float64, as they are: of float32 values every product is exact
    lengths:       (m,) and (n,) float64, those of `row_lengths`
    rows:          (m, s) int64, rows of the bank
    wide:          (n, d) float64, the bank's values, where a copy is at hand: faster on a processor, the same cosines
    returns:       (m, s) float64, within GRID / 2 + (d + 16) 2^-53 of the cosine of the values as given, relative to 1
    """
    scale = query_lengths[:, None] * bank_lengths[rows]
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    if bank.device.type == "cuda":
        return (_folded_dots(queries, bank, rows) / divisor).div_(GRID).round_().mul_(GRID)
    dots = _gathered_dots(queries, bank, rows) if wide is None else _sampled_dots(queries.to(torch.float64), wide, rows)
    steps = (dots / divisor).div_(GRID)
    nearest = steps.round()
    doubtful = (steps - nearest).abs_() > 0.5 - _distance(bank.shape[1]) / GRID
    query, place = doubtful.nonzero(as_tuple=True)
    if len(query):
        folded = _folded_dots(queries[query], bank, rows[query, place][:, None])[:, 0]
        nearest[query, place] = (folded / divisor[query, place]).div_(GRID).round_()
    return nearest.mul_(GRID)


def _distance(d: int) -> float:
    """Give how far a float64 cosine summed in any order can be from the folded one, relative to 1.

    A sum of d products in any order loses at most d 2^-53 of the lengths' product, one by halves log2 d + 2 for each
    odd term (Higham 2002, section 4.2; Jeannerod and Rump 2013 for the factor without higher terms); both are divided by
    the same number, and put on the grid by a power of two.
    """
    return (d + 2 * math.ceil(math.log2(d + 1)) + 16) * 2.0**-53


def _gathered_dots(queries: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Give the float64 products of queries with bank rows of their own, (m, s), summed in the library's order."""
    (m, s), d = rows.shape, bank.shape[1]
    sums = torch.empty(m, s, dtype=torch.float64)
    pairs = max(1, _GATHERED_VALUES // d)
    across = max(1, min(s, pairs))
    down = max(1, pairs // across)
    gathered = torch.empty(min(down, m) * across, d, dtype=torch.float64)
    for top in range(0, m, down):
        wide = queries[top : top + down].to(torch.float64)
        for left in range(0, s, across):
            some = rows[top : top + down, left : left + across]
            # Gathered as they are and widened on the way into one buffer: half the traffic of float64 rows.
            part = gathered[: some.numel()].copy_(bank.index_select(0, some.flatten()))
            sums[top : top + down, left : left + across] = _sampled_dots(
                wide, part, torch.arange(some.numel()).view(some.shape)
            )
    return sums


def _sampled_dots(queries: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Give the products of float64 queries with float64 bank rows of their own, (m, s), without gathering rows."""
    m, s = rows.shape
    if not m * s:
        return torch.empty(m, s, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(
            torch.arange(0, m * s + 1, s),
            rows.flatten(),
            torch.zeros(m * s, dtype=torch.float64),
            size=(m, len(bank)),
            check_invariants=False,
        )
    dots: Tensor = torch.sparse.sampled_addmm(pattern, queries, bank.T, beta=0.0).values()
    return dots.view(m, s)


def _folded_dots(queries: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Give the products of queries with bank rows of their own, (m, s) float64, by folded sums."""
    (m, s), d = rows.shape, bank.shape[1]
    sums = torch.empty(m, s, dtype=torch.float64, device=bank.device)
    pairs = _rows_at_once(bank)
    across = -(-s // max(1, -(-s // pairs)))  # of equal parts, each at most as many as a step holds
    down = max(1, pairs // max(1, across))
    terms = torch.empty(min(down, m) * across, d, dtype=torch.float64, device=bank.device)
    for top in range(0, m, down):
        wide = queries[top : top + down, None].to(torch.float64)
        for left in range(0, s, max(1, across)):
            some = rows[top : top + down, left : left + across]
            part = terms[: some.numel()].copy_(bank.index_select(0, some.flatten()))
            part.view(*some.shape, d).mul_(wide)
            sums[top : top + down, left : left + across] = folded_sum(part).view(some.shape)
    return sums


def _rows_at_once(values: Tensor) -> int:
    return max(1, (_CUDA_VALUES if values.device.type == "cuda" else _CPU_VALUES) // values.shape[1])
