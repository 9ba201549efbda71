"""Cosines of pairs of rows in float64, the same bits wherever a pair stands: what neighbours are ordered by.

Every sum is folded in an order that depends on the width alone, by products and additions of IEEE arithmetic. So a
pair has one cosine, whatever the batch, the chunk, the shard, the number of threads or the device.
"""

import torch
from torch import Tensor

_CPU_VALUES = 1 << 18  # float64 values that a step holds: 2 MiB, about a core's cache
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


def cosines_of_rows(queries: Tensor, query_lengths: Tensor, bank: Tensor, bank_lengths: Tensor, rows: Tensor) -> Tensor:
    """Give the cosines of each query with bank rows of its own; that of a zero row is 0.

    queries, bank: (m, d) and (n, d), float32 or float64, as they are: of float32 values every product is exact
    lengths:       (m,) and (n,) float64, those of `row_lengths`
    rows:          (m, s) int64, rows of the bank
    returns:       (m, s) float64, within (d + 8) 2^-53 of the cosine of the values as given, relative to 1
    """
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
            # Gathered as they are and widened on the way into one buffer: half the traffic of float64 rows.
            part = terms[: some.numel()].copy_(bank.index_select(0, some.flatten()))
            part.view(*some.shape, d).mul_(wide)
            sums[top : top + down, left : left + across] = folded_sum(part).view(some.shape)
    scale = query_lengths[:, None] * bank_lengths[rows]
    return torch.where(scale > 0, sums / torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(sums))


def _rows_at_once(values: Tensor) -> int:
    return max(1, (_CUDA_VALUES if values.device.type == "cuda" else _CPU_VALUES) // values.shape[1])
