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
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from msn_eval.errors import NumericalError, ResourceError, UsageError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.features.encoder import exact_float32
from msn_eval.probes.base import choose_float64_device

Neighbours = tuple[Tensor, Tensor]  # cosines (m, k) float64, descending, and rows (m, k) int64
Search = Literal["auto", "torch", "faiss"]
Stage = torch.dtype | Literal["faiss"]  # the dtype of torch's products, or float32 products of faiss
GRID = 2.0**-38  # cosines are rounded to its multiples, so that mathematically equal ones tie
_STEP_VALUES, _STEP_VALUES_CPU = 1 << 22, 1 << 18  # float64 values held at once; on a CPU they fit into a cache
_WIDE_VALUES = 1 << 26  # a CPU also keeps rows of at most so many values in float64: 512 MiB
_QUERIES, _QUERIES_CUDA = 512, 4096  # per chunk at most
_PRODUCTS, _PRODUCTS_CUDA = 1 << 26, 1 << 29  # at once at most
_LARGE_BANK = 1 << 12  # rows; with fewer, every dtype is fast
_GROUPS = 16  # per neighbour: the k largest of 16 k group maxima are nearly the k largest products
_MOST, _SPARE = 16, 16  # candidates per neighbour and spare one; with more, a finer dtype takes less time
_MOST_BY_FAISS, _LONGEST_FAISS_LIST = 64, 2048  # neighbours where faiss is faster, and what its GPU index can list
_COLUMNS = 1 << 24  # of a table at most; in one integer with a multiple of GRID
_UNIT = {torch.bfloat16: 2.0**-21, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows to search among or for: (n, d) float32 or float64 values, and their (n,) float64 L2 lengths."""

    values: Tensor
    lengths: Tensor
    rounded: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)  # what `round` has returned

    def __getitem__(self, chosen: Tensor | slice) -> "Rows":
        return Rows(values=self.values[chosen], lengths=self.lengths[chosen])

    @cached_property
    def wide(self) -> Tensor | None:
        return self.values.double() if self.values.is_cpu and self.values.numel() <= _WIDE_VALUES else None

    @cached_property
    def host(self) -> "Rows":
        return Rows(values=self.values.cpu(), lengths=self.lengths.cpu())

    def round(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return rows of length 1 in `dtype` (zero rows stay zero), and bounds of how far each moved, (n,) float64."""
        if dtype not in self.rounded:
            narrow, moved = torch.empty_like(self.values, dtype=dtype), []
            scales = self.lengths.where(self.lengths > 0, 1.0)[:, None].expand_as(self.values)
            for part, scale, target in zip(*map(_split, (self.values, scales, narrow)), strict=True):
                unit = part.double() / scale
                moved.append((target.copy_(unit).double() - unit).norm(dim=1))
            lost = (self.values.shape[1] + 16) * 2.0**-53  # of float64, in the unit row and in the distance measured
            self.rounded[dtype] = narrow, torch.cat(moved) * (1 + lost) + lost
        return self.rounded[dtype]


def index_rows(values: Tensor, what: str = "labelled row") -> Rows:
    """Prepare (n, d) floating rows for searches. Raises NumericalError as `check_finite` does."""
    values = (values if values.dtype == torch.float64 else values.float()).contiguous()
    check_finite(values, what)
    lengths = torch.cat([_folded_sum(part.double().square()).sqrt() for part in _split(values)])
    return Rows(values=values, lengths=lengths)


def check_finite(values: Tensor, what: str) -> None:
    """Raise NumericalError if a row holds NaN, which would rank first, or infinity."""
    bad = torch.cat([~part.isfinite().all(dim=1) for part in _split(values)]).nonzero()[:, 0]
    if len(bad):
        shown = ", ".join(map(str, bad[:5].tolist())) + (", …" if len(bad) > 5 else "")
        what = f"{len(bad)} of {len(values)} {what}s {'is' if len(bad) == 1 else 'are'} not finite: {shown}"
        raise NumericalError(what, hint="The features overflowed; retry with --precision fp32.")


def search_nearest(queries: Tensor, bank: Tensor | Rows, k: int, *, by: Search = "auto") -> Neighbours:
    """Find the k rows of `bank` with the largest cosine to each query; ties go to the earlier row.

    Args:
        queries: (m, d) floating, m >= 1, rows of any length; a zero row has the cosine 0 to all.
        bank: (n, d) floating, n >= k, or what `index_rows` returns for it.
        k: Number of neighbours.
        by: Who proposes candidates, torch or faiss; "auto" takes what is usually faster. The result is the same.

    Raises:
        NumericalError: Rows are not finite, or the device computes wrong products.
        ResourceError: There is not enough memory.
        UsageError: `by` is "faiss", and faiss or its GPU index is not installed.
    """
    bank = bank if isinstance(bank, Rows) else index_rows(bank)
    device, n, m, indexed = queries.device, len(bank.values), len(queries), index_rows(queries, "query")
    is_cuda, stages, threads = device.type == "cuda", choose_stages(device, n, k, by), torch.get_num_threads()
    most, products = (_QUERIES_CUDA, _PRODUCTS_CUDA) if is_cuda else (_QUERIES, _PRODUCTS)
    # On a CPU each chunk has a thread, since selection runs on one; on a GPU the chunks take turns.
    n_chunks = 1 if is_cuda else max(1, min(threads, 2 * products // (most * n)))
    step, parts = max(1, min(most, products // (n * n_chunks), -(-m // n_chunks))), list[Neighbours]()
    with exact_float32(), ExitStack() as stack:
        run = stack.enter_context(ThreadPoolExecutor(n_chunks)).map if n_chunks > 1 else map
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(threads // n_chunks)
        while (start := sum(len(rows) for _, rows in parts)) < m:
            chunks = [indexed[first : first + step] for first in range(start, m, step)]
            try:
                for part in run(lambda chunk: _search_chunk(chunk, bank, k, stages), chunks):
                    parts.append(part)
                break
            except OUT_OF_MEMORY_ERRORS as error:
                if not is_out_of_memory(error):
                    raise
                if step == 1:
                    what = f"memory of {device} is too small for k-NN among {n:,} rows: {error}"
                    hint = f"Use {'--device cpu for this probe' if is_cuda else 'a machine with more memory'}."
                    raise ResourceError(what, hint=hint) from error
            # Outside of the handler, whose traceback keeps the tensors that did not fit.
            step = (step + 1) // 2
            torch.cuda.empty_cache()
    return torch.cat([cosines for cosines, _ in parts]), torch.cat([rows for _, rows in parts])


def choose_stages(device: torch.device, n: int, k: int, by: Search = "auto") -> tuple[Stage, ...]:
    """Return what computes products for a bank of n rows first, then what does for queries left incomplete, in turn."""
    finer, is_cpu = (torch.float32, torch.float64), device.type == "cpu"
    if by == "faiss":
        check_faiss(device)
        return ("faiss", *finer) if is_cpu or k < _LONGEST_FAISS_LIST else finer
    if n < _LARGE_BANK:
        return finer
    if not is_cpu or _is_bfloat16_fast():
        return (torch.bfloat16, *finer)
    return ("faiss", *finer) if by == "auto" and k <= _MOST_BY_FAISS and find_spec("faiss") is not None else finer


def check_faiss(device: torch.device) -> None:
    """Raise UsageError if faiss cannot search on this device."""
    problem = "" if find_spec("faiss") is not None else "faiss is not installed"
    if device.type == "cuda" and not problem:
        import faiss

        problem = "" if getattr(faiss, "get_num_gpus", int)() else "the installed faiss has no GPU index"
    if problem:
        hint = "pip install faiss-gpu (Linux on x86-64) or faiss-cpu, or use --search auto."
        raise UsageError(f"--search faiss: {problem}", hint=hint)


@lru_cache
def _is_bfloat16_fast() -> bool:
    """Measure whether this CPU has fast bfloat16 products; the smallest of several times, since a busy machine delays most."""
    wide = torch.randn(_LARGE_BANK, 512)
    products = (partial(torch.mm, rows, rows[:256].T) for rows in (wide.bfloat16(), wide))
    narrow_seconds, wide_seconds = (min(timeit.repeat(product, number=1, repeat=8)) for product in products)
    return narrow_seconds < wide_seconds


def _search_chunk(queries: Rows, bank: Rows, k: int, stages: Sequence[Stage]) -> Neighbours:
    cosines = queries.lengths.new_zeros(len(queries.values), k)
    rows = torch.arange(k, device=cosines.device).repeat(len(cosines), 1)  # the neighbours of a zero query
    remaining = queries.lengths.nonzero()[:, 0]
    for stage in stages:
        if not len(remaining):
            break
        some = queries[remaining]
        query, row, product, bound, complete = find_candidates(some, bank, k, stage)
        exact = exact_cosines(some, bank, query, row)
        if bool(((product - exact).abs() > bound).any()):
            what = f"products in {str(stage).removeprefix('torch.')} on {cosines.device} are wrong by more than rounding explains"
            hint = "Another library changed how this process computes (cyanure's fit does): use a process of its own."
            raise NumericalError(what, hint=hint)
        done, query = remaining[complete], (complete.cumsum(0) - 1)[query]
        cosines[done], rows[done] = _select_nearest(exact, query, row, len(done), k)
        remaining = remaining[~complete]
    row = torch.arange(len(bank.values), device=cosines.device)
    for index in remaining.tolist():  # so many rows are nearly equal that all are compared
        exact = exact_cosines(queries[index : index + 1], bank, torch.zeros_like(row), row)
        cosines[index], rows[index] = merge_nearest([(exact[None], row[None])], k)
    return cosines, rows


class Candidates(NamedTuple):
    """Pairs of a query and a row that can be near, sorted by row."""

    query: Tensor  # (p,) int64
    row: Tensor  # (p,) int64
    product: Tensor  # (p,) float64
    bound: Tensor  # (p,) float64, how far the product can be from the cosine
    complete: Tensor  # (m,) bool, False for a query that has too many candidates to list


def find_candidates(queries: Rows, bank: Rows, k: int, stage: Stage) -> Candidates:
    """Return the rows that can be among the k nearest of each query, of which none is zero, by products of a stage."""
    dtype = torch.float32 if stage == "faiss" else stage
    (left, moved), (right, bank_moved) = queries.round(dtype), bank.round(dtype)
    (m, d), most, unit = left.shape, float(bank_moved.max()), _UNIT[dtype]
    narrowed = 2.0**-10 + 2.0**-22 if stage == "faiss" and left.is_cuda else 0.0  # it may round both factors to TF32
    lost = d * unit / (1 - d * unit) + narrowed
    exact = d * 2.0**-125 + (d + 16) * 2.0**-53 + GRID / 2
    bound = moved * (1 + most) + most + lost * (1 + moved) * (1 + most) + exact  # B
    # Products are (rows, queries): pairs come sorted by row, so that each row is read once later.
    products, lowest, listed = (_list_by_faiss if stage == "faiss" else _multiply)(left, right, k)
    relative = 2.0**-8 if products.dtype == torch.bfloat16 else 0.0  # r: a CPU rounds the result too
    worst = lowest.double() * (1 - relative * lowest.sign()) - 2 * bound
    threshold = (worst / (1 + relative * worst.sign())).to(products.dtype)
    threshold = threshold.nextafter(torch.full_like(threshold, -torch.inf))
    # The bits of floats compare like integers where the threshold is positive, several times as fast on a CPU.
    bits = torch.int16 if products.dtype == torch.bfloat16 and bool((threshold > 0).all()) else products.dtype
    near = products.view(bits) >= threshold.view(bits)
    # On a CPU, NumPy finds nonzero values many times as fast.
    index = near.flatten().nonzero()[:, 0] if near.is_cuda else torch.from_numpy(np.flatnonzero(near.numpy()))
    row, query = index // m, index % m
    product, complete = products[row, query].double(), query.bincount(minlength=m) <= _MOST * (k + _SPARE)
    if listed is not None:  # a list is complete if it ends below the threshold: all that is not listed is smaller
        complete = ~near[-1] | (len(near) == len(right))
        row, order = listed[row, query].sort()
        query, product = query[order], product[order]
    if not bool(complete.all()):
        kept = complete[query]
        row, query, product = row[kept], query[kept], product[kept]
    return Candidates(query, row, product, bound[query] + relative * product.abs(), complete)


def _multiply(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, None]:
    """Return the products of (m, d) queries with all rows, (n, m), and at most the k-th largest of each query, (m,)."""
    is_mixed = left.is_cuda and left.dtype == torch.bfloat16
    products = torch.mm(right, left.T, out_dtype=torch.float32) if is_mixed else right @ left.T
    size = max(1, len(right) // (_GROUPS * k))  # maxima of groups are fewer to sort
    maxima = products[: len(right) // size * size].view(size, -1, len(left)).amax(dim=0)
    if maxima.is_cuda:
        return products, maxima.topk(k, dim=0, sorted=False).values.amin(dim=0), None
    maxima = maxima.to(torch.promote_types(maxima.dtype, torch.float32)).T.contiguous()
    return products, torch.from_numpy(np.partition(maxima.numpy(), -k, axis=1)[:, -k]), None  # by SIMD instructions


def _list_by_faiss(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest products of each of (m, d) queries, (size, m), their k-th, (m,), and their rows, (size, m)."""
    import faiss

    size = min(len(right), k + _SPARE + k // 4)
    if left.is_cuda:
        import faiss.contrib.torch_utils  # makes faiss take tensors of a GPU

        size, gpu = min(size, _LONGEST_FAISS_LIST), faiss.StandardGpuResources()
        products, rows = faiss.knn_gpu(gpu, left, right, size, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        found = faiss.knn(left.numpy(), right.numpy(), size, metric=faiss.METRIC_INNER_PRODUCT)
        products, rows = map(torch.from_numpy, found)
    return products.T.contiguous(), products[:, k - 1], rows.T.contiguous()


def exact_cosines(queries: Rows, bank: Rows, query: Tensor, row: Tensor) -> Tensor:
    """Return the cosines of (p,) pairs, float64 multiples of GRID; a zero row has the cosine 0 to all.

    A pair has the same bits in any batch and on any number of threads: each value is within GRID / 2 + (d + 16) 2^-53 of
    the cosine of the rows as given. The int64 indices in `row` are ascending. The pairs of a GPU
    that is slow in float64 are computed on the CPU.
    """
    if choose_float64_device(row.device) != row.device:
        return exact_cosines(queries.host, bank.host, query.cpu(), row.cpu()).to(row.device)
    scale, factors, dots = queries.lengths[query] * bank.lengths[row], queries.values.double(), list[Tensor]()
    step = max(1, len(row) if bank.wide is not None else _STEP_VALUES // factors.shape[1])
    for rows, owners in zip(torch.split(row, step), torch.split(query, step), strict=True):
        if factors.is_cuda:  # a CUDA reduction adds in an order that depends on the number of pairs
            dots.append(_folded_sum(bank.values[rows].double().mul_(factors[owners])))
            continue
        table, position = bank.wide, rows
        if table is None:
            used, position = torch.unique_consecutive(rows, return_inverse=True)
            table = bank.values[used].double()
        starts = pad(position.bincount(minlength=len(table)).cumsum(0), (1, 0))
        zeros, size = scale.new_zeros(len(owners)), (len(table), len(factors))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            pattern = torch.sparse_csr_tensor(starts, owners, zeros, size=size, check_invariants=False)
        # It sums the products of each pair by itself, in an order that depends on d alone, and gathers no rows.
        dots.append(torch.sparse.sampled_addmm(pattern, table, factors.T, beta=0.0).values())
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
    return torch.split(values, max(1, (_STEP_VALUES if values.is_cuda else _STEP_VALUES_CPU) // values.shape[1]))


def _select_nearest(cosines: Tensor, query: Tensor, row: Tensor, m: int, k: int) -> Neighbours:
    """Select the k nearest of each of m queries from pairs that are sorted by row."""
    counts, narrow = query.bincount(minlength=m), query.to(torch.int16)  # which NumPy sorts by radix
    order = torch.from_numpy(narrow.numpy().argsort(kind="stable")) if query.is_cpu else query.argsort(stable=True)
    filled = torch.arange(max(counts.tolist(), default=k), device=query.device) < counts[:, None]
    table = cosines.new_full(filled.shape, -torch.inf).masked_scatter_(filled, cosines[order])
    rows = row.new_zeros(filled.shape).masked_scatter_(filled, row[order])
    return merge_nearest([(table, rows)], k)


def merge_nearest(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """Select the k nearest of the neighbours in several shards; ties go to the earlier row.

    Args:
        parts: Per shard, in the order of rows, (m, k_i) cosines, multiples of GRID, and (m, k_i) rows of the complete bank: the
            k nearest of the shard, or all of its rows where it has fewer, padded with any number of cosines of -inf.
        k: At most the number of rows of all shards.
    """
    cosines, rows = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    # One integer per cosine, its multiple of GRID and then its column: NumPy sorts integers by SIMD instructions.
    keys = (cosines.clamp(min=-1.5) / -GRID).long() * _COLUMNS + torch.arange(cosines.shape[1], device=cosines.device)
    keys = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.is_cpu else keys.sort(dim=1).values
    column = keys[:, :k] % _COLUMNS
    return cosines.gather(1, column), rows.gather(1, column)
