"""Replicas that differ: a run ends before it saves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from msn_eval.checkpoints.run_folder import newest_snapshot
from msn_eval.distributed.group import Group
from msn_eval.errors import DistributedError
from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.training import train as training
from msn_pretrain.training.train import train

OnRanks = Callable[..., list[Any]]


def _train_beside_a_bad_rank(recipe: MSNRecipe) -> str:
    """Train on this rank; on rank 1 a bit of a weight flips after step 3."""
    ranks = Group(rank=distributed.get_rank(), world=2)
    compute = training.compute

    def flipping(session: Any, batch: Any, settings: Any) -> Any:
        if batch.batch.step == 3 and ranks.rank == 1:
            with torch.no_grad():
                weight = next(session.learner.model.parameters())
                weight.view(torch.int32).bitwise_xor_(8)  # flips one bit
        return compute(session, batch, settings)

    training.compute = flipping  # this process is a fork and ends with this function
    try:
        return str(train(recipe, ranks, quiet=True))
    except DistributedError as error:
        return f"{error.exit_code} {error}"


@pytest.mark.parametrize(
    "settings",
    [("run.compare_every=2", "run.snapshot_minutes=10"), ("run.compare_every=0", "run.snapshot_minutes=0.00001")],
    ids=["compared", "saved"],
)
def test_run_whose_ranks_differ_ends_before_it_saves(
    on_ranks: OnRanks, tiny: Callable[..., MSNRecipe], tmp_path: Path, settings: tuple[str, str]
) -> None:
    import sklearn.datasets  # noqa: F401

    messages = on_ranks(_train_beside_a_bad_rank, tiny(*settings, "optimization.epochs=1"))

    assert [message.partition(" the")[0] for message in messages] == ["31 after step 4"] * 2
    snapshot, _ = newest_snapshot(tmp_path / "run")
    assert (snapshot.step if snapshot else None) == (3 if "=0" in settings[0] else None)
