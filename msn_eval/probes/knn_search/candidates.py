"""Candidates: the rows that can be among the k nearest, by fast products with a proven rounding bound.

Let u and v be a query and a row of length 1, u' and v' the rounded ones, s = u.v, and c the computed u'.v'. With e = |u' - u|
and f = |v' - v|, both measured in float64, |u'.v' - u.v| <= e (1 + f) + f (Cauchy-Schwarz). A sum of d products in any order
with relative errors of at most w is within g |u'||v'| of the true one, g = d w / (1 - d w) (Higham 2002, section 4.2): w is
2^-53 for float64, 2^-24 for float32, and 2^-21 for bfloat16, whose products are exact in float32 and summed there, for matrix
units may truncate (Fasi et al. 2021). Underflow adds at most d 2^-125, inputs cut to TF32 2^-10, a bfloat16 result 2^-8 |c|:

    |c - s|  <=  B + r |c|,   B = e (1 + f) + f + (g + in) (1 + e) (1 + f) + d 2^-125 + (d + 16) 2^-53 + GRID / 2,

the last two for the exact cosine's own rounding. If k rows have c >= L, the k-th cosine is at least L - r |L| - B; a row with
c + r |c| + B below that is not among the k nearest.
"""

import time
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msn_eval.errors import UsageError
from msn_eval.features.encoder import exact_float32
from msn_eval.probes.knn_search.index import GRID, Bank, index_bank, round_rows, row_lengths, unit_rows

Search = Literal["auto", "torch", "faiss"]
Engine = Literal["bfloat16", "float32", "float64", "faiss"]
_TILE_ROWS, _TILE_ROWS_CUDA = 1 << 15, 1 << 17  # rows of the bank in one product
_LARGE_BANK = 1 << 12  # rows; with fewer, every engine is fast
_GROUPS = 16  # per neighbour: the k largest of 16 k group maxima are nearly the k largest products
_SPARE = 16  # neighbours beyond k that faiss returns
_MOST = 16  # candidates per neighbour; with more, a finer engine costs less than their exact cosines


class Candidates(NamedTuple):
    """Pairs of a query and a row that can be near, sorted by row.

    Attributes:
        query: (p,) int64.
        row: (p,) int64.
        product: (p,) float64.
        bound: (p,) float64, how far the product can be from the cosine.
        complete: (m,) bool, False for a query that has too many candidates to list.
    """

    query: Tensor
    row: Tensor
    product: Tensor
    bound: Tensor
    complete: Tensor


def choose_engines(device: torch.device, search: Search, n: int) -> tuple[Engine, ...]:
    """Return what computes the products for a bank of n rows, then what takes the queries left incomplete, in turn."""
    if search == "faiss":
        return ("faiss", "float32", "float64")
    if device.type == "cuda":
        return ("bfloat16", "float64")
    return tuple(dict.fromkeys((_fastest_engine(search) if n >= _LARGE_BANK else "float32", "float32", "float64")))


@lru_cache
def _fastest_engine(search: Search) -> Engine:
    """Measure which engine is fastest on this CPU; the smallest of several times, since a busy machine delays most."""
    values = torch.randn(_LARGE_BANK, 512, generator=torch.Generator().manual_seed(0))
    bank, queries = index_bank(values), values[:256] + values[256:512]
    engines: list[Engine] = ["bfloat16", "float32"]
    if search == "auto" and find_spec("faiss"):
        engines.append("faiss")
    seconds = dict.fromkeys(engines, torch.inf)
    for engine in engines * 8:
        started = time.perf_counter()
        find_candidates(queries, row_lengths(queries), bank, 20, engine=engine)
        seconds[engine] = min(seconds[engine], time.perf_counter() - started)
    return min(engines, key=seconds.__getitem__)


