"""Exact neighbours on a GPU: equal to the CPU's bit for bit, with bounded memory."""

from collections.abc import Iterator

import pytest
import torch

from msn_eval.probes.knn_search import candidates as shortlist
from msn_eval.probes.knn_search import search as nearest
from msn_eval.probes.knn_search.candidates import By, find_shortlist
from msn_eval.probes.knn_search.index import index_bank, row_lengths
from msn_eval.probes.knn_search.search import search_nearest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def rows(n: int, d: int = 384, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """Allow TF32 and reduced-precision sums, as user code may do, and restore the settings afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction
    matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = "tf32", True
    yield
    matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.usefixtures("tf32_allowed")
@pytest.mark.parametrize("by", ["auto", "faiss"])
@pytest.mark.parametrize("k", [1, 20, 200])
def test_neighbours_and_cosines_equal_those_of_the_cpu_bit_for_bit(k: int, by: By) -> None:
    if by == "faiss" and not hasattr(pytest.importorskip("faiss"), "StandardGpuResources"):
        pytest.skip("this faiss has no GPU index")
    bank, queries = rows(5_000), rows(300, seed=1)
    bank[torch.arange(7, 5_000, 90)] = bank[3].clone()
    expected = search_nearest(queries, bank, k)

    found = search_nearest(queries.cuda(), bank.cuda(), k, by=by)

    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.usefixtures("tf32_allowed")
def test_error_of_coarse_products_is_within_the_bound() -> None:
    queries, bank = rows(200, 1536).cuda() + 1, rows(3_000, 1536, seed=1).cuda() + 1

    listed = find_shortlist(queries, row_lengths(queries), index_bank(bank), 3_000, arithmetic="bfloat16")

    cosines = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(bank.double()).T
    assert ((listed.coarse - cosines.gather(1, listed.rows)).abs() <= listed.bound).all()


def test_coarsest_arithmetic_suffices_for_most_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = rows(2_000, 768).cuda(), rows(20_000, 768, seed=1).cuda()
    searched: dict[str, int] = {}

    def counting_search(some: torch.Tensor, *arguments: object, **options: object) -> shortlist.Shortlist:
        searched[str(options["arithmetic"])] = searched.get(str(options["arithmetic"]), 0) + len(some)
        return find_shortlist(some, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(nearest, "find_shortlist", counting_search)

    search_nearest(queries, bank, 20)

    assert searched["bfloat16"] == 2_000
    assert searched.get("float64", 0) < 40


def test_search_of_a_large_index_uses_bounded_memory() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    bank = index_bank(torch.randn(400_000, 768, device="cuda", generator=generator))
    queries = torch.randn(20_000, 768, device="cuda", generator=generator)
    search_nearest(queries[:8], bank, 20)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()

    search_nearest(queries, bank, 20)

    # The products of all queries with all rows would be 32 GB.
    assert torch.cuda.max_memory_allocated() - held < 20 << 30
