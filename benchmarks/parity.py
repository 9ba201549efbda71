"""Compare with the authors' code, number by number, and write the table of reports/parity.md.

    python benchmarks/parity.py --msn DIR --dino DIR --dinov2 DIR --suncet DIR --simsiam DIR --out reports/parity.md

Each folder is a checkout of a repository: facebookresearch/msn, dino, dinov2, suncet, simsiam. Rows of a repository that is not
given, and of a library that is not installed, are skipped. Weights, images and features are random; the digits are those of
scikit-learn. Nothing is downloaded. The exit code is 1 if a difference is above its limit.
"""

import argparse
import contextlib
import datetime
import importlib
import logging
import math
import os
import platform
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

REPOSITORIES = ("msn", "dino", "dinov2", "suncet", "simsiam")
_ROUNDING = 1e-5  # of float32 features of about 1, over twelve blocks
_EXACT = 1e-9  # of float64
_SIZES = (192, 160, 256)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        what: What was compared.
        reference: With whose code.
        difference: The largest difference, in `unit`.
        limit: The largest difference that rounding explains.
    """

    what: str
    reference: str
    difference: float
    limit: float
    unit: str = ""

    @property
    def is_within(self) -> bool:
        return self.difference <= self.limit

    def __str__(self) -> str:
        numbers = " | ".join(f"{value:.3g}{self.unit}" for value in (self.difference, self.limit))
        return f"| {self.what} | {self.reference} | {numbers} | {'yes' if self.is_within else '**no**'} |"


Folders = dict[str, Path]


@contextlib.contextmanager
def modules_of(folder: Path) -> Iterator[Callable[[str], Any]]:
    """Yield a function that imports modules of a repository, and forget them: several repositories have a `utils` or a `src`."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin is not None and Path(origin).is_relative_to(folder):
                del sys.modules[name]


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    if ours.shape != theirs.shape:
        return math.inf
    return float((ours.detach().double() - theirs.detach().double()).abs().max())


def randomise(network: nn.Module, *, seed: int = 0) -> None:
    """Draw all weights, so that norms and biases matter and attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator) * 0.05
            is_scale = weight.dim() == 1 and name.endswith(("weight", "gamma"))
            weight.copy_(1 + 2 * drawn if is_scale else drawn)


def _images(side: int, *, count: int = 3) -> tuple[Tensor, Tensor]:
    """Draw pixels (n, side, side, 3) uint8, and the same normalised with ImageNet's mean and standard deviation."""
    generator = torch.Generator().manual_seed(side)
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return pixels, ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def _compare_taps(
    file: Path, theirs: Callable[[Tensor], dict[str, Tensor]], side: int, *, arch: str | None, reference: str, what: str
) -> Iterator[Row]:
    from msn_eval.features.encoder import encode, load_encoder

    encoder = load_encoder(str(file), device="cpu", precision="fp32", arch=arch, image_pixels=side)
    pixels, images = _images(side)
    with torch.no_grad():
        expected = theirs(images)
    ours = encode(encoder, pixels, list(expected))
    scale = max(float(value.abs().max()) for value in expected.values())
    for tap, value in expected.items():
        limit = _ROUNDING * max(1.0, scale)
        difference = largest_difference(ours[tap], value)
        yield Row(what=f"{what}, {side} pixels, tap `{tap}`", reference=reference, difference=difference, limit=limit)


def compare_msn_features(folders: Folders) -> Iterator[Row]:
    """Compare the taps of MSN's Transformer at its own and at other image sizes."""
    with modules_of(folders["msn"]) as load:
        network = load("src.deit").deit_tiny().eval()
    network.fc = None
    randomise(network)

    def taps(images: Tensor) -> dict[str, Tensor]:
        last_four = network.forward_return_n_last_blocks(images, n=4, return_patch_avgpool=True)
        width = network.embed_dim
        return {
            "cls": network.forward_blocks(images, 1),
            "cls-norm": network.forward(images),
            "mean": last_four[:, 4 * width :],
            "cls4": last_four[:, : 4 * width],
        }

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "msn.pth.tar"
        weights = {f"module.{name}": value for name, value in network.state_dict().items()}
        torch.save({"target_encoder": weights, "epoch": 1}, file)
        for side in (224, *_SIZES):
            yield from _compare_taps(
                file, taps, side, arch="vit_tiny_patch16_224", reference="msn, src/deit.py", what="MSN features"
            )


