"""Ranks that share a fit or a search: rank 0 leads, the others serve until they are shut down."""

import multiprocessing
import socket
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msn_eval.distributed.group import join_group
from msn_eval.distributed.rank_info import Timeouts
from msn_eval.errors import MsnEvalError, NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes import distributed, knn
from msn_eval.probes.base import WorkerGroup
from msn_eval.probes.distributed import search_on_workers, serve, shutdown
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.knn_search import Rows, index_rows
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.logistic_solvers import newton

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ranks are forked")
CPU = torch.device("cpu")
QUICK = Timeouts(beat_seconds=0.05, silent_seconds=60, linger_seconds=0.5, unwind_seconds=5)


def _lead(world: int, work: Callable[[WorkerGroup], object]) -> list[object]:
    """Return, by rank, what `work` returns on rank 0 while the others serve, or a rank's exit code and error."""
    return _run_on_ranks(world, lambda workers: _lead_or_serve(workers, work))


def _lead_or_serve(workers: WorkerGroup, work: Callable[[WorkerGroup], object]) -> object:
    if workers.group.rank:
        return serve(workers)
    result = work(workers)
    shutdown(workers)
    return result


def _run_on_ranks(world: int, run: Callable[[WorkerGroup], object]) -> list[object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def start(rank: int) -> None:
        torch.set_num_threads(1)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        try:
            with join_group(environment={name: str(value) for name, value in names.items()}, timeouts=QUICK) as group:
                result = run(WorkerGroup(group=group, device=CPU))
        except MsnEvalError as error:
            result = error.exit_code, str(error)
        queue.put((rank, result))

    processes = [context.Process(target=start, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [results[rank] for rank in range(world)]


def _features() -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(301) % 5
    values = torch.randn(5, 12, generator=generator)[labels] + torch.randn(301, 12, generator=generator)
    return Features(values=values, labels=labels, image_ids=tuple(map(str, range(301))), n_classes=5, tap="cls")


def _queries() -> Tensor:
    return torch.randn(40, 12, generator=torch.Generator().manual_seed(1))


def test_ranks_together_fit_what_one_rank_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton, "_WHOLE_BYTES", 0)
    probes = Logistic(lambdas=(0.1, 0.0025)), Logistic(lambdas=(1.0,))

    def fit(workers: WorkerGroup | None) -> list[tuple[float, float, list[int]]]:
        fits = []
        for probe in probes:
            fitted = probe.fit(_features(), CPU, workers=workers)
            for config, scores in zip(fitted.settings, fitted.scores(_queries()), strict=True):
                assert config.objective is not None
                assert config.certificate is not None
                fits.append((config.objective, config.certificate, scores.argmax(dim=1).tolist()))
        return fits

    together, *others = _lead(3, fit)

    assert others == [None, None]
    for (objective, _, expected), (shared, gap, predictions) in zip(fit(None), together, strict=True):  # type: ignore[call-overload]
        assert shared == pytest.approx(objective, rel=1e-6)
        assert gap <= 1e-6
        assert predictions == expected


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the numbers of rows that this rank has indexed for shared searches."""
    rows: list[int] = []

    def index(values: Tensor) -> Rows:
        rows.append(len(values))
        return index_rows(values)

    monkeypatch.setattr(distributed, "index_rows", index)
    return rows


def test_ranks_together_find_the_neighbours_and_votes_of_one_rank_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, indexed: list[int]
) -> None:
    monkeypatch.setattr(knn, "_SHARED_VALUES", 0)
    monkeypatch.setattr(distributed, "_SENT_ROWS", 33)
    monkeypatch.setattr(distributed, "_QUERIES", 13)
    train, queries = _features(), _queries()
    train.values[200:250] = train.values[:50]  # equal rows, on different ranks
    queries[7] = 0

    def search(workers: WorkerGroup | None) -> list[list[float]]:
        fitted = NearestNeighbours(ks=(3, 150)).fit(train, CPU, workers=workers)
        return [scores.tolist() for scores in fitted.scores(queries)]

    ranks = _run_on_ranks(3, lambda workers: (_lead_or_serve(workers, search), indexed))

    assert ranks == [(search(None), [100]), (None, [100]), (None, [101])]


def test_a_small_bank_is_searched_by_rank_0_alone(indexed: list[int]) -> None:
    def search(workers: WorkerGroup) -> int:
        fitted = NearestNeighbours(ks=(3,)).fit(_features(), CPU, workers=workers)
        return len(list(fitted.scores(torch.ones(1, 12))))

    assert _run_on_ranks(2, lambda workers: (_lead_or_serve(workers, search), indexed)) == [(1, []), (None, [])]


@pytest.mark.parametrize("bad", ["query", "labelled row"])
def test_rows_that_are_not_finite_are_refused_before_other_ranks_take_part(bad: str, indexed: list[int]) -> None:
    rows = {"query": torch.ones(4, 12), "labelled row": torch.ones(9, 12)}
    rows[bad][2] = torch.nan

    def search(workers: WorkerGroup) -> object:
        with pytest.raises(NumericalError, match=f"1 of . {bad}s is not finite: 2"):
            search_on_workers(workers, rows["query"], rows["labelled row"], 3)
        return "refused"

    ranks = _run_on_ranks(2, lambda workers: (_lead_or_serve(workers, search), indexed))

    assert ranks == [("refused", []), (None, [])]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 30, "is too small for its share"),
        (NumericalError("products are wrong"), 31, "cannot go on: products are wrong"),
    ],
    ids=["memory", "numbers"],
)
def test_a_rank_that_fails_in_a_search_ends_the_job_with_its_error(
    monkeypatch: pytest.MonkeyPatch, failing: int, error: Exception, code: int, message: str
) -> None:
    def fail(values: Tensor) -> Rows:
        raise error

    def run(workers: WorkerGroup) -> object:
        if workers.group.rank == failing:
            monkeypatch.setattr(distributed, "index_rows", fail)
        return _lead_or_serve(workers, lambda group: search_on_workers(group, torch.ones(4, 12), torch.ones(9, 12), 3))

    ranks = _run_on_ranks(2, run)

    assert [rank[0] for rank in ranks] == [code, code]  # type: ignore[index]
    assert all(f"rank {failing}" in str(rank) and message in str(rank) for rank in ranks)


def test_workers_that_are_not_needed_are_shut_down() -> None:
    assert _lead(2, lambda workers: None) == [None, None]
