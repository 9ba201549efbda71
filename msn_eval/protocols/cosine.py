"""Cosines of pairs of rows in float64, the same bits wherever a pair stands: what neighbours are ordered by.

Every sum is folded in an order that depends on the width alone, by products and additions of IEEE arithmetic. So a
pair has one cosine, whatever the batch, the chunk, the shard, the number of threads or the device.
"""

import torch
from torch import Tensor

_CPU_VALUES = 1 << 17  # float64 values that a step holds: 1 MiB, about a core's cache
_CUDA_VALUES = 1 << 26  # 512 MiB


def folded_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension, half upon half, and give (...,). The terms are used up.

    terms: (..., width) float64, width >= 1
    """
    width = terms.shape[-1]
    while width > 1:
        half = width // 2
        terms[..., :half] += terms[..., half : 2 * half]
        if width % 2:
            terms[..., :1] += terms[..., width - 1 : width]
        width = half
    return terms[..., 0]


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


def cosines_of_pairs(
    queries: Tensor, query_lengths: Tensor, bank: Tensor, bank_lengths: Tensor, which: Tensor, rows: Tensor
) -> Tensor:
    """Give the cosine of each pair of a query and a bank row; that of a zero row is 0.

    queries, bank: (m, d) and (n, d), float32 or float64, as they are: of float32 values every product is exact
    lengths:       (m,) and (n,) float64, those of `row_lengths`
    which, rows:   (p,) int64, the query and the bank row of each pair
    returns:       (p,) float64, within (d + 8) 2^-53 of the cosine of the values as given, relative to 1
    """
    sums = torch.empty(len(which), dtype=torch.float64, device=bank.device)
    step = _rows_at_once(bank)
    terms = torch.empty(min(step, len(which)), bank.shape[1], dtype=torch.float64, device=bank.device)
    for start in range(0, len(which), step):
        some = slice(start, start + step)
        # Gathered as they are and widened on the way into one buffer: half the traffic of float64 rows.
        part = terms[: len(which[some])].copy_(bank.index_select(0, rows[some]))
        sums[some] = folded_sum(part.mul_(queries.index_select(0, which[some])))
    scale = query_lengths[which] * bank_lengths[rows]
    return torch.where(scale > 0, sums / torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(sums))


def _rows_at_once(values: Tensor) -> int:
    return max(1, (_CUDA_VALUES if values.device.type == "cuda" else _CPU_VALUES) // values.shape[1])
