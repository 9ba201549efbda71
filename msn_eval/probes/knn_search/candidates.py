"""Shortlist: rows that a coarse product finds near each query, and how far that product can be from the cosine.

The product is taken of rows of unit length in bfloat16, float32 or float64. Let u be a query of unit length and v a bank
row, u' and v' the rounded ones, s = u.v their cosine, and c what the device computes for u'.v'. Then

    |c - s|  <=  |u'.v' - u.v|  +  |c - u'.v'|.

The first part is what rounding did to the rows. With e = |u' - u| and f = |v' - v|, both *measured* in float64,

    |u'.v' - u.v|  =  |(u' - u).v' + u.(v' - v)|  <=  e (1 + f) + f        (Cauchy and Schwarz; |v'| <= 1 + f, |u| = 1).

The second part is what the device lost. A sum of d products in any order, each step with a relative error of at most w,
fused or not, is within g_d |u'||v'| of the true one, g_d = d w / (1 - d w) (Higham 2002, sections 3.1 and 4.2), where
w = 2^-24 in float32 and 2^-53 in float64. Products of bfloat16 values are exact in float32, where they are summed; matrix
units may cut instead of rounding and drop bits in aligning (Fasi et al. 2021), for which w = 2^-21 leaves a factor of eight.
Values too small for float32, at most 2^-126 each, may be flushed: d 2^-125 in all. Where a product rounds its inputs to
TF32, 2^-11 for each factor is lost; where the answer is given in bfloat16, half a unit in its last place: out = 2^-8 of it.

    bound  =  e (1 + f) + f + (g_d + in) (1 + e) (1 + f) + d 2^-125 + (d + 16) 2^-53 + 2^-39 + out |c|,

the two before the last for the rounding of the exact cosine itself, in float64 and to its grid, and of what is compared here.
f is the largest of the bank, so that for a query c + bound rises with c: no row outside a list has a larger one than the
list's last.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from msn_eval.errors import UsageError
from msn_eval.features.encoder import exact_float32
from msn_eval.probes.knn_search.index import GRID, Bank, Rounded, rounded, unit_rows

Arithmetic = Literal["bfloat16", "float32", "float64"]
By = Literal["auto", "torch", "faiss"]

_SPARE = 16  # candidates beyond k: equal rows are one, so few stand as near to each other as float32 is coarse
_PAYS = 1.5  # times as fast as float32 must bfloat16 be: its shortlists are longer
_FAISS_GPU_LONGEST = 2048  # of its shortlists
_TILE_ROWS = 32_768  # bank rows a product on a CPU
_GROUP = 8  # columns of products that are first looked at by their largest
_CUDA_TILE_ROWS = 131_072


@dataclass(frozen=True, kw_only=True)
class Shortlist:
    """The rows with the largest coarse products.

    coarse: (m, s) float64, falling
    rows:   (m, s) int64, distinct rows of the bank
    bound:  (m, s) float64: no coarse product is further from its cosine than this; that of a row outside of the list is at
            most coarse + bound of the last member
    """

    coarse: Tensor
    rows: Tensor
    bound: Tensor


def arithmetics(device: torch.device, by: By) -> tuple[Arithmetic, ...]:
    """Give the arithmetics to try one after the other, the coarsest first, as they pay on this device."""
    if by != "faiss" and device.type == "cuda":
        return ("bfloat16", "float64")
    if by != "faiss" and bfloat16_pays():
        return ("bfloat16", "float32", "float64")
    return ("float32", "float64")


@lru_cache(maxsize=1)
def bfloat16_pays() -> bool:
    """Measure whether this processor multiplies bfloat16 so much faster that longer shortlists are worth it.

    Which answer a busy machine gives moves no number: every shortlist leads to the same neighbours.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(128, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
        times = []
        for _ in range(12):  # the least of them, since a busy machine delays most
            started = time.perf_counter()
            left @ right.T
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return _PAYS * seconds[torch.bfloat16] < seconds[torch.float32]


def find_shortlist(
    queries: Tensor, lengths: Tensor, bank: Bank, k: int, *, arithmetic: Arithmetic, by: By = "auto"
) -> Shortlist:
    """Give for each query the rows with the largest coarse products: k of them and some to spare.

    queries, lengths: (m, d) float32 or float64 and (m,) float64, no row zero; k at most the bank's distinct rows
    Raises UsageError where faiss was asked for and is not there.
    """
    size = min(len(bank.values), 2 * k + 4 * _SPARE if arithmetic == "bfloat16" else k + _SPARE)
    left = _rounded_queries(queries, lengths, arithmetic)
    loss = _Loss(width=queries.shape[1], arithmetic=arithmetic, device=queries.device.type, faiss=False)
    if arithmetic == "float64":
        largest = _unit_drift(queries.shape[1])
        coarse, rows = _by_torch(left.values, bank, size, arithmetic)
    else:
        right = bank.bfloat16 if arithmetic == "bfloat16" else bank.float32
        largest = float(right.drift.max())
        library = _faiss_for(queries.device.type, by, arithmetic, size)
        if library is not None:
            loss = replace(loss, faiss=True)
            coarse, rows = _by_faiss(library, left.values, right.values, size)
        else:
            coarse, rows = _by_torch(left.values, bank, size, arithmetic)
    coarse = coarse.to(torch.float64)
    return Shortlist(coarse=coarse, rows=rows, bound=error_bound(coarse, left.drift, largest, loss))


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """What says how much a product can lose."""

    width: int
    arithmetic: Arithmetic
    device: str
    faiss: bool


def error_bound(coarse: Tensor, drift: Tensor, bank_drift: float, loss: _Loss) -> Tensor:
    """Give the bound of the module's docstring, (m, s), one for each coarse product.

    coarse: (m, s) float64; drift: (m,) float64, e; bank_drift: f, the largest of the bank
    """
    d = loss.width
    unit = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-21}[loss.arithmetic]
    summed = d * unit / (1 - d * unit)
    rounded_output = 2.0**-8 if loss.arithmetic == "bfloat16" and loss.device != "cuda" else 0.0
    tf32_inputs = 2.0**-10 + 2.0**-22 if loss.faiss and loss.device == "cuda" else 0.0  # faiss does not say
    lost = summed + tf32_inputs * (1 + summed)
    rest = d * 2.0**-125 + (d + 16) * 2.0**-53 + GRID / 2
    whole = drift * (1 + bank_drift) + bank_drift + lost * (1 + drift) * (1 + bank_drift) + rest
    return whole[:, None] + rounded_output * coarse.abs()


