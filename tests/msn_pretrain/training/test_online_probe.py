"""Online probes that fail leave the training alone."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from msn_eval.errors import ResourceError
from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.training import online_probe

_CPU = torch.device("cpu")


def _fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(online_probe, "evaluate_checkpoint", fail)


@pytest.mark.parametrize(
    "error",
    [
        ResourceError("run: one image does not fit into the memory of cuda:0"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_a_warning(
    tiny: Callable[..., MSNRecipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    _fail_with(error, monkeypatch)

    with caplog.at_level(logging.WARNING):
        assert online_probe.evaluate(tmp_path, tiny(), _CPU) == ""

    assert caplog.messages == [f"the encoder could not be evaluated: {error}"]


def test_other_errors_of_torch_end_the_training(
    tiny: Callable[..., MSNRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_with(RuntimeError("CUDA error: an illegal memory access was encountered"), monkeypatch)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        online_probe.evaluate(tmp_path, tiny(), _CPU)
