"""Training against a plain implementation of the paper, benchmarks/plain/network.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.distributed.group import ALONE
from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.config.schedule import settings_at
from msn_pretrain.data.sampler import Batch, Order
from msn_pretrain.data.view_loader import ViewBatch, normalise
from msn_pretrain.methods.msn import MSN
from msn_pretrain.training import train as training
from msn_pretrain.training.run import build_learner

_BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
_STEPS, _IMAGES = 50, 8


def test_fifty_steps_have_the_losses_of_a_plain_implementation(
    tiny: Callable[..., MSNRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept patches are captured from the real step, so that both drop the same."""
    monkeypatch.syspath_prepend(_BENCHMARKS)
    from plain.network import PlainMSN, VisionTransformer, build_adamw, projection_head, take_step

    recipe = tiny("encoder.drop_path=0.0", "masking.per_image=false", "optimization.epochs=50", "optimization.warmup=5")
    order = Order(n_images=_IMAGES, batch_size=_IMAGES, seed=0)
    learner = build_learner(recipe, torch.device("cpu"))
    session: Any = training.Session(
        recipe=recipe, ranks=ALONE, run=Path(), images=None, order=order, steps=_STEPS, learner=learner,  # type: ignore[arg-type]
    )  # fmt: skip
    encoder = VisionTransformer(pixels=16, patch=4, width=32, depth=2, heads=2)
    plain = PlainMSN(encoder, projection_head(32, hidden=32, output=16), torch.zeros(16, 16))
    plain.load(learner.model.state_dict())
    optimizer = build_adamw(plain)
    kept: list[torch.Tensor] = []
    model, generator = learner.model, torch.Generator().manual_seed(5)
    assert isinstance(model, MSN)
    draw = model.draw_kept
    monkeypatch.setattr(model, "draw_kept", lambda *args, **options: kept.append(draw(*args, **options)) or kept[-1])
    losses, expected = [], []
    for number in range(_STEPS):
        settings = settings_at(recipe, step=number, steps_per_epoch=1)
        views = [
            torch.randint(0, 256, (2 * _IMAGES, 3, side, side), generator=generator, dtype=torch.uint8)
            for side in (16, 8)
        ]
        batch = ViewBatch(batch=Batch(step=number, epoch=number, images=np.arange(_IMAGES)), views=tuple(views))

        _, numbers = training.compute(session, batch, settings)
        training.update(session, numbers, settings)

        losses.append(float(numbers["total"]))
        given = [view for kind in views for view in normalise(kind, IMAGENET_MEAN, IMAGENET_STD).split(_IMAGES)]
        expected.append(
            take_step(
                plain, optimizer, given, kept[-1], random_views=1, learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay, decay=settings.ema, temperature=0.1,
                sharpening=settings.sharpening, clip=recipe.optimization.clip,
            )
        )  # fmt: skip

    assert max(expected) - min(expected) > 0.1
    assert losses == [pytest.approx(loss, abs=1e-4) for loss in expected]