def _unit_drift(width: int) -> float:
    return (width + 16) * 2.0**-53  # of the length's relative error and the division


def _rounded_queries(queries: Tensor, lengths: Tensor, arithmetic: Arithmetic) -> Rounded:
    if arithmetic == "float64":
        drift = torch.full_like(lengths, _unit_drift(queries.shape[1]))
        return Rounded(values=unit_rows(queries, lengths), drift=drift)
    return rounded(queries, lengths, getattr(torch, arithmetic))


def _by_torch(left: Tensor, bank: Bank, size: int, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Search tile by tile of the bank, keeping the largest so far: memory does not grow with the bank."""
    best, where = left.new_empty(len(left), 0), torch.empty(len(left), 0, dtype=torch.int64, device=left.device)
    step = tile_rows(left.device)
    with _honest_products():
        for start in range(0, len(bank.values), step):
            products = _products(left, _tile(bank, slice(start, start + step), arithmetic))
            found, rows = _largest(products, min(size, products.shape[1]))
            del products
            if not start:
                best, where = found, rows
                continue
            best, chosen = torch.cat([best, found], dim=1).topk(min(size, best.shape[1] + found.shape[1]), dim=1)
            where = torch.cat([where, rows + start], dim=1).gather(1, chosen)
    return best, where


def _tile(bank: Bank, some: slice, arithmetic: Arithmetic) -> Tensor:
    match arithmetic:
        case "bfloat16":
            return bank.bfloat16.values[some]
        case "float32":
            return bank.float32.values[some]
        case "float64":
            return unit_rows(bank.values[some], bank.lengths[some])


def _products(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype != torch.bfloat16:
        return left @ right.T
    if left.device.type == "cuda":
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return left @ right.T  # a processor gives bfloat16


def _largest(products: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Give what `topk` gives. On a processor by way of the largest of each group of columns: no more than `size` groups hold
    one of the `size` largest, and those that do have the largest maxima."""
    columns = products.shape[1] // _GROUP
    if products.device.type == "cuda" or columns < 2 * size:
        return products.topk(size, dim=1)
    grouped = products[:, : columns * _GROUP].view(len(products), _GROUP, columns)  # columns apart are in one group
    groups = grouped.amax(dim=1).topk(size, dim=1, sorted=False).indices
    spread = torch.arange(0, columns * _GROUP, columns)[:, None]
    rest = torch.arange(columns * _GROUP, products.shape[1]).expand(len(products), -1)
    members = torch.cat([(groups[:, None] + spread).flatten(1), rest], dim=1)
    values, places = products.gather(1, members).topk(size, dim=1)
    return values, members.gather(1, places)


@contextmanager
def _honest_products() -> Iterator[None]:
    """Keep TF32 out of float32 products, and bfloat16 out of the sums of bfloat16 ones, as the bound has it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with exact_float32():
            yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def tile_rows(device: torch.device) -> int:
    """Give how many rows of the bank a product takes at once."""
    return _CUDA_TILE_ROWS if device.type == "cuda" else _TILE_ROWS


def _faiss_for(device: str, by: By, arithmetic: Arithmetic, size: int) -> Any | None:
    """Give faiss where it is to make the shortlist: asked for, or the fastest float32 search of a processor."""
    if arithmetic != "float32" or by == "torch" or (by == "auto" and device == "cuda"):
        return None
    try:
        import faiss
    except ImportError as error:
        if by == "auto":
            return None
        raise UsageError(
            "k-NN by faiss was asked for, and faiss is not installed",
            hint="pip install faiss-gpu (Linux on x86-64) or faiss-cpu.",
        ) from error
    if device == "cuda":
        if not getattr(faiss, "get_num_gpus", lambda: 0)():
            raise UsageError("this faiss has no GPU index", hint="pip install faiss-gpu (Linux on x86-64).")
        return faiss if size <= _FAISS_GPU_LONGEST else None
    return faiss


def _by_faiss(faiss: Any, left: Tensor, right: Tensor, size: int) -> tuple[Tensor, Tensor]:
    if left.device.type == "cuda":
        import faiss.contrib.torch_utils  # torch tensors as they lie on the device

        coarse, rows = faiss.knn_gpu(faiss.StandardGpuResources(), left, right, size, metric=faiss.METRIC_INNER_PRODUCT)
        return coarse, rows
    found, places = faiss.knn(left.numpy(), right.numpy(), size, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(found), torch.from_numpy(places)
