"""Fine-tuning on a GPU: about the CPU's loss and predictions, a state that resumes, and bf16."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msn_eval import evaluate
from msn_eval.evaluation import finetune as finetuning
from msn_eval.results.record import Result, read_predictions

pytestmark = pytest.mark.gpu
SIMULATED = not torch.cuda.is_available()  # as slow as a CPU, so that sizes are smaller
_TINY = "random:vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=2&num_heads=2"
_CHECKPOINT = _TINY if SIMULATED else "demo"
_RECIPE = {
    "epochs": 2 if SIMULATED else 4,
    "batch": 16,
    "warmup_epochs": 1,
    "learning_rate": 1e-3,
    "flip": 0.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "head_lambda": 0.01,
}


def _tune(out: Path, *, device: str, precision: str = "fp32", **options: Any) -> Result:
    (result,) = evaluate(
        [_CHECKPOINT], data="digits", subsets=["2imgs@1" if SIMULATED else "5imgs@1"], probes=["finetune"], finetune=_RECIPE,
        out=out, device=device, precision=precision, no_cache=True, limit=4 if SIMULATED else 40, **options,
    )  # fmt: skip
    return result


def test_loss_and_predictions_are_close_to_the_cpu(tmp_path: Path) -> None:
    here, there = _tune(tmp_path / "cuda", device="cuda"), _tune(tmp_path / "cpu", device="cpu")

    answers = [read_predictions(tmp_path / name / f"{here.id}.npz").prediction for name in ("cuda", "cpu")]
    assert here.id == there.id
    assert here.probe.objective == pytest.approx(there.probe.objective, rel=1e-2)
    assert float(np.mean(answers[0] == answers[1])) > 0.97


def test_bf16_is_its_own_protocol_and_learns_as_much(tmp_path: Path) -> None:
    exact, reduced = (_tune(tmp_path, device="cuda", precision=precision) for precision in ("fp32", "bf16"))

    assert exact.protocol_id != reduced.protocol_id
    assert exact.metrics is not None
    assert reduced.metrics is not None
    assert reduced.metrics.top1 == pytest.approx(exact.metrics.top1, abs=0.05)


def test_killed_evaluation_resumes_from_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*arguments: object, **named: object) -> None:
        raise KeyError

    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "score_images", kill)
        with pytest.raises(KeyError):
            _tune(tmp_path, device="cuda")

    assert _tune(tmp_path, device="cuda").status == "ok"


def test_micro_batches_add_up(tmp_path: Path) -> None:
    full, split = (_tune(tmp_path / size, device="cuda", batch_size=size) for size in ("16", "4"))

    assert split.probe.objective == pytest.approx(full.probe.objective, rel=1e-2)
