"""Ranks that share a fit: the first leads, the others assist until they are dismissed."""

import multiprocessing
import socket
import sys
from collections.abc import Callable

import pytest
import torch

from msn_eval.distributed import Group, join_group
from msn_eval.features import Features
from msn_eval.protocols import full_data
from msn_eval.protocols.logistic import Logistic, fit_logistic
from msn_eval.protocols.team import Team, assist, dismiss

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ranks are forked")
CPU = torch.device("cpu")


def _on_ranks(world: int, do: Callable[[Group], object]) -> list[object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with join_group(environment={name: str(value) for name, value in place.items()}) as group:
            answers.put((rank, do(group)))

    ranks = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for one in ranks:
        one.start()
    found = dict(answers.get() for _ in ranks)
    for one in ranks:
        one.join(timeout=60)
        assert one.exitcode == 0
    return [found[rank] for rank in range(world)]


def _features() -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(301) % 5
    values = torch.randn(5, 12, generator=generator)[labels] + torch.randn(301, 12, generator=generator)
    return Features(values=values, labels=labels, image_ids=tuple(map(str, range(301))), n_classes=5, tap="cls")


def test_a_team_fits_what_the_first_rank_alone_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_data, "_WHOLE_BYTES", 0)
    train, queries = _features(), torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    probes = Logistic(lambdas=(0.1, 0.0025)), Logistic(lambdas=(1.0,))

    def fits(team: Team | None) -> list[tuple[float, float, list[int]]]:
        fitted = [fit_logistic(probe, train, CPU, team=team) for probe in probes]
        told = []
        for one in fitted:
            for setting, scores in zip(one.settings, one.scores(queries), strict=True):
                assert setting.objective is not None
                assert setting.certificate is not None
                told.append((setting.objective, setting.certificate, scores.argmax(dim=1).tolist()))
        return told

    def do(group: Group) -> object:
        team = Team(group=group, device=CPU)
        if group.rank:
            return assist(team)
        try:
            return fits(team)
        finally:
            dismiss(team)

    alone = fits(None)
    together, *others = _on_ranks(3, do)

    assert others == [None, None]
    for (objective, _, right), (shared, gap, answers) in zip(alone, together, strict=True):  # type: ignore[call-overload]
        assert shared == pytest.approx(objective, rel=1e-6)
        assert gap <= 1e-6
        assert answers == right


def test_a_team_that_is_not_needed_is_dismissed() -> None:
    def do(group: Group) -> object:
        team = Team(group=group, device=CPU)
        if group.rank:
            return assist(team)
        return dismiss(team)

    assert _on_ranks(2, do) == [None, None]
