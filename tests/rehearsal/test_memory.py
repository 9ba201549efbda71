"""Peak memory of the device at the sizes of ImageNet: the tensors of the real code, counted without values.

Tensors on `meta` have sizes only. What kernels and the allocator need in addition is not counted, except copies that torch
itself makes.
"""

import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.features.encoder import encode, load_encoder
from msn_eval.features.extraction import choose_batch_size
from msn_pretrain.benchmark import _activation_bytes
from msn_pretrain.config.load import read_recipe
from msn_pretrain.data.batched_views import make_batched_views
from msn_pretrain.data.view_loader import normalise
from msn_pretrain.data.views import ViewKind, draw_for_batch
from msn_pretrain.training.gradients import compute_gradients
from msn_pretrain.training.run import build_learner, view_kinds

META = torch.device("meta")
GIB = 1 << 30
RECIPE = Path(__file__).parents[2] / "configs" / "pretrain" / "msn_vits16.yaml"
GPUS = 8
# Peak in GiB. Numbers may only go down.
LIMITS = {
    "extraction, ViT-B/16": 1.1,
    "views of 1,024 images": 1.15,
    "normalised views of 1,024 images": 2.1,
    "MSN step, ViT-S/16": 21,
}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all live storages on `meta` that are made inside the block, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device == META:
                storage = leaf.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key)


def test_peak_counts_what_lives_at_the_same_time() -> None:
    with PeakMemory() as memory:
        rows = torch.empty(1000, device=META)
        for _ in range(3):
            rows = rows + 1
        view = rows.view(10, 100)[2:]
        del rows

    assert (memory.peak, memory.now) == (8000, 4000)
    del view
    assert memory.now == 0


def test_extraction_of_vit_b_stays_within_its_limit() -> None:
    encoder = load_encoder(
        "random:vit_base_patch16_224?depth=2", device="cpu", precision="bf16"
    )  # each block needs as much
    images = choose_batch_size(replace(encoder, device=torch.device("cuda")))
    there = replace(encoder, network=encoder.network.to(META), final_norm=encoder.final_norm.to(META), device=META)

    with PeakMemory() as memory:
        encode(there, torch.empty(images, 224, 224, 3, dtype=torch.uint8, device=META), there.taps)

    assert memory.peak <= LIMITS["extraction, ViT-B/16"] * GIB


@pytest.mark.parametrize(
    "kind", [ViewKind(pixels=224, count=2, scale=(0.3, 1.0)), ViewKind(pixels=96, count=10, scale=(0.05, 0.3))]
)
def test_views_of_a_batch_with_one_large_image_stay_within_their_limit(kind: ViewKind) -> None:
    sizes = np.array([[375, 500]] * 1023 + [[2848, 4288]])
    drawn = draw_for_batch(sizes, kind, first_view=0, seed=0, epoch=0, numbers=np.arange(1024))

    with PeakMemory() as memory:
        pixels = torch.empty(int(sizes.prod(axis=1).sum()), 3, dtype=torch.uint8, device=META)
        held = memory.now
        views = make_batched_views(pixels, sizes, drawn, kind)
        made = memory.peak
        normalise(views, IMAGENET_MEAN, IMAGENET_STD)

    assert made - held <= LIMITS["views of 1,024 images"] * GIB
    assert memory.peak <= LIMITS["normalised views of 1,024 images"] * GIB


def test_training_step_stays_within_its_limit_and_near_the_estimate_of_a_dry_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # `meta` has none
    recipe = read_recipe(RECIPE, overrides=["run.precision=fp32"])
    images = recipe.optimization.batch_size // GPUS

    with PeakMemory() as memory:
        model = build_learner(recipe, torch.device("cpu")).model.to(META)
        views = [
            torch.empty(images, 3, kind.pixels, kind.pixels, device=META)
            for kind in view_kinds(recipe)
            for _ in range(kind.count)
        ]
        kept = model.draw_kept(torch.Generator().manual_seed(0), images=images)
        compute_gradients(
            model,
            views,
            None if kept is None else kept.to(META),
            sharpening=0.25,
            micro_batch=0,
            autocast=nullcontext(),
        )

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    # That of `--dry-run`, without the two moments of the optimiser, which begin with its first step.
    estimate = 4 * (total + trained) + _activation_bytes(recipe, model.exported(), images, half=False)
    assert memory.peak <= LIMITS["MSN step, ViT-S/16"] * GIB
    assert memory.peak <= estimate <= 1.5 * memory.peak
