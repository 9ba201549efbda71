"""The logistic and ridge probes on a GPU: the size of 1 % of ImageNet, and agreement with the CPU."""

import pytest
import torch

from msn_eval.features.extraction import Features
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.ridge import Ridge

pytestmark = pytest.mark.gpu
LAMBDAS = (0.0025, 0.0137, 0.075)


def clusters(n: int, d: int, classes: int, *, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    values = 0.3 * torch.randn(classes, d, generator=generator)[labels] + torch.randn(n, d, generator=generator)
    ids = tuple(f"{row}.png" for row in range(n))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=classes, tap="cls")


@pytest.mark.real_gpu("the size of ImageNet")
def test_nine_fits_of_one_percent_of_imagenet_are_certified_within_4_gigabytes() -> None:
    torch.cuda.reset_peak_memory_stats()

    fits = [
        Logistic(lambdas=LAMBDAS).fit(clusters(12_811, 768, 1000, seed=draw), torch.device("cuda")) for draw in range(3)
    ]

    certificates = [item.certificate for fit in fits for item in fit.settings]
    assert len(certificates) == 9
    assert all(certificate is not None and certificate <= 1e-6 for certificate in certificates)
    assert torch.cuda.max_memory_allocated() < 4e9


def test_objectives_agree_with_the_cpu() -> None:
    train = clusters(500, 96, 50)

    here, there = (Logistic(lambdas=LAMBDAS).fit(train, torch.device(device)).settings for device in ("cuda", "cpu"))

    assert [item.objective for item in here] == pytest.approx([item.objective for item in there], rel=1e-6)


def test_ridge_chooses_the_same_penalty_as_on_the_cpu() -> None:
    train = clusters(500, 96, 50)

    here, there = (Ridge().fit(train, torch.device(device)).settings[0].chosen for device in ("cuda", "cpu"))

    assert here == pytest.approx(there, rel=1e-9)
