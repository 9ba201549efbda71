"""Where float64 products are computed: measured, not known from the name of a device."""

from collections.abc import Callable, Iterator

import pytest
import torch

from msn_eval.probes import base
from msn_eval.probes.base import choose_float64_device

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Measure in every test anew."""
    choose_float64_device.cache_clear()
    yield
    choose_float64_device.cache_clear()


def _repeat(seconds: dict[str, list[float]], measured: list[str]) -> Callable[..., list[float]]:
    def repeat(product: object, **options: object) -> list[float]:
        (factor,) = product.args  # type: ignore[attr-defined]
        assert factor.dtype == torch.float64
        measured.append(factor.device.type)
        return seconds[factor.device.type]

    return repeat


@pytest.mark.parametrize(
    ("on_device", "on_cpu", "expected"),
    [([9.0, 1.0, 1.1], [2.0, 2.0, 2.1], META), ([9.0, 3.0, 3.1], [2.0, 8.0, 2.1], CPU)],
    ids=["device", "cpu"],
)
def test_the_place_with_the_shortest_time_is_chosen_and_measured_once(
    monkeypatch: pytest.MonkeyPatch, on_device: list[float], on_cpu: list[float], expected: torch.device
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(base.timeit, "repeat", _repeat({"meta": on_device, "cpu": on_cpu}, measured))

    chosen = [choose_float64_device(META) for _ in range(2)]

    assert chosen == [expected] * 2
    assert measured == ["meta", "cpu"]


def test_a_cpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.timeit, "repeat", lambda *given, **options: pytest.fail("it was measured"))

    assert choose_float64_device(CPU) == CPU
