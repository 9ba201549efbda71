"""Pre-training on a GPU: losses close to the CPU's, bf16, resuming, and two GPUs."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msn_eval.checkpoints.run_folder import newest_snapshot
from msn_pretrain.cli import main
from msn_pretrain.training import train as training
from msn_pretrain.training.journal import METRICS, TIMING, read_metrics
from msn_pretrain.training.snapshot import equal, read_snapshot

pytestmark = pytest.mark.gpu
SIMULATED = not torch.cuda.is_available()  # as slow as a CPU, so that sizes are smaller
_STEPS, _LIMIT = (20, 8) if SIMULATED else (50, 40)
_RECIPE = f"""
run: {{seed: 3, log_every: 1, snapshot_minutes: 1000, keep_every: 0, precision: fp32}}
data: {{root: digits, workers: 2, limit: {_LIMIT}}}
views: {{image_pixels: 16, focal_pixels: 8, focal_views: 2, focal_crop_scale: [0.2, 0.6], made: loader}}
encoder: {{name: "vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=64&depth={1 if SIMULATED else 2}&num_heads=2"}}
head: {{hidden: 64, output: 16}}
masking: {{ratio: 0.3}}
criterion: {{prototypes: 16}}
optimization: {{epochs: {_STEPS // 10}, batch_size: {_LIMIT}, warmup: 1}}
ema: {{start: 0.9}}
"""
Trained = Callable[..., Path]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """Return a function that trains 50 steps on the digits in a folder of the given name, with overrides."""
    (tmp_path / "recipe.yaml").write_text(_RECIPE)

    def run(name: str, *overrides: str, code: int = 0) -> Path:
        assert main([str(tmp_path / "recipe.yaml"), f"run.dir={tmp_path / name}", *overrides, "-q"]) == code
        return tmp_path / name

    return run


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """Disable TF32 and restore the settings afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / METRICS)[0]]


def test_losses_of_many_steps_are_close_to_the_cpu(trained: Trained) -> None:
    here, there = (_losses(trained(name, f"run.device={name}")) for name in ("cpu", "cuda"))

    assert len(there) == _STEPS
    assert there[:10] == pytest.approx(here[:10], rel=1e-4)
    assert there == pytest.approx(here, rel=2e-2)  # rounding differences grow with the steps


def test_bf16_has_similar_losses_and_keeps_float32_weights(trained: Trained) -> None:
    full, half = (trained(name, "run.device=cuda", f"run.precision={name}") for name in ("fp32", "bf16"))

    ours, exact = _losses(half)[:10], _losses(full)[:10]
    assert ours[0] == pytest.approx(exact[0], rel=1e-2)
    # Adam turns rounding into steps of full size, so single losses part after a few steps.
    assert statistics.fmean(ours) == pytest.approx(statistics.fmean(exact), rel=3e-2)
    assert ours != exact
    assert all(math.isfinite(line["gradient_norm"]) for line in read_metrics(half / METRICS)[0])
    files, _ = newest_snapshot(half)
    assert files is not None
    model = read_snapshot(files).model
    assert {value.dtype for value in model.values() if value.is_floating_point()} == {torch.float32}


def test_loss_falls_with_views_made_on_the_device(trained: Trained) -> None:
    run = trained("device", "run.device=cuda", "views.made=device", "run.precision=bf16")

    losses = _losses(run)
    assert sum(losses[-10:]) < sum(losses[:10])


def _outcome(run: Path) -> dict[str, Any]:
    files, _ = newest_snapshot(run)
    assert files is not None
    state = torch.load(files.state, weights_only=True)
    lines = [
        {name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(run / METRICS)[0]
    ]
    return state | {"lines": json.dumps(lines)}


@pytest.mark.parametrize("settings", [("run.precision=fp32",), ("run.precision=bf16", "views.made=device")], ids=str)
def test_stopped_run_resumes_to_the_same_result_as_an_uninterrupted_run(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    expected = _outcome(trained("full", "run.device=cuda", *settings))
    compute = training.compute

    def stopping(session: Any, batch: Any, step: Any) -> Any:
        if batch.batch.step == _STEPS // 2:
            signal.raise_signal(signal.SIGTERM)
        return compute(session, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(training, "compute", stopping)
        trained("stopped", "run.device=cuda", *settings, code=75)

    resumed = _outcome(trained("stopped", "run.device=cuda", *settings))

    assert [name for name in expected if not equal(expected[name], resumed[name])] == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_have_the_losses_of_one_gpu(trained: Trained, tmp_path: Path) -> None:
    alone = _losses(trained("one", "run.device=cuda:0"))
    arguments = [str(tmp_path / "recipe.yaml"), f"run.dir={tmp_path / 'two'}", "run.device=cuda:0,cuda:1"]

    done = subprocess.run(
        [sys.executable, "-m", "msn_pretrain", *arguments],
        capture_output=True, text=True, timeout=250, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert _losses(tmp_path / "two")[:10] == pytest.approx(alone[:10], rel=1e-4)
