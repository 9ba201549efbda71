"""Ranks that share a fit or a search: the first leads, the others assist until they are dismissed."""

import multiprocessing
import socket
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msn_eval.distributed.group import Group, join_group
from msn_eval.distributed.peers import Limits
from msn_eval.errors import MsnEvalError, NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes import distributed as team
from msn_eval.probes import knn
from msn_eval.probes.distributed import WorkerGroup, search_together, serve, shutdown
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.knn_search.index import Bank, index_bank
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.logistic_solvers import chunked_newton as full_data

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ranks are forked")
CPU = torch.device("cpu")
QUICK = Limits(beat_seconds=0.05, silent_seconds=60, settle_seconds=0.1, linger_seconds=0.5, unwind_seconds=5)


def _on_ranks(world: int, do: Callable[[Group], object]) -> list[object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        try:
            with join_group(environment={name: str(value) for name, value in place.items()}, limits=QUICK) as group:
                answer = do(group)
        except MsnEvalError as error:
            answer = error.exit_code, str(error)
        answers.put((rank, answer))

    ranks = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for one in ranks:
        one.start()
    found = dict(answers.get() for _ in ranks)
    for one in ranks:
        one.join(timeout=60)
        assert one.exitcode == 0
    return [found[rank] for rank in range(world)]


def _led(group: Group, lead: Callable[[WorkerGroup], object]) -> object:
    """Do something on the first rank while the others assist."""
    team = WorkerGroup(group=group, device=CPU)
    if group.rank:
        return serve(team)
    found = lead(team)
    shutdown(team)
    return found


def _features() -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(301) % 5
    values = torch.randn(5, 12, generator=generator)[labels] + torch.randn(301, 12, generator=generator)
    return Features(values=values, labels=labels, image_ids=tuple(map(str, range(301))), n_classes=5, tap="cls")


def test_a_team_fits_what_the_first_rank_alone_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_data, "_WHOLE_BYTES", 0)
    train, queries = _features(), torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    probes = Logistic(lambdas=(0.1, 0.0025)), Logistic(lambdas=(1.0,))

    def fits(team: WorkerGroup | None) -> list[tuple[float, float, list[int]]]:
        fitted = [probe.fit(train, CPU, workers=team) for probe in probes]
        told = []
        for one in fitted:
            for setting, scores in zip(one.settings, one.scores(queries), strict=True):
                assert setting.objective is not None
                assert setting.certificate is not None
                told.append((setting.objective, setting.certificate, scores.argmax(dim=1).tolist()))
        return told

    def do(group: Group) -> object:
        return _led(group, fits)

    alone = fits(None)
    together, *others = _on_ranks(3, do)

    assert others == [None, None]
    for (objective, _, right), (shared, gap, answers) in zip(alone, together, strict=True):  # type: ignore[call-overload]
        assert shared == pytest.approx(objective, rel=1e-6)
        assert gap <= 1e-6
        assert answers == right


@pytest.fixture
def banks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the rows of each bank that a rank has indexed for a shared search, on that rank."""
    rows: list[int] = []

    def index(values: Tensor) -> Bank:
        rows.append(len(values))
        return index_bank(values)

    monkeypatch.setattr(team, "index_bank", index)
    return rows


def test_a_team_finds_the_neighbours_and_votes_of_one_rank_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, banks: list[int]
) -> None:
    monkeypatch.setattr(knn, "_SHARED_VALUES", 0)
    monkeypatch.setattr(team, "_SENT_ROWS", 33)
    monkeypatch.setattr(team, "_QUERIES", 13)
    train, queries = _features(), torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    train.values[200:250] = train.values[:50]  # equal rows, on other ranks
    queries[7] = 0

    def find(team: WorkerGroup | None) -> list[Tensor]:
        return list(NearestNeighbours(ks=(3, 150)).fit(train, CPU, workers=team).scores(queries))

    def do(group: Group) -> object:
        found = _led(group, lambda team: [one.tolist() for one in find(team)])
        return found, banks

    ranks = _on_ranks(3, do)

    assert ranks[0] == ([one.tolist() for one in find(None)], [100])
    assert ranks[1:] == [(None, [100]), (None, [101])]


def test_a_small_bank_is_searched_by_the_first_rank_alone(banks: list[int]) -> None:
    def find(team: WorkerGroup) -> object:
        return len(list(NearestNeighbours(ks=(3,)).fit(_features(), CPU, workers=team).scores(torch.ones(1, 12))))

    assert _on_ranks(2, lambda group: (_led(group, find), banks)) == [(1, []), (None, [])]


@pytest.mark.parametrize("bad", ["query", "labelled row"])
def test_rows_that_are_not_finite_are_refused_before_anybody_is_called(bad: str, banks: list[int]) -> None:
    rows = {"query": torch.ones(4, 12), "labelled row": torch.ones(9, 12)}
    rows[bad][2] = torch.nan

    def find(team: WorkerGroup) -> object:
        with pytest.raises(NumericalError, match=f"1 of . {bad}s is not finite: 2"):
            search_together(team, rows["query"], rows["labelled row"], 3)
        return "refused"

    assert _on_ranks(2, lambda group: (_led(group, find), banks)) == [("refused", []), (None, [])]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            30,
            "memory of cpu is too small for its share",
        ),
        (NumericalError("products are wrong"), 31, "cannot go on: products are wrong"),
    ],
)
def test_a_rank_that_fails_in_a_search_ends_the_job_with_its_error(
    monkeypatch: pytest.MonkeyPatch, failing: int, error: Exception, code: int, told: str
) -> None:
    def find(team: WorkerGroup) -> object:
        return search_together(team, torch.ones(4, 12), torch.ones(9, 12), 3)

    def do(group: Group) -> object:
        def fail(values: Tensor) -> Bank:
            raise error

        if group.rank == failing:
            monkeypatch.setattr(team, "index_bank", fail)
        return _led(group, find)

    ended = _on_ranks(2, do)

    assert [one[0] for one in ended] == [code, code]  # type: ignore[index]
    assert all(f"rank {failing}" in str(one) and told in str(one) for one in ended)


def test_a_team_that_is_not_needed_is_dismissed() -> None:
    def do(group: Group) -> object:
        team = WorkerGroup(group=group, device=CPU)
        if group.rank:
            return serve(team)
        return shutdown(team)

    assert _on_ranks(2, do) == [None, None]
