"""Training on a GPU runs with torch's deterministic kernels, and leaves the settings as they were."""

import os
from collections.abc import Iterator

import pytest
import torch

from msn_pretrain.training.determinism import deterministic_kernels

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def settings() -> dict[str, bool]:
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    }


@pytest.fixture(autouse=True)
def users_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Set what a user's own code may have set, and return it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield settings()
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_gpu_uses_only_deterministic_kernels() -> None:
    with deterministic_kernels(CUDA):
        inside = settings()
    assert inside == {"deterministic": True, "warn only": False, "benchmark": False, "fill": False}


def test_workspaces_of_cublas_have_a_fixed_size() -> None:
    with deterministic_kernels(CUDA):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_users_own_workspaces_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_kernels(CUDA):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_settings_are_restored_after_an_error(users_settings: dict[str, bool]) -> None:
    with pytest.raises(KeyError), deterministic_kernels(CUDA):
        raise KeyError
    assert settings() == users_settings


def test_cpu_keeps_all_settings(users_settings: dict[str, bool]) -> None:
    with deterministic_kernels(CPU):
        assert settings() == users_settings
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