def compare_dino_features(folders: Folders) -> Iterator[Row]:
    """Compare the taps of DINO's Transformer at its own and at other image sizes."""
    with modules_of(folders["dino"]) as load:
        network = load("vision_transformer").vit_tiny(patch_size=16).eval()
    randomise(network)
    norm = network.norm

    def taps(images: Tensor) -> dict[str, Tensor]:
        blocks = network.get_intermediate_layers(images, n=4)
        network.norm = nn.Identity()
        before = network.get_intermediate_layers(images, n=1)[0][:, 0]
        network.norm = norm
        return {
            "cls": before,
            "cls-norm": network(images),
            "mean": blocks[-1][:, 1:].mean(dim=1),
            "cls4": torch.cat([block[:, 0] for block in blocks], dim=1),
        }

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dino.pth"
        torch.save({"teacher": {f"backbone.{name}": value for name, value in network.state_dict().items()}}, file)
        for side in (224, *_SIZES):
            yield from _compare_taps(
                file,
                taps,
                side,
                arch="vit_tiny_patch16_224",
                reference="dino, vision_transformer.py",
                what="DINO features",
            )


def compare_dinov2_features(folders: Folders) -> Iterator[Row]:
    """Compare the taps of DINOv2's Transformers, with and without registers, at the sizes of evaluation and training."""
    registers = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
    for name, given, arch in (
        ("DINOv2", {}, "vit_small_patch14_dinov2"),
        ("DINOv2 with registers", registers, "vit_small_patch14_reg4_dinov2"),
    ):
        with modules_of(folders["dinov2"]) as load:
            build = load("dinov2.models.vision_transformer").vit_small
            network = build(patch_size=14, img_size=518, init_values=1.0, block_chunks=0, **given).eval()
        randomise(network)

        def taps(images: Tensor, network: Any = network) -> dict[str, Tensor]:
            output = network.forward_features(images)
            blocks = network.get_intermediate_layers(images, n=4, return_class_token=True)
            return {
                "cls": output["x_prenorm"][:, 0],
                "cls-norm": output["x_norm_clstoken"],
                "mean": output["x_norm_patchtokens"].mean(dim=1),
                "cls4": torch.cat([token for _, token in blocks], dim=1),
            }

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "dinov2.pth"
            torch.save(network.state_dict(), file)
            for side in (224, 518, 196):
                yield from _compare_taps(
                    file,
                    taps,
                    side,
                    arch=arch,
                    reference="dinov2, models/vision_transformer.py",
                    what=f"{name} features",
                )


def compare_transformers_features(folders: Folders) -> Iterator[Row]:
    """Compare folders of transformers with that library: MSN, ViT, MAE without its mask, DINOv2."""
    import transformers
    from transformers import Dinov2Config, ViTConfig, ViTMAEConfig, ViTMSNConfig

    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    small |= {"image_size": 64, "patch_size": 8}
    kinds: list[tuple[str, Any]] = [
        ("ViTMSNModel", ViTMSNConfig(**small)),
        ("ViTModel", ViTConfig(**small)),
        ("ViTMAEModel", ViTMAEConfig(**small, mask_ratio=0.0)),
        ("Dinov2Model", Dinov2Config(**{name: value for name, value in small.items() if name != "intermediate_size"})),
    ]
    for name, config in kinds:
        network = getattr(transformers, name)(config).eval()
        randomise(network)

        def taps(images: Tensor, network: Any = network) -> dict[str, Tensor]:
            output = network(images, output_hidden_states=True)
            normed = output.last_hidden_state
            return {
                "cls": output.hidden_states[-1][:, 0],
                "cls-norm": normed[:, 0],
                "mean": normed[:, 1:].mean(dim=1),
            }

        with tempfile.TemporaryDirectory() as folder:
            network.save_pretrained(folder)
            yield from _compare_taps(
                Path(folder), taps, 64, arch=None, reference=f"transformers {version('transformers')}", what=name
            )