def find_candidates(queries: Tensor, lengths: Tensor, bank: Bank, k: int, *, engine: Engine) -> Candidates:
    """Return the rows that can be among the k nearest of each query, of equal rows the first k alone.

    Args:
        queries: (m, d) float32 or float64, no row zero.
        lengths: (m,) float64, their lengths.
        bank: At least k rows.
        k: Number of neighbours.
        engine: What computes the products.
    """
    (m, d), n, cuda = queries.shape, len(bank.values), queries.is_cuda
    unit = {"float64": 2.0**-53, "bfloat16": 2.0**-21}.get(engine, 2.0**-24)
    rough, bank_moved = bank.bfloat16 if engine == "bfloat16" else bank.float32
    left, moved = round_rows(queries, lengths, torch.float64 if engine == "float64" else rough.dtype)
    most = float(bank_moved.max()) if engine != "float64" else (d + 16) * unit
    lost = d * unit / (1 - d * unit) + (2.0**-9 if engine == "faiss" and cuda else 0.0)  # faiss may use TF32
    exact = d * 2.0**-125 + (d + 16) * 2.0**-53 + GRID / 2
    bound = moved * (1 + most) + most + lost * (1 + moved) * (1 + most) + exact  # B
    relative = 2.0**-8 if engine == "bfloat16" and not cuda else 0.0  # r: a CPU rounds the result too
    if engine == "faiss":
        products, rows = (part.T for part in _search_by_faiss(left, rough, min(n, k + _SPARE)))
        threshold = _threshold(products[k - 1].double(), bound, relative)
        complete = (products[-1] < threshold) | (len(products) == n)
        place, query = ((products >= threshold) & complete).nonzero(as_tuple=True)
        order = rows[place, query].argsort()
        query, row, product = query[order], rows[place, query][order], products[place, query][order].double()
        return Candidates(query, row, product, bound[query], complete)
    counts, step = torch.zeros(m, dtype=torch.int64, device=left.device), _TILE_ROWS_CUDA if cuda else _TILE_ROWS
    pairs, largest = [], torch.empty(0, m, dtype=torch.promote_types(left.dtype, torch.float32), device=left.device)
    for tile in (slice(start, start + step) for start in range(0, n, step)):
        right = rough[tile] if engine != "float64" else unit_rows(bank.values[tile], bank.lengths[tile])
        products = _multiply(right, left)  # (rows, m): pairs come sorted by row, so that each row is read once later
        largest = _k_largest(torch.cat([largest, _group_maxima(products, k).to(largest.dtype)]), k)
        lowest = largest.amin(dim=0).double() if len(largest) == k else torch.full_like(moved, -torch.inf)
        threshold = _threshold(lowest, bound, relative)
        wanted = products >= threshold.to(products.dtype).nextafter(products.new_tensor(-torch.inf))
        if bool((copied := bank.copy_number[tile] >= k).any()):
            wanted &= ~copied[:, None]
        if len(crowded := (counts > _MOST * (k + _SPARE)).nonzero()):
            wanted[:, crowded] = False
        row, query = _nonzero(wanted)
        counts += query.bincount(minlength=m)
        pairs.append((query, row + tile.start, products[row, query].double()))
    complete = counts <= _MOST * (k + _SPARE)
    query, row, product = (torch.cat(column) for column in zip(*pairs, strict=True))
    if len(pairs) > 1 or not bool(complete.all()):  # earlier tiles had lower thresholds
        kept = ((product >= threshold[query]) & complete[query]).nonzero()[:, 0]
        query, row, product = query[kept], row[kept], product[kept]
    return Candidates(query, row, product, bound[query] + relative * product.abs(), complete)


def _threshold(lowest: Tensor, bound: Tensor, relative: float) -> Tensor:
    """Return below which product a row is not a candidate, if k rows have a product of at least `lowest`."""
    worst = lowest - relative * lowest.abs() - 2 * bound
    return torch.where(worst > 0, worst / (1 + relative), worst / (1 - relative))


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right.T, without TF32, and with float32 sums of bfloat16 products."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with exact_float32():
            if left.is_cuda and left.dtype == torch.bfloat16:
                return torch.mm(left, right.T, out_dtype=torch.float32)
            return left @ right.T
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _group_maxima(products: Tensor, k: int) -> Tensor:
    """Return maxima of groups of rows: their k-th largest is at most that of all rows, and there are fewer to sort."""
    size = max(1, len(products) // (_GROUPS * k))
    groups = len(products) // size
    maxima = products[: size * groups].view(size, groups, -1).amax(dim=0)
    return torch.cat([maxima, products[size * groups :]])


def _k_largest(values: Tensor, k: int) -> Tensor:
    if len(values) <= k:
        return values
    if values.is_cuda:
        return values.topk(k, dim=0, sorted=False).values
    # NumPy selects by SIMD instructions, and finds nonzero places many times as fast as torch on a CPU.
    return torch.from_numpy(np.partition(values.T.contiguous().numpy(), -k, axis=1)[:, -k:]).T


def _nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    if mask.is_cuda:
        row, query = mask.nonzero(as_tuple=True)
        return row, query
    index = torch.from_numpy(np.flatnonzero(mask.numpy()))
    return index // mask.shape[1], index % mask.shape[1]


def _search_by_faiss(left: Tensor, right: Tensor, size: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            "faiss is not installed", hint="pip install faiss-gpu (Linux on x86-64) or faiss-cpu."
        ) from error
    if not left.is_cuda:
        products, rows = faiss.knn(left.numpy(), right.numpy(), size, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(products), torch.from_numpy(rows)
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        raise UsageError("This faiss has no GPU index.", hint="pip install faiss-gpu (Linux on x86-64).")
    import faiss.contrib.torch_utils  # makes faiss take tensors

    resources: Any = faiss.StandardGpuResources()
    found: tuple[Tensor, Tensor] = faiss.knn_gpu(resources, left, right, size, metric=faiss.METRIC_INNER_PRODUCT)
    return found
