"""Exact search: fast products find candidates, float64 cosines decide; every dtype gives the same rows in the same order.

Let u and v be a query and a row of length 1, u' and v' the rounded ones, s = u.v, and c the computed u'.v'. With e = |u' - u|
and f = |v' - v|, both measured in float64, |u'.v' - u.v| <= e (1 + f) + f (Cauchy-Schwarz). A sum of d products in any order
with relative errors of at most w is within g |u'||v'| of the true one, g = d w / (1 - d w) (Higham 2002, section 4.2): w is
2^-53 for float64, 2^-24 for float32, and 2^-21 for bfloat16, whose products are exact in float32 and summed there, for matrix
units may truncate (Fasi et al. 2021). Underflow adds at most d 2^-125, a bfloat16 result 2^-8 |c|:

    |c - s|  <=  B + r |c|,   B = e (1 + f) + f + g (1 + e) (1 + f) + d 2^-125 + (d + 16) 2^-53 + GRID / 2,

the last two for the exact cosine's own rounding. If k rows have c >= L, the k-th cosine is at least L - r |L| - B; a row with
c + r |c| + B below that is not among the k nearest.
"""

import timeit
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msn_eval.errors import NumericalError, ResourceError, UsageError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.features.encoder import exact_float32
from msn_eval.probes.knn_search.index import (
    GRID,
    Bank,
    as_searched,
    check_finite,
    exact_cosines,
    index_bank,
    round_rows,
    row_lengths,
)