def compare_pixels(folders: Folders) -> Iterator[Row]:
    """Compare pixels with torchvision's transforms, as the authors' scripts use them."""
    import torchvision
    from torchvision.transforms import functional as vision

    from msn_eval.data.augmentation import RandomCrops, draw_random_box
    from msn_eval.data.images import make_eval_transform, resize_and_crop

    reference = f"torchvision {torchvision.__version__}, Pillow {version('pillow')}"
    generator = np.random.default_rng(0)
    transform = make_eval_transform(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crops = RandomCrops(seed=0, epoch=0, share=0.08)
    evaluated, augmented = 0.0, 0.0
    for number in range(100):
        width, height = (int(side) for side in generator.integers(180, 600, 2))
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = vision.center_crop(vision.resize(image, [256]), [224])
        evaluated = max(evaluated, _level_difference(resize_and_crop(image, transform), np.asarray(expected)))
        drawn = crops._draw(str(number))
        left, top, right, bottom = draw_random_box(width, height, drawn, share=0.08)
        expected = vision.resized_crop(image, top, left, bottom - top, right - left, [224, 224])
        expected = vision.hflip(expected) if drawn[-1] < 0.5 else expected
        augmented = max(augmented, _level_difference(crops.crop(image, str(number), 224), np.asarray(expected)))
    yield Row(
        what="evaluation pixels: resize 256, centre crop 224",
        reference=reference,
        difference=evaluated,
        limit=0,
        unit=" of 255",
    )
    yield Row(
        what="random crop and flip of the drawn box", reference=reference, difference=augmented, limit=0, unit=" of 255"
    )
    ours, theirs = [], []
    torch.manual_seed(0)
    resized = torchvision.transforms.RandomResizedCrop
    canvas = torch.zeros(1, 375, 500)
    for number in range(20000):
        left, top, right, bottom = draw_random_box(500, 375, crops._draw(f"draw {number}"), share=0.08)
        ours.append([left, top, right - left, bottom - top])
        top, left, rows, columns = resized.get_params(canvas, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs.append([left, top, columns, rows])
    yield Row(
        what="random boxes, 20,000 draws: left, top, width, height (Kolmogorov-Smirnov distance)",
        reference=reference,
        difference=_distribution_distance(np.array(ours), np.array(theirs)),
        limit=1.95 * math.sqrt(2 / 20000),  # level 0.001
    )


def _level_difference(ours: Any, theirs: Any) -> float:
    return float(np.abs(ours.astype(int) - theirs.astype(int)).max())


def _distribution_distance(ours: Any, theirs: Any) -> float:
    from scipy.stats import ks_2samp

    return max(float(ks_2samp(*columns).statistic) for columns in zip(ours.T, theirs.T, strict=True))


def compare_msn_loss(folders: Folders) -> Iterator[Row]:
    """Compare MSN's loss: its parts, targets and gradients, with and without Sinkhorn."""
    from msn_pretrain import msn_loss

    with modules_of(folders["msn"]) as load:
        make_loss = load("src.losses").init_msn_loss
    generator = torch.Generator().manual_seed(0)
    for sinkhorn in (True, False):
        differences = dict.fromkeys(("cross-entropy", "me-max", "entropy", "targets", "gradients"), 0.0)
        for sharpening, temperature in ((0.25, 0.1), (0.1, 0.1), (0.5, 0.2)):
            drawn = [torch.randn(rows, 32, generator=generator, dtype=torch.float64) for rows in (33, 11, 40)]
            anchors, targets, prototypes = ours = [value.clone().requires_grad_() for value in drawn]
            loss = msn_loss(
                anchors,
                targets,
                prototypes,
                temperature=temperature,
                sharpening=sharpening,
                sinkhorn_iterations=3 if sinkhorn else 0,
                me_max_weight=2.0,
                entropy_weight=0.3,
            )
            loss.total.backward()  # type: ignore[no-untyped-call]
            theirs = [value.clone().requires_grad_() for value in drawn]
            ploss, me_max, entropy, _, assigned = make_loss(
                num_views=3, tau=temperature, me_max=True, return_preds=True
            )(
                anchor_views=theirs[0],
                target_views=theirs[1].detach(),
                prototypes=theirs[2],
                proto_labels=torch.eye(40, dtype=torch.float64),
                T=sharpening,
                use_entropy=True,
                use_sinkhorn=sinkhorn,
            )
            (ploss + 2.0 * me_max + 0.3 * entropy).backward()
            pairs = {
                "cross-entropy": (loss.cross_entropy, ploss),
                "me-max": (loss.me_max, me_max),
                "entropy": (loss.entropy, entropy),
                "targets": (loss.targets.repeat(3, 1), assigned),
                "gradients": (_gradients([ours[0], ours[2]]), _gradients([theirs[0], theirs[2]])),
            }
            for name, pair in pairs.items():
                differences[name] = max(differences[name], largest_difference(*pair))
        for name, difference in differences.items():
            how = "with" if sinkhorn else "without"
            yield Row(
                what=f"MSN loss {how} Sinkhorn: {name}",
                reference="msn, src/losses.py",
                difference=difference,
                limit=_EXACT,
            )


def _gradients(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.grad.flatten() for tensor in tensors if tensor.grad is not None])


def compare_schedules(folders: Folders) -> Iterator[Row]:
    """Compare every step's learning rate, weight decay, EMA decay and sharpening."""
    from msn_pretrain.config.recipe import Criterion, MSNRecipe, Optimization
    from msn_pretrain.config.schedule import msn_settings

    with modules_of(folders["msn"]) as load:
        utils = load("src.utils")
    differences = dict.fromkeys(("learning rate", "weight decay", "EMA decay", "sharpening"), 0.0)
    for epochs, per_epoch, warmup in ((7, 13, 2), (3, 5, 0), (40, 9, 15), (5, 11, 0.5)):
        recipe = MSNRecipe(
            optimization=Optimization(epochs=epochs, warmup=warmup), criterion=Criterion(final_sharpening=0.1)
        )
        given, duration = recipe.optimization, 1.25 * epochs * per_epoch
        optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))]}])
        rates = utils.WarmupCosineSchedule(
            optimizer,
            warmup_steps=int(warmup * per_epoch),
            start_lr=given.start_learning_rate,
            ref_lr=given.learning_rate,
            final_lr=given.final_learning_rate,
            T_max=int(duration),
        )
        decays = utils.CosineWDSchedule(
            optimizer, ref_wd=given.weight_decay, final_wd=given.final_weight_decay, T_max=int(duration)
        )
        for step in range(epochs * per_epoch):
            ours = msn_settings(recipe, step=step, steps_per_epoch=per_epoch)
            # src/msn_train.py adds a constant increment per step for the last two.
            pairs = {
                "learning rate": (ours.learning_rate, rates.step()),
                "weight decay": (ours.weight_decay, decays.step()),
                "EMA decay": (ours.ema, 0.996 + (1.0 - 0.996) / duration * step),
                "sharpening": (ours.sharpening, 0.25 + (0.1 - 0.25) / duration * step),
            }
            for name, (here, there) in pairs.items():
                differences[name] = max(differences[name], abs(here - there))
    for name, difference in differences.items():
        source = "src/utils.py" if name in ("learning rate", "weight decay") else "formula of src/msn_train.py"
        yield Row(what=f"MSN schedule: {name}", reference=f"msn, {source}", difference=difference, limit=1e-12)


