"""Linear layers on augmented images on a GPU: about the CPU's layers, a state that resumes, and a batch in parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msn_eval import evaluate
from msn_eval.probes import linear_augmented
from msn_eval.probes.linear_augmented import Training
from msn_eval.results.record import Result, read_predictions

pytestmark = pytest.mark.gpu
SIMULATED = not torch.cuda.is_available()  # as slow as a CPU, so that sizes are smaller
_TINY = "random:vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=2&num_heads=2"
_CHECKPOINT = _TINY if SIMULATED else "demo"
_RECIPE = {"lr": [2.0, 8.0], "epochs": 6, "batch_size": 32, "crop_share": 0.4}


def _train(out: Path, *, device: str, precision: str = "fp32", **options: Any) -> list[Result]:
    result = evaluate(
        [_CHECKPOINT], data="digits", subsets=["5imgs@1"], probes=["linear-augmented"], linear_augmented=_RECIPE, out=out,
        device=device, precision=precision, no_cache=True, limit=10 if SIMULATED else 40, **options,
    )  # fmt: skip
    return sorted(result, key=lambda item: item.probe.params["lr"])


def test_loss_and_predictions_are_close_to_the_cpu(tmp_path: Path) -> None:
    here, there = (_train(tmp_path / name, device=name) for name in ("cuda", "cpu"))

    for item, other in zip(here, there, strict=True):
        answers = [read_predictions(tmp_path / name / f"{item.id}.npz").prediction for name in ("cuda", "cpu")]
        assert item.id == other.id
        assert item.probe.objective == pytest.approx(other.probe.objective, rel=1e-3)
        assert float(np.mean(answers[0] == answers[1])) > 0.99


def test_bf16_is_its_own_protocol_and_learns_as_much(tmp_path: Path) -> None:
    exact, reduced = (_train(tmp_path, device="cuda", precision=precision) for precision in ("fp32", "bf16"))

    for item, other in zip(exact, reduced, strict=True):
        assert item.protocol_id != other.protocol_id
        assert item.metrics is not None
        assert other.metrics is not None
        assert other.metrics.top1 == pytest.approx(item.metrics.top1, abs=0.03)


def test_micro_batches_add_up(tmp_path: Path) -> None:
    full, split = (_train(tmp_path / size, device="cuda", batch_size=size) for size in ("32", "5"))

    for item, other in zip(full, split, strict=True):
        assert other.probe.objective == pytest.approx(item.probe.objective, rel=1e-4)


def test_a_stopped_training_resumes_from_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted = _train(tmp_path / "whole", device="cuda")
    step = linear_augmented.take_step

    def fail(training: Training, *arguments: object, **options: object) -> bool:
        if training.step == 4:
            raise KeyError
        return step(training, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(linear_augmented, "_SAVE_SECONDS", 0.0)
        patched.setattr(linear_augmented, "take_step", fail)
        with pytest.raises(KeyError):
            _train(tmp_path / "stopped", device="cuda")
    resumed = _train(tmp_path / "stopped", device="cuda")

    for item, other in zip(resumed, uninterrupted, strict=True):
        assert item.probe.objective == pytest.approx(other.probe.objective, rel=1e-5)
        assert item.probe.iterations == other.probe.iterations
