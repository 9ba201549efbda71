"""Exact nearest neighbours by cosine: every search gives the same rows in the same order."""

import torch
from torch import Tensor

_SPARE = 16  # candidates beyond k; more are taken where rounding could hide one
_CHUNK_VALUES = 1 << 25  # float64 values that a step may hold: 256 MiB


def search_nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k rows of `bank` with the largest cosine to each query, ties to the earlier row.

    queries: (m, d) float64, rows of unit length or zero
    bank:    (n, d) float64, likewise, n >= k
    returns: (m, k) float64 cosines, falling; (m, k) int64 rows of the bank

    float32 products (faiss on a CPU, chunked products on CUDA) only make the shortlist. It is complete where its
    worst member lies further below the k-th than twice the largest rounding error of such a product; otherwise it is
    made longer. Cosines are then taken again in float64, row by row, so that equal rows tie exactly.
    """
    cosines = queries.new_empty(len(queries), k)
    nearest = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    pending = torch.arange(len(queries), device=queries.device)
    shortlist = _Shortlist(bank)
    size = min(len(bank), k + _SPARE)
    # |fl(x.y) - x.y| <= d u |x||y| (Higham 2002, section 3.1) for any order of summation, and both are rounded first.
    margin = 2 * (queries.shape[1] + 2) * torch.finfo(torch.float32).eps
    while len(pending):
        values, rows = shortlist.search(queries[pending], size)
        complete = values[:, -1] < values[:, k - 1] - margin if size < len(bank) else torch.ones_like(pending).bool()
        done = pending[complete]
        cosines[done], nearest[done] = _rescored(queries[done], bank, rows[complete], k)
        pending, size = pending[~complete], min(len(bank), 4 * size)
    return cosines, nearest


class _Shortlist:
    """The bank in float32, ready to be searched many times."""

    def __init__(self, bank: Tensor) -> None:
        self._bank = bank.to(torch.float32)
        self._index = None
        if bank.device.type == "cpu":
            import faiss

            self._index = faiss.IndexFlatIP(bank.shape[1])
            self._index.add(self._bank.numpy())

    def search(self, queries: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Give the (m, size) largest float32 products, falling, and their rows."""
        if self._index is not None:
            values, rows = self._index.search(queries.to(torch.float32).numpy(), size)
            return torch.from_numpy(values), torch.from_numpy(rows)
        step = max(1, _CHUNK_VALUES // len(self._bank))
        found = [(part @ self._bank.T).topk(size, dim=1) for part in torch.split(queries.to(torch.float32), step)]
        return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _rescored(queries: Tensor, bank: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Order candidates by their float64 cosine, ties to the earlier row, and keep k."""
    earliest_first = rows.sort(dim=1).values
    step = max(1, _CHUNK_VALUES // (rows.shape[1] * bank.shape[1]))
    parts = [
        (bank[some] * part[:, None, :]).sum(dim=2)
        for part, some in zip(torch.split(queries, step), torch.split(earliest_first, step), strict=True)
    ]
    cosines, order = torch.cat(parts).sort(dim=1, descending=True, stable=True)
    return cosines[:, :k], earliest_first.gather(1, order[:, :k])