def compare_msn_training(folders: Folders) -> Iterator[Row]:
    """Compare six complete steps of MSN: loss, optimiser groups, clipping, schedules and moving average, in float64."""
    from msn_pretrain.config.recipe import Criterion, Encoder, Head, MSNRecipe, Optimization, Views
    from msn_pretrain.config.schedule import msn_settings
    from msn_pretrain.methods.msn import build_msn
    from msn_pretrain.training.gradients import compute_gradients, gradient_norm
    from msn_pretrain.training.optimizer import build_optimizer, set_for_step

    with modules_of(folders["msn"]) as load:
        theirs, losses = load("src.msn_train"), load("src.losses")
    recipe = MSNRecipe(
        encoder=Encoder(name="vit_tiny_patch16_224"),
        head=Head(hidden=96, output=24),
        views=Views(focal_views=2),
        criterion=Criterion(prototypes=16),
        optimization=Optimization(epochs=4, warmup=1, batch_size=4, clip=0.5),
    )
    per_epoch, steps = 3, 6
    model = build_msn(recipe).double()
    anchor = theirs.init_model(
        torch.device("cpu"), "deit_tiny", use_bn=True, hidden_dim=96, output_dim=24, drop_path_rate=0.0
    ).double()
    names = {"trunk.network.": "", "head.": "fc."}
    anchor.load_state_dict(_renamed(model.anchor.state_dict(), names), strict=False)
    target = theirs.copy.deepcopy(anchor)
    prototypes = nn.Parameter(model.prototypes.detach().clone())
    given = recipe.optimization
    _, optimizer, rates, decays = theirs.init_opt(
        anchor,
        per_epoch,
        given.start_learning_rate,
        given.learning_rate,
        given.warmup,
        given.epochs,
        prototypes=prototypes,
        wd=given.weight_decay,
        final_wd=given.final_weight_decay,
        final_lr=given.final_learning_rate,
    )
    loss_of = losses.init_msn_loss(num_views=3, tau=0.1, me_max=True, return_preds=True)
    our_optimizer = build_optimizer(model, recipe)
    generator = torch.Generator().manual_seed(0)
    loss_difference = 0.0
    for step in range(steps):
        views = [torch.randn(4, 3, side, side, generator=generator).double() for side in (224, 224, 96, 96)]
        torch.manual_seed(step)
        kept = torch.randperm(196)[: math.floor(196 * (1 - recipe.masking.ratio))]
        settings = msn_settings(recipe, step=step, steps_per_epoch=per_epoch)
        set_for_step(our_optimizer, settings)
        our_optimizer.zero_grad()
        ours = compute_gradients(
            model, views, kept, sharpening=settings.sharpening, micro_batch=0, autocast=contextlib.nullcontext()
        )
        clipped = list(model.clipped_parameters())
        nn.utils.clip_grads_with_norm_(clipped, given.clip, gradient_norm(clipped))
        our_optimizer.step()
        model.after_update(settings, torch.tensor(0.0))

        optimizer.zero_grad()
        torch.manual_seed(step)  # the patches that it drops
        _, anchors = anchor(views[1:], return_before_head=True, patch_drop=recipe.masking.ratio)
        with torch.no_grad():
            targets, _ = target(views[0], return_before_head=True)
        ploss, me_max, _, _, _ = loss_of(
            anchor_views=anchors,
            target_views=targets.detach(),
            prototypes=prototypes,
            proto_labels=torch.eye(16, dtype=torch.float64),
            T=0.25,
            use_sinkhorn=True,
        )
        rates.step()
        decays.step()
        (ploss + me_max).backward()
        nn.utils.clip_grad_norm_(anchor.parameters(), given.clip)
        optimizer.step()
        with torch.no_grad():
            for own, followed in zip(target.parameters(), anchor.parameters(), strict=True):
                own.mul_(settings.ema).add_((1.0 - settings.ema) * followed)
        loss_difference = max(loss_difference, abs(float(ours.total.detach()) - float(ploss + me_max)))
    reference = "msn, src/msn_train.py, deit.py, losses.py, utils.py"
    yield Row(what=f"MSN training, {steps} steps: loss", reference=reference, difference=loss_difference, limit=1e-7)
    for name, branch, network in (("anchor", model.anchor, anchor), ("target", model.target, target)):
        own, expected = _renamed(branch.state_dict(), names), network.state_dict()
        difference = max(largest_difference(own[key], expected[key]) for key in expected if "num_batches" not in key)
        yield Row(
            what=f"MSN training, {steps} steps: {name} weights", reference=reference, difference=difference, limit=1e-6
        )
    difference = largest_difference(model.prototypes, prototypes)
    yield Row(what=f"MSN training, {steps} steps: prototypes", reference=reference, difference=difference, limit=1e-6)
    excluded = {
        "anchor." + _undo(name, names) for name, weight in anchor.named_parameters() if _is_excluded(optimizer, weight)
    }
    excluded |= {"prototypes"}
    own_excluded = {name for name, weight in model.named_parameters() if _is_excluded(our_optimizer, weight)}
    yield Row(
        what="MSN optimiser: parameters with another choice of weight decay",
        reference=reference,
        difference=len(excluded ^ own_excluded),
        limit=0,
    )
    settings_differ = [
        name
        for name in ("betas", "eps", "amsgrad")
        if optimizer.param_groups[0][name] != our_optimizer.param_groups[0][name]
    ]
    yield Row(
        what="MSN optimiser: betas, epsilon and amsgrad that differ",
        reference=reference,
        difference=len(settings_differ),
        limit=0,
    )


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        old = next(start for start in names if name.startswith(start))
        renamed[names[old] + name.removeprefix(old)] = value
    return renamed