Neighbours = tuple[Tensor, Tensor]  # cosines (m, k) float64, descending, and rows (m, k) int64
Search = Literal["auto", "torch", "faiss"]
Stage = torch.dtype | Literal["faiss"]  # the dtype of torch's products, or float32 products of faiss
_QUERIES, _QUERIES_CUDA = 256, 4096  # per chunk at most
_PRODUCTS, _PRODUCTS_CUDA = 1 << 26, 1 << 29  # at once at most
_LARGE_BANK = 1 << 12  # rows; with fewer, every dtype is fast
_GROUPS = 16  # per neighbour: the k largest of 16 k group maxima are nearly the k largest products
_MOST = 16  # candidates per neighbour and spare one; with more, a finer dtype costs less than their exact cosines
_SPARE = 16
_MOST_BY_FAISS = 64  # neighbours; for more, torch is faster
_LONGEST_FAISS_LIST = 2048  # of its GPU index
_UNIT = {torch.bfloat16: 2.0**-21, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def search_nearest(queries: Tensor, bank: Tensor | Bank, k: int, *, by: Search = "auto") -> Neighbours:
    """Find the k rows of `bank` with the largest cosine to each query; ties go to the earlier row.

    Args:
        queries: (m, d) floating, m >= 1, rows of any length; a zero row has the cosine 0 to all.
        bank: (n, d) floating, n >= k, or what `index_bank` returns for it.
        k: Number of neighbours.
        by: Who proposes candidates, torch or faiss; "auto" takes what is usually faster. The result is the same.

    Returns:
        (m, k) float64 cosines, descending, and (m, k) int64 rows of the bank.

    Raises:
        NumericalError: Rows are not finite, or the device computes wrong products.
        ResourceError: There is not enough memory.
        UsageError: `by` is "faiss", and faiss or its GPU index is not installed.
    """
    bank = bank if isinstance(bank, Bank) else index_bank(bank)
    queries = as_searched(queries)
    check_finite(queries, "query")
    most, products = (_QUERIES_CUDA, _PRODUCTS_CUDA) if queries.is_cuda else (_QUERIES, _PRODUCTS)
    stages = choose_stages(queries.device, len(bank.values), k, by)
    start, step = 0, max(1, min(most, products // len(bank.values)))
    parts: list[Neighbours] = []
    with _exact_products(), _chunk_threads(queries.device, products // (most * len(bank.values))) as (n_chunks, run):
        while start < len(queries):
            block = queries[start : start + step * n_chunks]
            try:
                parts += run(lambda chunk: _search_chunk(chunk, bank, k, stages), torch.split(block, step))
                start += len(block)
                continue
            except OUT_OF_MEMORY_ERRORS as error:
                if not is_out_of_memory(error):
                    raise
                if step == 1:
                    raise ResourceError(
                        f"memory of {queries.device} is too small for k-NN among {len(bank.values):,} rows: {error}",
                        hint="Use --device cpu for this probe."
                        if queries.is_cuda
                        else "Use a machine with more memory.",
                    ) from error
            # Outside of the handler, whose traceback keeps the tensors that did not fit.
            step = (step + 1) // 2
            torch.cuda.empty_cache()
    return torch.cat([cosines for cosines, _ in parts]), torch.cat([rows for _, rows in parts])


@contextmanager
def _exact_products() -> Iterator[None]:
    """Compute products without TF32, and with float32 sums of bfloat16 products."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with exact_float32():
            yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@contextmanager
def _chunk_threads(device: torch.device, most: int) -> Iterator[tuple[int, Callable[..., Iterable[Neighbours]]]]:
    """Yield a number of chunks and a `map` that searches them at once.

    A CPU has a thread for each chunk, since selection runs on one thread. A GPU has one chunk at a time.
    """
    threads = torch.get_num_threads()
    n_chunks = max(1, min(threads, most)) if device.type == "cpu" else 1
    if n_chunks == 1:
        yield 1, map
        return
    torch.set_num_threads(threads // n_chunks)
    try:
        with ThreadPoolExecutor(n_chunks) as pool:
            yield n_chunks, pool.map
    finally:
        torch.set_num_threads(threads)


def choose_stages(device: torch.device, n: int, k: int, by: Search = "auto") -> tuple[Stage, ...]:
    """Return what computes products for a bank of n rows first, then what does for queries left incomplete, in turn.

    Raises:
        UsageError: `by` is "faiss", and faiss or its GPU index is not installed.
    """
    finer = (torch.float32, torch.float64)
    if by == "faiss":
        check_faiss(device)
        return ("faiss", *finer) if device.type == "cpu" or k < _LONGEST_FAISS_LIST else finer
    if n >= _LARGE_BANK and (device.type == "cuda" or _is_bfloat16_fast()):
        return (torch.bfloat16, *finer)
    is_large = by == "auto" and device.type == "cpu" and n >= _LARGE_BANK and k <= _MOST_BY_FAISS
    return ("faiss", *finer) if is_large and find_spec("faiss") is not None else finer


def check_faiss(device: torch.device) -> None:
    """Raise UsageError if faiss cannot search on this device."""
    hint = "pip install faiss-gpu (Linux on x86-64) or faiss-cpu, or use --search auto."
    if find_spec("faiss") is None:
        raise UsageError("--search faiss: faiss is not installed", hint=hint)
    if device.type == "cuda":
        import faiss

        if not getattr(faiss, "get_num_gpus", int)():
            raise UsageError("--search faiss: the installed faiss has no GPU index", hint=hint)


@lru_cache
def _is_bfloat16_fast() -> bool:
    """Measure whether this CPU has fast bfloat16 products; the smallest of several times, since a busy machine delays most."""
    rows, seconds = torch.randn(_LARGE_BANK, 512), []
    for dtype in (torch.bfloat16, torch.float32):
        values = rows.to(dtype)
        seconds.append(min(timeit.repeat(partial(torch.mm, values, values[:256].T), number=1, repeat=8)))
    return seconds[0] < seconds[1]


def _search_chunk(queries: Tensor, bank: Bank, k: int, stages: Sequence[Stage]) -> Neighbours:
    lengths = row_lengths(queries)
    cosines = lengths.new_zeros(len(queries), k)
    rows = torch.arange(k, device=queries.device).repeat(len(queries), 1)  # the neighbours of a zero query
    remaining = lengths.nonzero()[:, 0]
    for stage in stages:
        if not len(remaining):
            break
        some, scale = queries[remaining], lengths[remaining]
        query, row, product, bound, complete = find_candidates(some, scale, bank, k, stage)
        exact = exact_cosines(some, scale, bank, query, row)
        if bool(((product - exact).abs() > bound).any()):
            raise NumericalError(
                f"products in {str(stage).removeprefix('torch.')} on {queries.device} are wrong by more than rounding explains",
                hint="Another library changed how this process computes (cyanure's fit does): use a process of its own.",
            )
        done, query = remaining[complete], (complete.cumsum(0) - 1)[query]
        cosines[done], rows[done] = _select_nearest(exact, query, row, len(done), k)
        remaining = remaining[~complete]
    row = torch.arange(len(bank.values), device=queries.device)
    for index in remaining.tolist():  # so many rows are nearly equal that all are compared
        single = slice(index, index + 1)
        exact = exact_cosines(queries[single], lengths[single], bank, torch.zeros_like(row), row)
        cosines[single], rows[single] = _select_nearest(exact, torch.zeros_like(row), row, 1, k)
    return cosines, rows


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


def find_candidates(queries: Tensor, lengths: Tensor, bank: Bank, k: int, stage: Stage) -> Candidates:
    """Return the rows that can be among the k nearest of each query.

    Args:
        queries: (m, d) float32 or float64, no row zero.
        lengths: (m,) float64, their lengths.
        bank: At least k rows.
        k: Number of neighbours.
        stage: What computes the products.
    """
    dtype = torch.float32 if stage == "faiss" else stage
    (m, d), unit = queries.shape, _UNIT[dtype]
    right, bank_moved = bank.round(dtype)
    left, moved = round_rows(queries, lengths, dtype)
    most, lost = float(bank_moved.max()), d * unit / (1 - d * unit)
    if stage == "faiss" and queries.is_cuda:
        lost += 2.0**-10 + 2.0**-22  # it may round both factors to TF32
    exact = d * 2.0**-125 + (d + 16) * 2.0**-53 + GRID / 2
    bound = moved * (1 + most) + most + lost * (1 + moved) * (1 + most) + exact  # B
    if stage == "faiss":
        return _list_by_faiss(left, right, bound, k)
    products = _multiply(right, left)  # (n, m): pairs come sorted by row, so that each row is read once later
    relative = 2.0**-8 if products.dtype == torch.bfloat16 else 0.0  # r: a CPU rounds the result too
    threshold = _find_threshold(_kth_largest(products, k).to(products.dtype), bound, relative)
    row, query = _nonzero(_is_at_least(products, threshold))
    complete = query.bincount(minlength=m) <= _MOST * (k + _SPARE)
    if not bool(complete.all()):
        kept = complete[query]
        row, query = row[kept], query[kept]
    product = products[row, query].double()
    return Candidates(query, row, product, bound[query] + relative * product.abs(), complete)


def _find_threshold(lowest: Tensor, bound: Tensor, relative: float) -> Tensor:
    """Return the least product that a row among the k nearest can have, if k rows have products of at least `lowest`."""
    largest = lowest.double()
    worst = largest - relative * largest.abs() - 2 * bound
    threshold = torch.where(worst > 0, worst / (1 + relative), worst / (1 - relative)).to(lowest.dtype)
    return threshold.nextafter(threshold.new_tensor(-torch.inf))


def _list_by_faiss(left: Tensor, right: Tensor, bound: Tensor, k: int) -> Candidates:
    """Return the candidates among the largest products that faiss lists for each of (m, d) unit queries."""
    import faiss

    size = min(len(right), k + _SPARE + k // 4)
    if left.is_cuda:
        import faiss.contrib.torch_utils  # makes faiss take tensors of a GPU

        size = min(size, _LONGEST_FAISS_LIST)
        gpu, metric = faiss.StandardGpuResources(), faiss.METRIC_INNER_PRODUCT
        products, rows = faiss.knn_gpu(gpu, left, right, size, metric=metric)
    else:
        listed = faiss.knn(left.numpy(), right.numpy(), size, metric=faiss.METRIC_INNER_PRODUCT)
        products, rows = map(torch.from_numpy, listed)
    is_near = products >= _find_threshold(products[:, k - 1], bound, 0.0)[:, None]
    # A list is complete if it ends below the threshold; all rows that are not listed have smaller products.
    complete = ~is_near[:, -1] | (size == len(right))
    query, column = (is_near & complete[:, None]).nonzero(as_tuple=True)
    order = rows[query, column].argsort(stable=True)
    query, column = query[order], column[order]
    return Candidates(query, rows[query, column], products[query, column].double(), bound[query], complete)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return left @ right.T


def _kth_largest(products: Tensor, k: int) -> Tensor:
    """Return at most the k-th largest product of each query: that of the maxima of groups, of which there are fewer to sort."""
    size = max(1, len(products) // (_GROUPS * k))
    groups = len(products) // size
    maxima = torch.cat([products[: size * groups].view(size, groups, -1).amax(dim=0), products[size * groups :]])
    if maxima.is_cuda:
        return maxima.topk(k, dim=0, sorted=False).values.amin(dim=0)
    # NumPy selects by SIMD instructions, and finds nonzero values many times as fast as torch on a CPU.
    wide = maxima.to(torch.promote_types(maxima.dtype, torch.float32))
    return torch.from_numpy(np.partition(wide.T.contiguous().numpy(), -k, axis=1)[:, -k])


def _is_at_least(products: Tensor, threshold: Tensor) -> Tensor:
    """Return products >= threshold."""
    if products.dtype == torch.bfloat16 and bool((threshold > 0).all()):
        # The bits of floats compare like integers where the threshold is positive, several times as fast on a CPU.
        return products.view(torch.int16) >= threshold.view(torch.int16)
    return products >= threshold


def _nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    if mask.is_cuda:
        row, query = mask.nonzero(as_tuple=True)
        return row, query
    index = torch.from_numpy(np.flatnonzero(mask.numpy()))
    return index // mask.shape[1], index % mask.shape[1]


def _select_nearest(cosines: Tensor, query: Tensor, row: Tensor, m: int, k: int) -> Neighbours:
    """Select the k nearest of each of m queries from pairs that are sorted by row."""
    counts = query.bincount(minlength=m)
    starts = counts.cumsum(0) - counts
    order = query.argsort(stable=True)
    column = torch.arange(len(query), device=query.device) - starts.repeat_interleave(counts)
    table = cosines.new_full((m, int(counts.max())), -torch.inf) if m else cosines.new_empty(0, k)
    table[query[order], column] = cosines[order]
    nearest, position = table.sort(dim=1, descending=True, stable=True)  # of equal cosines the earlier row comes first
    return nearest[:, :k], row[order[starts[:, None] + position[:, :k]]]


def merge_nearest(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """Select the k nearest of the neighbours in several shards; ties go to the earlier row.

    Args:
        parts: Per shard (m, k_i) cosines and (m, k_i) rows, numbered as in the complete bank: the k nearest of the shard,
            or all of its rows where it has fewer, padded with any number of cosines of -inf.
        k: At most the number of rows of all shards.
    """
    cosines, rows = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    rows, order = rows.sort(dim=1)
    nearest, column = cosines.gather(1, order).sort(dim=1, descending=True, stable=True)
    return nearest[:, :k], rows.gather(1, column[:, :k])
