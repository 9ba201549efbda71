"""The estimate of --dry-run."""

from collections.abc import Callable

import pytest
import torch

from msn_pretrain import benchmark
from msn_pretrain.benchmark import describe
from msn_pretrain.config.recipe import MSNRecipe


@pytest.mark.parametrize(("has_gpu", "same"), [(True, "bf16"), (False, "fp32")])
def test_memory_of_automatic_precision_is_that_of_the_precision_it_chooses(
    tiny: Callable[..., MSNRecipe], monkeypatch: pytest.MonkeyPatch, has_gpu: bool, same: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(benchmark, "_measure_product_flops", lambda device, dtype: 1.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(has_gpu))
    large = ("run.device=auto", "optimization.batch_size=40", "views.image_pixels=160")

    automatic, named, other = (
        next(line for line in describe(tiny(*large, f"run.precision={name}")).splitlines() if line.startswith("memory"))
        for name in ("auto", same, "fp32" if same == "bf16" else "bf16")
    )

    assert automatic == named != other


@pytest.mark.parametrize(("changed", "ratio"), [("optimization.epochs=80", 2), ("views.random_views=4", 5 / 2)])
def test_estimated_time_grows_with_epochs_and_views(
    changed: str, ratio: float, tiny: Callable[..., MSNRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_measure_product_flops", lambda device, dtype: 1.0)
    monkeypatch.setattr(benchmark, "format_duration", lambda seconds: f"{seconds:.0f}")
    usual = ("optimization.epochs=40", "views.random_views=1", "views.focal_views=0")

    first, second = (
        next(float(line.split()[2]) for line in describe(tiny(*options)).splitlines() if line.startswith("time"))
        for options in (usual, (*usual, changed))
    )

    assert second / first == pytest.approx(ratio)
