"""Evaluations on a GPU agree with those on a CPU, within the limits of the precision class."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from msn_eval import evaluate, load_encoder
from msn_eval.features.encoder import encode, exact_float32
from msn_eval.results.record import Predictions, Result, read_predictions

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TINY = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2"
DEEPER = TINY.replace("depth=2", "depth=12")
PROBES = ["logistic", "knn", "ncm"]
Run = tuple[list[Result], list[Predictions]]


def run(folder: Path, *, device: str, precision: str) -> Run:
    results = evaluate(
        [TINY],
        data="digits",
        subsets=["5imgs"],
        probes=PROBES,
        k=[10],
        out=folder,
        device=device,
        precision=precision,
        no_cache=True,
    )
    return results, [read_predictions(folder / str(result.predictions)) for result in results]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("cpu"), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("exact"), device=DEVICE, precision="fp32")


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("reduced"), device=DEVICE, precision="bf16")


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """Allow TF32 everywhere, as user code may do, and restore the settings afterwards."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32"
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


def of_probe(one: Run, probe: str) -> list[tuple[Result, Predictions]]:
    return [(result, predictions) for result, predictions in zip(*one, strict=True) if result.probe.name == probe]


def top1(one: Run, probe: str) -> float:
    found = [result.metrics.top1 for result, _ in of_probe(one, probe) if result.metrics is not None]
    assert len(found) == 3
    return float(np.mean(found))


def test_records_name_the_device(exact: Run) -> None:
    assert all(result.environment.device.startswith(DEVICE) for result in exact[0])


@pytest.mark.parametrize("probe", PROBES)
def test_fp32_records_have_the_same_ids_as_on_the_cpu(on_cpu: Run, exact: Run, probe: str) -> None:
    assert [result.id for result, _ in of_probe(exact, probe)] == [result.id for result, _ in of_probe(on_cpu, probe)]


@pytest.mark.parametrize("probe", PROBES)
def test_fp32_predictions_agree_with_the_cpu_on_999_of_1000_images(on_cpu: Run, exact: Run, probe: str) -> None:
    equal = [
        ours.prediction == theirs.prediction
        for (_, ours), (_, theirs) in zip(of_probe(exact, probe), of_probe(on_cpu, probe), strict=True)
    ]
    assert np.concatenate(equal).mean() >= 0.999


@pytest.mark.parametrize("probe", PROBES)
def test_fp32_accuracy_agrees_with_the_cpu(on_cpu: Run, exact: Run, probe: str) -> None:
    assert top1(exact, probe) == pytest.approx(top1(on_cpu, probe), abs=0.001)


@pytest.mark.parametrize("probe", PROBES)
def test_bf16_accuracy_agrees_with_the_cpu_within_half_a_point(on_cpu: Run, reduced: Run, probe: str) -> None:
    assert top1(reduced, probe) == pytest.approx(top1(on_cpu, probe), abs=0.005)


def test_bf16_records_have_different_protocol_ids(exact: Run, reduced: Run) -> None:
    assert not {result.protocol_id for result in reduced[0]} & {result.protocol_id for result in exact[0]}


@pytest.mark.usefixtures("tf32_allowed")
@pytest.mark.parametrize(("checkpoint", "tap"), [(DEEPER, "cls"), ("random:resnet18", "pool")])
def test_fp32_features_agree_with_the_cpu_if_tf32_is_allowed(checkpoint: str, tap: str) -> None:
    pixels = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    theirs, ours = (
        encode(load_encoder(checkpoint, device=device, precision="fp32", image_pixels=32), pixels, [tap])[tap].cpu()
        for device in ("cpu", DEVICE)
    )
    # With inputs rounded to the ten bits of TF32 the relative difference is at least 5e-4.
    assert (ours - theirs).norm() / theirs.norm() < 5e-5


@pytest.mark.real_gpu("TF32")
@pytest.mark.usefixtures("tf32_allowed")
def test_products_use_no_tf32_only_inside_exact_float32() -> None:
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this device has no TF32")
    left, right = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    reference = left.double() @ right.double()
    with exact_float32():
        inside = (left @ right - reference).abs().max()
    outside = (left @ right - reference).abs().max()
    assert inside < 0.1 * outside


@pytest.mark.usefixtures("tf32_allowed")
def test_encoding_restores_the_users_tf32_settings() -> None:
    encode(load_encoder(TINY, device=DEVICE), torch.zeros(1, 32, 32, 3, dtype=torch.uint8), ["cls"])
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == ("tf32", "tf32")
