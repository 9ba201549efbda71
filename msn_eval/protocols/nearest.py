"""Exact nearest neighbours by cosine: every search gives the same rows in the same order."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msn_eval.errors import UsageError

_CHUNK_VALUES = 1 << 21  # float64 values that a step holds: 16 MiB, about a processor's cache
_CUDA_CHUNK_VALUES = 1 << 26  # 512 MiB
_LARGE_BANK = 32_768  # rows above which a float32 shortlist pays on a CPU
_SPARE = 16  # candidates beyond k in a shortlist


def search_nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k rows of `bank` with the largest cosine to each query, ties to the earlier row.

    queries: (m, d) float64, rows of unit length or zero
    bank:    (n, d) float64, likewise, n >= k
    returns: (m, k) float64 cosines, falling; (m, k) int64 rows of the bank
    """
    if bank.device.type == "cpu" and len(bank) > _LARGE_BANK:
        return _search_by_shortlist(queries, bank, k)
    return _search_all(queries, bank, k)


@dataclass(frozen=True)
class _Distinct:
    """A bank without repetitions: a product may round equal rows apart, depending on where they stand."""

    rows: Tensor
    place: Tensor | None  # of each bank row among `rows`; None where no row repeats


def _distinct(bank: Tensor) -> _Distinct:
    rows, place = torch.unique(bank, dim=0, return_inverse=True)
    return _Distinct(bank, None) if len(rows) == len(bank) else _Distinct(rows, place)


def _search_all(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search by float64 products with every row, in chunks of queries."""
    distinct = _distinct(bank)
    chunk = _CUDA_CHUNK_VALUES if bank.device.type == "cuda" else _CHUNK_VALUES
    parts = [
        _top_rows(part @ distinct.rows.T if distinct.place is None else (part @ distinct.rows.T)[:, distinct.place], k)
        for part in torch.split(queries, max(1, chunk // len(bank)))
    ]
    return torch.cat([cosines for cosines, _ in parts]), torch.cat([rows for _, rows in parts])


def _top_rows(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the k largest of each row and their columns, ties to the earlier column."""
    values, columns = cosines.topk(min(k + 1, cosines.shape[1]), dim=1)
    # topk leaves the order of equal values open, and which of them it takes; a stable sort does not.
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    values, columns = values[:, :k].contiguous(), columns[:, :k].contiguous()
    if bool(tied.any()):
        ordered = cosines[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, columns


def _search_by_shortlist(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search by faiss in float32 for slightly more than k rows, and take their cosines again in float64.

    A query's shortlist is complete where its last member lies further below the k-th than rounding can explain;
    where it is not, every row is searched.
    """
    faiss = _faiss()
    size = min(len(bank), k + _SPARE)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.to(torch.float32).numpy())
    found, rows = index.search(queries.to(torch.float32).numpy(), size)
    coarse, shortlist = torch.from_numpy(found), torch.from_numpy(rows)
    # |fl(x.y) - x.y| <= d u |x||y| for any order of summation (Higham 2002, section 3.1), once for each of the two
    # rows compared; the rows themselves were rounded first.
    margin = 2 * (bank.shape[1] + 2) * torch.finfo(torch.float32).eps
    complete = coarse[:, -1] < coarse[:, k - 1] - margin
    cosines, nearest = queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    if bool(complete.any()):
        cosines[complete], nearest[complete] = _rescored(queries[complete], bank, shortlist[complete], k)
    if not bool(complete.all()):
        cosines[~complete], nearest[~complete] = _search_all(queries[~complete], bank, k)
    return cosines, nearest


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            f"k-NN among more than {_LARGE_BANK:,} labelled images needs faiss, which is not installed",
            remedy="pip install faiss-gpu (Linux on x86-64) or faiss-cpu.",
        ) from error
    return faiss


def _rescored(queries: Tensor, bank: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Order candidates by float64 products taken row by row, so that equal rows tie exactly, and keep k."""
    earliest_first = rows.sort(dim=1).values
    step = max(1, _CHUNK_VALUES // (rows.shape[1] * bank.shape[1]))
    parts = [
        (bank[some] * part[:, None, :]).sum(dim=2)
        for part, some in zip(torch.split(queries, step), torch.split(earliest_first, step), strict=True)
    ]
    ordered = torch.cat(parts).sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], earliest_first.gather(1, ordered.indices[:, :k])
