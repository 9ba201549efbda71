"""The linear probe on a GPU: layers and choices agree with the CPU."""

from dataclasses import replace

import pytest
import torch

from msn_eval.config.recipes import LinearRecipe
from msn_eval.features.extraction import Features
from msn_eval.probes.linear import Heads, Linear, Recipe, score_held_out, stack_taps, train_grid

pytestmark = pytest.mark.gpu
SIMULATED = not torch.cuda.is_available()  # as slow as a CPU, so that sizes are smaller
SEEDS, EPOCHS = (1, 2) if SIMULATED else (2, 10)
SMALL = LinearRecipe(
    taps=["cls", "mean"],
    lr_first=0.1,
    lr_last=3.0,
    lrs=3,
    weight_decays=2,
    epochs=2 if SIMULATED else 10,
    batch_size=64,
    seeds=1 if SIMULATED else 2,
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def clusters(*, tap: str, noise: float = 1.0, width: int = 48, n: int = 400, classes: int = 10) -> Features:
    generator = torch.Generator().manual_seed(len(tap))
    labels = torch.arange(n) % classes
    values = torch.randn(classes, width, generator=generator)[labels] + noise * torch.randn(
        n, width, generator=generator
    )
    return Features(values=values, labels=labels, image_ids=tuple(map(str, range(n))), n_classes=classes, tap=tap)


def trained(device: torch.device, recipes: list[Recipe]) -> Heads:
    (stack,) = stack_taps([clusters(tap="cls"), clusters(tap="mean")], device)
    return train_grid(
        stack.take,
        clusters(tap="cls").labels.to(device),
        recipes,
        n_classes=10,
        epochs=5,
        batch_size=64,
        generator=torch.Generator().manual_seed(7),
    )


def test_layers_of_several_taps_agree_with_the_cpu() -> None:
    recipes = [Recipe(learning_rate=0.5), Recipe(learning_rate=2.0, weight_decay=1e-3)]

    here, there = (trained(device, recipes) for device in (CUDA, CPU))

    torch.testing.assert_close(here.weights.cpu(), there.weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(here.losses.cpu(), there.losses, rtol=0, atol=1e-5)


def test_held_out_scores_agree_with_the_cpu() -> None:
    offered = [
        clusters(tap="cls", noise=2.5),
        clusters(tap="mean", noise=3.0),
        clusters(tap="cls4", width=96, noise=3.0),
    ]
    labels = offered[0].labels

    here, there = (
        score_held_out(SMALL, stack_taps(offered, device), labels.to(device), n_classes=10) for device in (CUDA, CPU)
    )

    torch.testing.assert_close(
        here.accuracies, there.accuracies, rtol=0, atol=0.03
    )  # allows for a held-out image near a tie
    torch.testing.assert_close(here.losses, there.losses, rtol=1e-3, atol=1e-4)


def test_tap_that_separates_the_classes_is_chosen() -> None:
    poor, good = clusters(tap="cls", noise=30.0), clusters(tap="mean")

    fitted = Linear(SMALL).fit(poor, CUDA, other_taps=[good])

    (scores,) = fitted.scores(good.values)
    assert fitted.tap == "mean"
    assert (scores.argmax(dim=1).cpu() == good.labels).double().mean() > 0.95


def test_rows_that_do_not_fit_the_gpu_stay_on_the_cpu_and_give_the_same_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, recipe = clusters(tap="cls"), replace(SMALL, taps=["cls"])
    (complete,) = Linear(recipe).fit(train, CUDA).scores(train.values)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))

    (stack,) = stack_taps([train], CUDA)
    assert stack.values[0].device.type == "cpu"
    (some,) = Linear(recipe).fit(train, CUDA).scores(train.values)
    torch.testing.assert_close(some, complete, rtol=0, atol=1e-5)