def _undo(name: str, names: dict[str, str]) -> str:
    old = next(start for start, new in sorted(names.items(), key=lambda pair: -len(pair[1])) if name.startswith(new))
    return old + name.removeprefix(names[old])


def _is_excluded(optimizer: torch.optim.Optimizer, weight: Tensor) -> bool:
    """Whether the optimiser has the weight in a group without weight decay."""
    return any(
        group["weight_decay"] == 0 for group in optimizer.param_groups if any(weight is own for own in group["params"])
    )


def compare_simsiam(folders: Folders) -> Iterator[Row]:
    """Compare six complete steps of SimSiam with SGD, its constant rate for the predictor included, in float64."""
    from torchvision.models import resnet18

    from msn_pretrain.config.recipe import SGD, Encoder, Projector, SimSiamRecipe
    from msn_pretrain.config.schedule import simsiam_settings
    from msn_pretrain.methods.simsiam import build_simsiam
    from msn_pretrain.training.gradients import compute_gradients
    from msn_pretrain.training.optimizer import build_optimizer, set_for_step

    with modules_of(folders["simsiam"]) as load:
        script, builder = load("main_simsiam"), load("simsiam.builder")
    recipe = SimSiamRecipe(
        encoder=Encoder(name="resnet18"),
        projector=Projector(output=512, predictor=64),
        optimization=SGD(epochs=3, batch_size=8),
    )
    per_epoch, steps = 2, 6
    model = build_simsiam(recipe).double()
    theirs = builder.SimSiam(resnet18, dim=512, pred_dim=64).double()
    own = model.state_dict()
    names = {"network.": "encoder.", "projector.": "encoder.fc.", "predictor.": "predictor."}
    theirs.load_state_dict(_renamed(own, names), strict=False)
    # Their last linear layer has a constant bias. The BatchNorm after it cancels the bias, but contains it in its running mean.
    nn.init.zeros_(theirs.encoder.fc[6].bias)
    given = recipe.optimization
    first_rate = given.learning_rate * given.batch_size / 256
    groups = [
        {"params": theirs.encoder.parameters(), "fix_lr": False},
        {"params": theirs.predictor.parameters(), "fix_lr": True},
    ]
    optimizer = torch.optim.SGD(groups, first_rate, momentum=0.9, weight_decay=1e-4)
    our_optimizer = build_optimizer(model, recipe)
    criterion = nn.CosineSimilarity(dim=1)
    generator = torch.Generator().manual_seed(0)
    losses, rates = 0.0, 0.0
    for step in range(steps):
        views = [torch.randn(8, 3, 64, 64, generator=generator).double() for _ in range(2)]
        settings = simsiam_settings(recipe, step=step, steps_per_epoch=per_epoch)
        set_for_step(our_optimizer, settings)
        our_optimizer.zero_grad()
        ours = compute_gradients(model, views, None, sharpening=1.0, micro_batch=0, autocast=contextlib.nullcontext())
        our_optimizer.step()
        script.adjust_learning_rate(optimizer, first_rate, step // per_epoch, argparse.Namespace(epochs=given.epochs))
        p1, p2, z1, z2 = theirs(*views)
        loss = -(criterion(p1, z2).mean() + criterion(p2, z1).mean()) * 0.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses = max(losses, abs(float(ours.total.detach()) - float(loss)))
        expected = [group["lr"] for group in optimizer.param_groups]
        rates = max(
            rates,
            *(
                abs(a - b)
                for a, b in zip((settings.learning_rate, settings.fixed_learning_rate), expected, strict=True)
            ),
        )
    reference = "simsiam, builder.py, main_simsiam.py"
    yield Row(what=f"SimSiam training, {steps} steps: loss", reference=reference, difference=losses, limit=1e-8)
    yield Row(what="SimSiam schedule: learning rates", reference=reference, difference=rates, limit=1e-12)
    trained, expected_weights = _renamed(model.state_dict(), names), theirs.state_dict()
    difference = max(largest_difference(value, expected_weights[name]) for name, value in trained.items())
    yield Row(
        what=f"SimSiam training, {steps} steps: weights and BatchNorm statistics",
        reference=reference,
        difference=difference,
        limit=1e-7,
    )


def _features(rows: int, *, seed: int, classes: int = 20, width: int = 48) -> tuple[Tensor, Tensor]:
    """Draw features (n, width) in overlapping clusters, and their labels."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    return centres[labels] + 2.5 * torch.randn(rows, width, generator=generator), labels


def compare_knn(folders: Folders) -> Iterator[Row]:
    """Compare k-NN accuracies with DINO's script."""
    from msn_eval.sklearn import NearestNeighbourProbe

    with modules_of(folders["dino"]) as load:
        classify = load("eval_knn").knn_classifier
    train, labels = _features(2000, seed=0)
    test, expected = _features(1000, seed=1)
    for k in (10, 20, 100, 200):
        probe = NearestNeighbourProbe(k=k, temperature=0.07).fit(train, labels)
        scores = torch.from_numpy(np.asarray(probe.decision_function(test)))
        ranked = scores.argsort(dim=1, descending=True)
        ours = [float((ranked[:, :count] == expected[:, None]).any(dim=1).double().mean()) for count in (1, 5)]
        normalised = [functional.normalize(values, dim=1) for values in (train, test)]
        theirs = classify(normalised[0], labels, normalised[1], expected, k, 0.07, num_classes=20)
        difference = max(abs(1000 * a - 10 * b) for a, b in zip(ours, theirs, strict=True))
        yield Row(
            what=f"k-NN, k = {k}, T = 0.07: correct among 1,000 (top-1 and top-5)",
            reference="dino, eval_knn.py",
            difference=round(difference, 6),
            limit=0,
        )


def compare_ridge(folders: Folders) -> Iterator[Row]:
    """Compare ridge regression and its leave-one-out choice with scikit-learn."""
    import sklearn
    from sklearn.linear_model import RidgeCV

    from msn_eval.probes.base import centre_rows
    from msn_eval.probes.ridge import GRID, solve_ridge

    train, labels = _features(400, seed=0)
    rows, queries = centre_rows(train), centre_rows(_features(1000, seed=1)[0])
    ours = solve_ridge(rows, labels, n_classes=20)
    targets = functional.one_hot(labels, 20).double() - 1 / 20
    theirs = RidgeCV(alphas=GRID).fit(rows.numpy(), targets.numpy())
    reference = f"scikit-learn {sklearn.__version__}, RidgeCV"
    expected = torch.from_numpy(theirs.predict(queries.numpy())) + 1 / 20
    scores = (queries - ours.centre) @ ours.weights + ours.bias
    yield Row(what="ridge: scores", reference=reference, difference=largest_difference(scores, expected), limit=_EXACT)
    yield Row(what="ridge: chosen alpha", reference=reference, difference=abs(ours.alpha - theirs.alpha_), limit=1e-12)


def compare_logistic(folders: Folders) -> Iterator[Row]:
    """Compare logistic regression with scikit-learn and with cyanure, which the reference uses."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    from msn_eval.probes.base import centre_rows
    from msn_eval.sklearn import LogisticProbe

    train, labels = _features(400, seed=0)
    test = _features(1000, seed=1)[0]
    rows, queries = centre_rows(train).numpy(), centre_rows(test).numpy()
    for strength in (0.075, 0.0025):
        probe = LogisticProbe(lam=strength).fit(train, labels)
        exact = LogisticRegression(C=1 / strength, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(rows, labels)
        found = [(f"scikit-learn {sklearn.__version__}", exact.coef_, 2)]
        with contextlib.suppress(ImportError):
            # At its published tolerance the reference itself is not at the minimum.
            for tolerance, limit in ((1e-8, 2), (1e-3, 10)):
                reference = f"cyanure {version('cyanure')}, tolerance {tolerance:g}"
                found.append((reference, _fit_cyanure(rows, labels.numpy(), strength, tolerance), limit))
        for reference, weights, limit in found:
            differing = int((probe.predict(test) != (queries @ weights.T).argmax(axis=1)).sum())
            what = f"logistic, lambda = {strength}: predictions that differ among 1,000"
            yield Row(what=what, reference=reference, difference=differing, limit=limit)
        yield Row(
            what=f"logistic, lambda = {strength}: weights",
            reference=f"scikit-learn {sklearn.__version__}",
            difference=float(np.abs(probe.coef_ - exact.coef_).max()),
            limit=0.01 * float(np.abs(exact.coef_).max()),  # the certificate is one of the objective, 1e-6
        )


def _fit_cyanure(rows: Any, labels: Any, strength: float, tolerance: float) -> Any:
    """Fit as the reference does, and return weights (classes, d)."""
    from cyanure.estimators import Classifier

    model = Classifier(
        loss="multiclass-logistic",
        penalty="l2",
        lambda_1=strength / len(rows),
        fit_intercept=False,
        tol=tolerance,
        max_iter=300 if tolerance == 1e-3 else 100_000,
        verbose=False,
    )
    with contextlib.redirect_stdout(sys.stderr):
        model.fit(rows, labels)
    return np.asarray(model.get_weights()).T


def compare_linear_augmented(folders: Folders) -> Iterator[Row]:
    """Compare 100 steps of the linear evaluation with the authors' layer, optimiser and schedule, on the same crops."""
    with modules_of(folders["msn"]) as load:
        script = load("linear_eval")
    yield from _compare_linear_steps(
        script.LinearClassifier, script.SGD, script.WarmupCosineSchedule, "msn, linear_eval.py and src/sgd.py"
    )


def compare_suncet_optimiser(folders: Folders) -> Iterator[Row]:
    """Compare the same 100 steps with the SGD of the suncet repository."""
    if "msn" not in folders:
        return
    with modules_of(folders["msn"]) as load:
        script = load("linear_eval")
    with modules_of(folders["suncet"]) as load:
        optimiser = load("src.sgd").SGD
    yield from _compare_linear_steps(
        script.LinearClassifier,
        optimiser,
        script.WarmupCosineSchedule,
        "suncet, src/sgd.py; layer and schedule of msn",
    )


def _compare_linear_steps(make_layer: Any, make_optimiser: Any, make_schedule: Any, reference: str) -> Iterator[Row]:
    from msn_eval.data import read_split
    from msn_eval.distributed.group import ALONE
    from msn_eval.features.augmented import AugmentedImages, iterate_augmented_features
    from msn_eval.features.encoder import load_encoder
    from msn_eval.features.extraction import Loading, extract
    from msn_eval.probes.linear_augmented import LinearAugmented, draw_order, fit_augmented, start_training

    probe = LinearAugmented(lr=[6.4], epochs=20, batch_size=20)
    encoder = load_encoder("pixels", device="cpu")
    drawn = read_split("digits", "train").first_of_each_class(11)
    labels = torch.tensor(drawn.labels)
    images = AugmentedImages(
        images=drawn,
        labels=labels,
        hashes=None,
        encoder=encoder,
        tap="pixels",
        loading=Loading(batch_size=20, workers=0),
    )
    layer = make_layer(images.dim, num_labels=10, normalize=True)
    first = start_training(probe, images.dim, 10, torch.device("cpu")).heads[6.4].linear
    layer.linear.load_state_dict(first.state_dict())
    is_vector = {name: weight.dim() == 1 for name, weight in layer.named_parameters()}
    groups = [
        {"params": [weight for name, weight in layer.named_parameters() if is_vector[name] is chosen], **rest}
        for chosen, rest in ((False, {}), (True, {"weight_decay": 0}))
    ]
    optimizer = make_optimiser(groups, nesterov=True, weight_decay=0.0, momentum=0.9, lr=6.4)
    schedule = make_schedule(optimizer, warmup_steps=0, start_lr=6.4, ref_lr=6.4, T_max=100)
    for epoch in range(20):
        batches = torch.split(draw_order(110, seed=0, epoch=epoch), 20)[:5]
        steps = iterate_augmented_features(images, labels, batches, seed=0, epoch=epoch, share=0.08, group=ALONE)
        for ((features, own, _),) in steps:
            functional.cross_entropy(layer(features), own).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    values = extract(encoder, "digits", split="val").values
    (scores,) = fit_augmented(probe, images, group=ALONE, files=None).scores(values)
    expected = layer(values)
    difference = int((scores.argmax(dim=1) != expected.argmax(dim=1)).sum())
    yield Row(
        what="linear-augmented, 100 steps: predictions that differ among 797",
        reference=reference,
        difference=difference,
        limit=2,
    )
    relative = largest_difference(scores, expected) / float(expected.detach().abs().max())
    yield Row(
        what="linear-augmented, 100 steps: scores, relative", reference=reference, difference=relative, limit=1e-3
    )


def compare_lists(folders: Folders) -> Iterator[Row]:
    """Compare the SHA-256 of the labelled lists with the files of the repository."""
    import hashlib
    import json

    from msn_eval.files.package_data import find_package_folder

    content = json.loads((find_package_folder("imagenet_subsets") / "published_lists.json").read_text())
    wrong = 0
    for entry in content["lists"]:
        file = folders["msn"] / entry["path"]
        wrong += not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]
    count = len(content["lists"])
    yield Row(
        what=f"lists of labelled images that differ, of {count}",
        reference="msn, imagenet_subsets",
        difference=wrong,
        limit=0,
    )


