"""Exact k-NN against faiss alone: seconds as ratios in one run, taken in turns.

    python benchmarks/knn.py [--device cuda] [--bank 20000] [--queries 2000] [--k 20,200] [--search auto,torch,faiss]
    python benchmarks/knn.py --device cuda --bank 1281167 --queries 50000 --rounds 3       # ImageNet: the goal is 3 s

Gaussian clusters in float32, twenty rows per cluster. Faiss searches its flat index for the same k in float32, built before
the clock starts, as our bank is indexed before; our search ends with float64 cosines, proved to be those of the nearest.
Prints medians, the median of the rounds' ratios (above 1: ours is faster), what computes our products,
for how many queries faiss's float32 finds different neighbours, and on a GPU the peak of memory.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msn_eval.probes.knn_search import choose_stages, index_rows, search_nearest

_ROWS_PER_CLUSTER = 20


def main() -> None:
    """Print one line per k."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bank", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--k", default="20,200")
    parser.add_argument("--search", default="auto,faiss", help="who proposes candidates")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, searches = torch.device(options.device), options.search.split(",")
    bank, queries = _clusters(options.bank, options.queries, options.width, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, bank {tuple(bank.shape)}, {len(queries)} queries, "
          f"searched by {', '.join(searches)}")  # fmt: skip
    started = time.perf_counter()
    indexed = index_rows(bank)
    search_nearest(queries[:64], indexed, 1)
    print(f"bank made ready once: {time.perf_counter() - started:.2f} s")
    for k in map(int, options.k.split(",")):
        faiss_alone = _faiss(bank, queries, k)
        for search in searches:
            print(f"{search} ({choose_stages(device, options.bank, k, search)[0]}), ", end="")
            _compare(k, partial(search_nearest, queries, indexed, k, by=search), faiss_alone, options.rounds)
        if device.type == "cuda":
            print(f"  peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")


def _clusters(rows: int, queries: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    n_clusters = -(-rows // _ROWS_PER_CLUSTER)
    centres = 0.3 * torch.randn(n_clusters, width, generator=generator, device=device)

    def draw(n: int) -> Tensor:
        values = torch.randn(n, width, generator=generator, device=device)
        for start in range(0, n, n_clusters):  # in place: a bank of ImageNet's size is 4 GB
            part = values[start : start + n_clusters]
            part += centres[: len(part)]
        return values

    return draw(rows), draw(queries)


def _faiss(bank: Tensor, queries: Tensor, k: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return faiss's own search of a flat index of unit rows, on the same device."""
    import faiss

    index: Any = faiss.IndexFlatIP(bank.shape[1])
    unit = torch.nn.functional.normalize(queries).cpu().numpy()
    if bank.device.type == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), bank.device.index or 0, index)
    index.add(torch.nn.functional.normalize(bank).cpu().numpy())

    def search() -> tuple[Tensor, Tensor]:
        cosines, rows = index.search(unit, k)
        return torch.from_numpy(cosines), torch.from_numpy(rows)

    return search


def _compare(
    k: int, ours: Callable[[], tuple[Tensor, Tensor]], theirs: Callable[[], tuple[Tensor, Tensor]], rounds: int
) -> None:
    pairs = []
    for _ in range(rounds + 1):
        seconds = []
        for search in (ours, theirs):
            started = time.perf_counter()
            nearest = search()[1].cpu()
            seconds.append((time.perf_counter() - started, nearest))
        (our, mine), (their, others) = seconds
        pairs.append((our, their))
    pairs = pairs[1:]
    differing = int((mine.sort(dim=1).values != others.sort(dim=1).values).any(dim=1).sum())
    ratios = sorted(their / our for our, their in pairs)
    our, their = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"k={k}: ours {our:.3f} s, faiss {their:.3f} s, ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}); {differing} queries have different neighbours in faiss's float32"
    )


if __name__ == "__main__":
    main()
