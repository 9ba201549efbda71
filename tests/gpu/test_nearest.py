"""Exact neighbours on a GPU: those of the CPU, within bounded memory."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import normalize

from msn_eval.probes.knn_search import GRID, find_candidates, index_rows, search_nearest

pytestmark = pytest.mark.gpu
SIMULATED = not torch.cuda.is_available()  # as slow as a CPU, so that sizes are smaller


def rows(n: int, d: int = 384, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """Allow TF32 and short sums, as a user's own code may have done, and put the settings back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction
    matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = "tf32", True
    yield
    matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.usefixtures("tf32_allowed")
@pytest.mark.parametrize("k", [1, 20, 200])
def test_neighbours_are_those_of_the_cpu(k: int) -> None:
    bank, queries = rows(1_000 if SIMULATED else 5_000), rows(100 if SIMULATED else 300, seed=1)
    bank[torch.arange(7, len(bank), 90)] = bank[3].clone()
    expected = search_nearest(queries, bank, k)

    result = search_nearest(queries.cuda(), bank.cuda(), k)

    torch.testing.assert_close(result[0].cpu(), expected[0], rtol=0, atol=GRID)
    assert torch.equal(result[1].cpu(), expected[1])


@pytest.mark.usefixtures("tf32_allowed")
def test_no_product_is_further_from_its_cosine_than_the_bound() -> None:
    queries, bank = rows(200, 1536).cuda() + 1, rows(1_000 if SIMULATED else 3_000, 1536, seed=1).cuda() + 1

    result = find_candidates(index_rows(queries), index_rows(bank), len(bank), torch.bfloat16)

    cosines = normalize(queries.double()) @ normalize(bank.double()).T
    assert ((result.product - cosines[result.query, result.row]).abs() <= result.bound).all()


def test_bfloat16_products_leave_few_queries_incomplete() -> None:
    n = 500 if SIMULATED else 2_000
    queries, bank = rows(n, 768).cuda(), rows(10 * n, 768, seed=1).cuda()

    result = find_candidates(index_rows(queries), index_rows(bank), 20, torch.bfloat16)

    assert int((~result.complete).sum()) < 40


@pytest.mark.real_gpu("the size of ImageNet")
def test_an_imagenet_bank_is_searched_within_bounded_memory() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    bank = index_rows(torch.randn(400_000, 768, device="cuda", generator=generator))
    queries = torch.randn(20_000, 768, device="cuda", generator=generator)
    search_nearest(queries[:8], bank, 20)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()

    search_nearest(queries, bank, 20)

    # The products of all queries with all rows would be 32 GB.
    assert torch.cuda.max_memory_allocated() - held < 20 << 30