# What each comparison needs, in the order of the page.
COMPARISONS: tuple[tuple[Callable[[Folders], Iterator[Row]], str | None], ...] = (
    (compare_msn_features, "msn"),
    (compare_dino_features, "dino"),
    (compare_dinov2_features, "dinov2"),
    (compare_transformers_features, None),
    (compare_pixels, None),
    (compare_msn_loss, "msn"),
    (compare_schedules, "msn"),
    (compare_msn_training, "msn"),
    (compare_simsiam, "simsiam"),
    (compare_knn, "dino"),
    (compare_ridge, None),
    (compare_logistic, None),
    (compare_linear_augmented, "msn"),
    (compare_suncet_optimiser, "suncet"),
    (compare_lists, "msn"),
)


def measure(folders: Folders, only: str) -> tuple[list[Row], list[str]]:
    """Return the rows of all comparisons whose name contains `only`, and a line for each that was skipped or failed."""
    rows: list[Row] = []
    notes: list[str] = []
    for compare, repository in COMPARISONS:
        name = compare.__name__.removeprefix("compare_").replace("_", " ")
        if only not in compare.__name__:
            continue
        if repository is not None and repository not in folders:
            notes.append(f"{name}: skipped, because the repository {repository} was not given")
            continue
        print(name, file=sys.stderr, flush=True)
        try:
            with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the authors' code, under newer versions of its libraries
                rows += compare(folders)
        except ImportError as error:
            notes.append(f"{name}: skipped, because {error.name} is not installed")
        except Exception as error:  # the other comparisons go on, and the page says so
            traceback.print_exc()
            notes.append(f"{name}: **failed** with {type(error).__name__}")
    return rows, notes


