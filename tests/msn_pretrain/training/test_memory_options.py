"""Activation checkpointing and sharding: the numbers of a run without them."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from msn_eval.checkpoints.run_folder import newest_snapshot
from msn_eval.distributed.group import Group
from msn_eval.errors import UsageError
from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.training import train as training
from msn_pretrain.training.journal import METRICS, read_metrics
from msn_pretrain.training.run import build_learner
from msn_pretrain.training.snapshot import equal, read_snapshot

Read = Callable[..., MSNRecipe]
_ALONE = Group(rank=0, world=1)


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / METRICS)[0]]


def _state(run: Path) -> dict[str, Any]:
    files, _ = newest_snapshot(run)
    assert files is not None
    snapshot = read_snapshot(files)
    return {"model": dict(snapshot.model), "optimizer": dict(snapshot.optimizer), "rng": snapshot.rng}


def test_checkpointed_activations_change_no_bit(tiny: Read, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("kept", "again")]
    for run, again in zip(runs, ("false", "true"), strict=True):
        training.train(tiny(f"run.dir={run}", "optimization.epochs=1", f"run.activation_checkpointing={again}"), _ALONE)

    assert _losses(runs[0]) == _losses(runs[1])
    assert equal(*map(_state, runs))


def test_checkpointed_blocks_are_computed_again_in_backward(tiny: Read) -> None:
    calls: list[int] = []
    learner = build_learner(tiny("run.activation_checkpointing=true", "encoder.drop_path=0"), torch.device("cpu"))
    trunk = learner.model.anchor.trunk
    trunk.network.blocks[0].register_forward_pre_hook(lambda *given: calls.append(1))

    features = trunk(torch.randn(2, 3, 16, 16))
    forward = len(calls)
    features.sum().backward()

    assert (forward, len(calls)) == (1, 2)


@pytest.mark.parametrize("key", ["activation_checkpointing", "shard"])
def test_residual_networks_are_refused(tmp_path: Path, key: str) -> None:
    from msn_pretrain.config.recipe import Encoder, Run, SimSiamRecipe

    recipe = SimSiamRecipe(run=Run(dir=str(tmp_path), **{key: True}), encoder=Encoder(name="resnet18"))

    with pytest.raises(UsageError, match=f"run.{key}: resnet18 is not a Transformer"):
        build_learner(recipe, torch.device("cpu"))


def _train_on_ranks(recipe: MSNRecipe, stop_at: int | None) -> tuple[int, int]:
    """Train; return the exit code and the number of sharded parameters that the optimiser had."""
    compute, sharded = training.compute, []

    def noting(session: Any, batch: Any, settings: Any) -> Any:
        groups = session.learner.optimizer.param_groups
        sharded.append(sum(hasattr(parameter, "full_tensor") for group in groups for parameter in group["params"]))
        if batch.batch.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return compute(session, batch, settings)

    training.compute = noting  # this process is a fork and ends with this function
    return training.train(recipe, Group(rank=distributed.get_rank(), world=2), quiet=True), sharded[0]


def test_sharded_run_has_the_losses_of_a_replicated_one_and_resumes_bit_identically(
    on_ranks: Callable[..., list[Any]], tiny: Read, tmp_path: Path
) -> None:
    plain, full, stopped = (tmp_path / name for name in ("plain", "full", "stopped"))
    shard = ("optimization.epochs=1", "run.shard=true", "encoder.drop_path=0.0")

    on_ranks(_train_on_ranks, tiny(f"run.dir={plain}", *shard, "run.shard=false"), None)
    codes = on_ranks(_train_on_ranks, tiny(f"run.dir={full}", *shard), None)
    assert [code for code, _ in on_ranks(_train_on_ranks, tiny(f"run.dir={stopped}", *shard), 2)] == [75, 75]
    on_ranks(_train_on_ranks, tiny(f"run.dir={stopped}", *shard), None)

    assert [code for code, _ in codes] == [0, 0]
    assert codes[0][1] > 20
    assert _losses(full) == [pytest.approx(loss, rel=1e-4) for loss in _losses(plain)]
    assert json.dumps(_losses(full)) == json.dumps(_losses(stopped))
    assert equal(_state(full), _state(stopped))
    shapes = [{name: value.shape for name, value in _state(run)["model"].items()} for run in (plain, full)]
    assert shapes[0] == shapes[1]
