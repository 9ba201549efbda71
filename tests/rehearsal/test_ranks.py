"""Two ranks that see two simulated GPUs, with gloo for NCCL: each uses its own, and the results are those of one rank."""

import os
import socket
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_cuda import Device, simulate

from msn_eval.checkpoints.run_folder import newest_snapshot
from msn_eval.cli import main as evaluate
from msn_eval.results.folder import read_results
from msn_pretrain.cli import main as train
from msn_pretrain.training.journal import METRICS, read_metrics
from msn_pretrain.training.snapshot import read_snapshot

ForkProcess = Callable[..., BaseProcess]
Program = Callable[[list[str]], int]
ENCODER = "random:vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=1&num_heads=2"
RECIPE = f"""
run: {{seed: 3, log_every: 1, keep_every: 0, device: cuda, precision: fp32}}
data: {{root: digits, workers: 1, limit: 2}}
views: {{image_pixels: 16, focal_pixels: 8, focal_views: 1, focal_crop_scale: [0.2, 0.6]}}
encoder: {{name: "{ENCODER.removeprefix("random:")}"}}
head: {{hidden: 32, output: 16, batch_norm: false}}
criterion: {{prototypes: 16}}
optimization: {{epochs: 1, batch_size: 8, warmup: 1}}
watch: {{probe_every: 0}}
"""


def _run_rank(program: Program, arguments: list[str], variables: dict[str, str], out: Path) -> None:
    code: object = "no exit code"
    try:
        torch.set_num_threads(1)  # the threads of the parent did not come along
        os.environ.update(variables)
        with simulate(visible=(0, 1)) as cuda:
            code = program(arguments)
        torch.save((code, cuda.pinning, _kernels_by_device(cuda), len(cuda.communicators)), out)
    finally:
        os._exit(0 if code == 0 else 1)


def _kernels_by_device(cuda: Device) -> Counter[int]:
    return Counter(entry.queue.device.index for entry in cuda.log if entry.kind == "kernels")


@pytest.fixture
def run_ranks(tmp_path: Path, fork_process: ForkProcess) -> Callable[..., list[Any]]:
    """Return a function that runs a program on two ranks. It returns exit code, pinning, kernels by device and groups of each."""
    import sklearn.datasets  # noqa: F401  # once for both ranks

    def run(program: Program, arguments: list[str]) -> list[Any]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        outputs = [tmp_path / f"rank{rank}" for rank in range(2)]
        processes = [
            fork_process(
                _run_rank,
                program,
                arguments,
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                output,
            )
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [0, 0]
        return [torch.load(output, weights_only=False) for output in outputs]

    return run


def test_ranks_evaluate_on_their_own_gpus(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    def arguments(place: str, device: str) -> list[str]:
        return [
            *("--checkpoint", f"tiny={ENCODER}", "--data", "digits", "--subset", "2imgs@1", "--probe", "ncm"),
            *("--limit", "4", "--workers", "1"),
            *("--batch-size", "16", "--precision", "fp32", "--device", device, "-q"),
            *("--out", str(tmp_path / place), "--cache", str(tmp_path / f"cache-{place}")),
        ]

    assert evaluate(arguments("alone", "cpu")) == 0
    ranks = run_ranks(evaluate, arguments("ranks", "cuda"))

    for (code, pinning, kernels, _), index in zip(ranks, [0, 1], strict=True):
        assert code == 0
        assert set(pinning) == set(kernels) == {index}
    columns = ["id", "metrics.top1"]
    alone, together = (read_results(tmp_path / place) for place in ("alone", "ranks"))
    assert len(together) == 1
    assert together[columns].equals(alone[columns])


def test_ranks_train_on_their_own_gpus_as_one_rank_does(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def arguments(place: str, *overrides: str) -> list[str]:
        return [str(tmp_path / "recipe.yaml"), f"run.dir={tmp_path / place}", *overrides, "-q"]

    with simulate():
        assert train(arguments("alone")) == 0
    ranks = run_ranks(train, arguments("ranks"))

    for (code, pinning, kernels, groups), index in zip(ranks, [0, 1], strict=True):
        assert (code, groups) == (0, 1)
        assert set(pinning) == set(kernels) == {index}
    losses, weights = [], []
    for place in ("alone", "ranks"):
        losses.append([line["loss"] for line in read_metrics(tmp_path / place / METRICS)[0]])
        files, _ = newest_snapshot(tmp_path / place)
        assert files is not None
        weights.append(torch.cat([tensor.double().flatten() for tensor in read_snapshot(files).model.values()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert float((weights[1] - weights[0]).norm() / weights[0].norm()) < 1e-4