def write_page(rows: list[Row], notes: list[str], folders: Folders) -> str:
    """Return the page in Markdown."""
    outside = sum(not row.is_within for row in rows)
    commits = ", ".join(f"{name} {_commit_of(folder)}" for name, folder in folders.items())
    lines = [
        "# Parity with the authors' code",
        "",
        "The same weights, images and features go through this package and through the code of the authors, or of a library.",
        "They are random. A difference is the largest absolute one over all values; the limit is what rounding explains.",
        "",
        "    make parity MSN=… DINO=… DINOV2=… SUNCET=… SIMSIAM=…     # folders with the authors' repositories",
        "",
        f"{datetime.date.today().isoformat()}, Python {platform.python_version()}, torch {torch.__version__}, CPU. "
        f"{len(rows)} comparisons, {outside} above the limit.",
        f"Repositories: {commits or 'none'}.",
        "",
        "| what | reference | largest difference | limit | within |",
        "| --- | --- | --- | --- | --- |",
        *map(str, rows),
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _commit_of(folder: Path) -> str:
    """Return the first digits of a checkout's commit, or an empty string for a plain folder."""
    import subprocess

    command = ["git", "-C", str(folder), "log", "-1", "--format=%h %cs"]
    is_checkout = (folder / ".git").exists()
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() if is_checkout else ""


def main() -> int:
    """Compare everything, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in REPOSITORIES:
        parser.add_argument(f"--{name}", metavar="DIR", default="", help="checkout of this repository")
    parser.add_argument("--out", type=Path, help="page to write; default: print it")
    parser.add_argument("--only", default="", metavar="TEXT", help="comparisons whose name contains this")
    options = parser.parse_args()
    given = {name: Path(getattr(options, name)).resolve() for name in REPOSITORIES if getattr(options, name)}
    for name, folder in given.items():
        if not folder.is_dir():
            parser.error(f"--{name} {folder}: no such folder")
    logging.disable(logging.WARNING)
    os.environ["XFORMERS_DISABLED"] = "1"  # DINOv2's own code would use it
    rows, notes = measure(given, options.only)
    page = write_page(rows, notes, given)
    if options.out is None:
        print(page, end="")
    else:
        options.out.write_text(page, encoding="utf-8")
    return int(not all(row.is_within for row in rows) or any("failed" in note for note in notes))


if __name__ == "__main__":
    sys.exit(main())
