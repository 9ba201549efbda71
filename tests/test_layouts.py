"""Checkpoints of many libraries: from each layout, the features that the library which wrote it computes itself."""

import math
import re
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.layers import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from msn_eval import load_encoder, registry
from msn_eval.checkpoints import TESTED_LAYOUTS, read_tested_layouts
from msn_eval.errors import CheckpointError
from msn_eval.features.encoder import Encoder, encode

Network = TypeVar("Network", bound=nn.Module)
Weights = dict[str, Tensor]
Taps = dict[str, Tensor]
Forward = Callable[[Tensor], Taps]

EMBEDDINGS = ("cls_token", "class_token", "reg_token", "pos_embed", "patch_embed", "conv_proj", "embeddings.")
SCALES = ("weight", "gamma", "lambda1", "lambda_1", "lambda_2")
ARGS = Namespace(arch="vit", lr=3e-4, betas=(0.9, 0.95), output_dir="runs/1")
RESNET_PIXELS = 64


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A file or folder as its writer leaves it, and what is expected of it.

    forward: the source's own forward pass, (b, 3, S, S) normalised images -> features at every tap
    format:  the expected family
    key:     the network of it that is evaluated
    arch:    the expected architecture, where it is not the usual small one; "" for networks of a library's own name
    options: of load_encoder
    """

    path: Path
    forward: Forward
    format: str
    key: str | None = None
    arch: str = "vit_width192_depth2_patch8_32"
    options: dict[str, Any] = field(default_factory=dict)


# Networks with weights that are far from their initial values, and their features.


def randomize(network: Network, seed: int = 1) -> Network:
    """Draw weights that let every part of a network show in its features.

    Embeddings are small, so that the epsilon of the first norm counts, and attention is far from even.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan_in = math.prod(parameter.shape[1:]) if name.endswith("weight") else 1
            if parameter.dim() == 1 and name.endswith(SCALES):
                parameter.copy_(1 + 0.2 * noise(parameter))
            elif any(word in name for word in EMBEDDINGS):
                parameter.copy_(0.01 / math.sqrt(fan_in) * noise(parameter))
            elif name.endswith("weight"):
                parameter.copy_(1.5 / math.sqrt(fan_in) * noise(parameter))
            else:
                parameter.copy_(0.3 * noise(parameter))
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.3 * torch.rand(buffer.shape, generator=generator))
    return network.eval()


def vit(seed: int = 1, **keywords: object) -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 0}
    return randomize(VisionTransformer(**sizes | keywords), seed)


@cache
def resnet(seed: int = 1) -> nn.Module:
    """Return a network whose weights are numbers of float16, so that files may hold half the bytes."""
    return randomize(torchvision.models.resnet18(), seed).half().float()


def outputs(network: nn.Module, images: Tensor, *modules: nn.Module, **keywords: object) -> list[Tensor]:
    """Return the outputs of modules of a network, and its own, in one forward pass."""
    seen: dict[nn.Module, Any] = {}
    hooks = [
        hooked.register_forward_hook(lambda module, _, output: seen.update({module: output})) for hooked in modules
    ]
    with torch.no_grad():
        own = network(images, **keywords)
    for hook in hooks:
        hook.remove()
    return [output[0] if isinstance(output, tuple) else output for output in (*map(seen.get, modules), own)]


def token_taps(
    network: nn.Module, block: nn.Module, norm: nn.Module, images: Tensor, *, prefix: int = 1, **keywords: object
) -> Taps:
    """Return the taps of a Transformer whose norm follows its last block."""
    raw, normed, _ = outputs(network, images, block, norm, **keywords)
    mean = normed[:, prefix:].mean(1)
    return {"cls": raw[:, 0], "cls-norm": normed[:, 0], "mean": mean} if prefix else {"mean": mean}


def timm_taps(network: VisionTransformer | Beit, images: Tensor) -> Taps:
    prefix = int(network.cls_token is not None) + getattr(network, "num_reg_tokens", 0)
    if not isinstance(network.norm, nn.Identity):
        return token_taps(network, network.blocks[-1], network.norm, images, prefix=prefix)
    raw, pooled = outputs(network, images, network.blocks[-1])  # what is normed there is the average
    return {"cls": raw[:, 0], "cls-norm": network.fc_norm(raw[:, 0]).detach(), "mean": pooled}


def torchvision_taps(network: TorchvisionViT, images: Tensor) -> Taps:
    return token_taps(network, network.encoder.layers[-1], network.encoder.ln, images)


def halved(weights: Mapping[str, Tensor]) -> Weights:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


@cache
def headless(seed: int = 1) -> Weights:
    """Return the weights of a ResNet without its classifier, in float16."""
    return halved(without(resnet(seed).state_dict(), "fc."))


def rival() -> Weights:
    """Return the weights of the ResNet of a file that is not evaluated, without its large stages."""
    return without(headless(2), "layer3.", "layer4.")


def resnet_taps(network: nn.Module, images: Tensor) -> Taps:
    return {"pool": outputs(network, images, network.avgpool)[0].flatten(1)}


# Files.


def saved(folder: Path, content: object, name: str = "network.pth", **options: object) -> Path:
    path = folder / name
    torch.save(content, path, **options)
    return path


def under(prefix: str, weights: nn.Module | Mapping[str, Tensor]) -> Weights:
    """Return copies of weights, with a prefix before their names."""
    named = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return {prefix + name: tensor.clone() for name, tensor in named.items()}


def without(weights: Mapping[str, Tensor], *starts: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(starts)}


def mlp(*widths: int) -> Weights:
    return nn.Sequential(*[nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]).state_dict()


@cache
def optimizer_state() -> dict[str, Any]:
    """Return the state of an AdamW after a step."""
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def vit_layout(path: Path, network: VisionTransformer | Beit, **facts: Any) -> Layout:
    return Layout(path=path, forward=partial(timm_taps, network), **facts)


def resnet_layout(path: Path, network: nn.Module, **facts: Any) -> Layout:
    options = {"image_pixels": RESNET_PIXELS}
    return Layout(path=path, forward=partial(resnet_taps, network), arch="resnet18", options=options, **facts)


def torchvision_layout(path: Path, network: TorchvisionViT, **facts: Any) -> Layout:
    return Layout(path=path, forward=partial(torchvision_taps, network), **facts)


# MSN.


def msn_release(folder: Path) -> Layout:
    target = vit()
    content = {
        "target_encoder": under("module.", target) | under("module.fc.", {"fc1.weight": torch.ones(8, 192)}),
        "prototypes": torch.ones(16, 8),
        "epoch": 800,
    }
    return vit_layout(saved(folder, content, "vit.pth.tar"), target, format="msn", key="target_encoder")


def msn_training(folder: Path) -> Layout:
    anchor, target = vit(2), vit(1)
    head = under("module.fc.", {"fc1.weight": torch.ones(8, 192), "bn1.running_mean": torch.ones(8)})
    content = {
        "encoder": under("module.", anchor) | head,
        "opt": optimizer_state(),
        "prototypes": torch.ones(16, 8),
        "target_encoder": under("module.", target) | head,
        "epoch": 3,
        "loss": 1.5,
        "batch_size": 64,
        "world_size": 16,
        "lr": 1e-3,
        "scaler": None,
    }
    return vit_layout(saved(folder, content, "vit-latest.pth.tar"), target, format="msn", key="target_encoder")


# DINO, iBOT, DINOv2.


def dino_head() -> Weights:
    last = {"last_layer.weight_g": torch.ones(64, 1), "last_layer.weight_v": torch.ones(64, 8)}
    return under("mlp.", mlp(192, 16, 8)) | last


def dino_training(folder: Path) -> Layout:
    student, teacher = vit(2), vit(1)
    content = {
        "student": under("module.backbone.", student) | under("module.head.", dino_head()),
        "teacher": under("backbone.", teacher) | under("head.", dino_head()),
        "optimizer": optimizer_state(),
        "epoch": 100,
        "args": ARGS,
        "dino_loss": {"center": torch.zeros(1, 64)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }
    return vit_layout(saved(folder, content), teacher, format="dino", key="teacher")


def dino_backbone(folder: Path) -> Layout:
    network = vit()
    return vit_layout(saved(folder, network.state_dict()), network, format="timm")


def dino_resnet(folder: Path) -> Layout:
    content = {
        "student": under("module.backbone.", rival()) | under("module.head.", dino_head()),
        "teacher": under("backbone.", headless(1)) | under("head.", dino_head()),
        "epoch": 100,
        "args": ARGS,
        "dino_loss": {"center": torch.zeros(1, 64)},
    }
    return resnet_layout(saved(folder, content), resnet(1), format="dino", key="teacher")


def ibot_training(folder: Path) -> Layout:
    student, teacher = vit(2), vit(1)
    masked = {"backbone.masked_embed": torch.zeros(1, 192)}
    head = under("head.", dino_head() | under("mlp2.", mlp(8, 8)) | {"last_layer2.weight_g": torch.ones(64, 1)})
    content = {
        "student": under("module.", under("backbone.", student) | masked | head),
        "teacher": under("backbone.", teacher) | masked | head,
        "optimizer": optimizer_state(),
        "epoch": 100,
        "args": ARGS,
        "ibot_loss": {"center": torch.zeros(1, 64), "center2": torch.zeros(1, 1, 64)},
    }
    return vit_layout(saved(folder, content), teacher, format="ibot", key="teacher")


def ibot_teacher(folder: Path) -> Layout:
    network = vit()
    content = {"state_dict": under("", network) | {"masked_embed": torch.zeros(1, 192)}}
    return vit_layout(saved(folder, content, "checkpoint_teacher.pth"), network, format="ibot", key="state_dict")


DINOV2 = {"img_size": 518, "patch_size": 14, "init_values": 1.0}


def dinov2(folder: Path, image_pixels: int | None) -> Layout:
    network = vit(**DINOV2)
    path = saved(folder, under("", network) | {"mask_token": torch.zeros(1, 192)})
    return dinov2_layout(path, network, image_pixels, arch="vit_width192_depth2_patch14_518")


def dinov2_layout(path: Path, network: VisionTransformer, image_pixels: int | None, arch: str) -> Layout:
    evaluated = network if image_pixels == 518 else at_224(network, network.pos_embed)
    return vit_layout(path, evaluated, format="dinov2", arch=arch, options={"image_pixels": image_pixels})


def dinov2_registers(folder: Path, image_pixels: int | None) -> Layout:
    """Write registers as the authors do: positions for the class token and the patches, none for the registers."""
    network = vit(**DINOV2, reg_tokens=4, no_embed_class=True)
    weights = under("", network)
    registers, class_token, patches = (weights.pop(name) for name in ("reg_token", "cls_token", "pos_embed"))
    class_position = 0.01 * torch.randn(1, 1, 192, generator=torch.Generator().manual_seed(9))
    content = weights | {
        "cls_token": class_token - class_position,
        "pos_embed": torch.cat([class_position, patches], dim=1),
        "register_tokens": registers,
        "mask_token": torch.zeros(1, 192),
    }
    return dinov2_layout(saved(folder, content), network, image_pixels, arch="vit_width192_depth2_patch14_reg4_518")


def at_224(network: VisionTransformer, positions: Tensor) -> VisionTransformer:
    """Return the network of 224 pixels that DINOv2's authors evaluate.

    Their interpolate_pos_encoding: with registers interpolate_antialias=True and interpolate_offset=0.0, else False and 0.1.
    """
    registers = network.num_reg_tokens > 0
    prefix = positions[:, : positions.shape[1] - 37 * 37].detach()
    square = positions[:, prefix.shape[1] :].detach().reshape(1, 37, 37, 192).permute(0, 3, 1, 2)
    if registers:
        resized = F.interpolate(square, size=(16, 16), mode="bicubic", antialias=True)
    else:
        resized = F.interpolate(
            square, scale_factor=((16 + 0.1) / 37, (16 + 0.1) / 37), mode="bicubic", antialias=False
        )
    patches = resized.permute(0, 2, 3, 1).reshape(1, 256, 192)
    keywords = {"reg_tokens": 4, "no_embed_class": True} if registers else {}
    smaller = vit(**DINOV2 | {"img_size": 224}, **keywords)
    smaller.load_state_dict(network.state_dict() | {"pos_embed": torch.cat([prefix, patches], dim=1)})
    return smaller


def dinov2_swiglu(folder: Path) -> Layout:
    network = vit(
        img_size=28, patch_size=14, init_values=1.0, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=8 / 3
    )
    renamed = {
        name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): tensor
        for name, tensor in network.state_dict().items()
    }
    content = renamed | {"mask_token": torch.zeros(1, 192)}
    return vit_layout(saved(folder, content), network, format="dinov2", arch="vit_width192_depth2_patch14_28")


def dinov2_training(folder: Path) -> Layout:
    """Write a teacher in chunks of two blocks: `blocks.1.2` is the third block, behind two identities."""
    network = vit(depth=4, img_size=28, patch_size=14, init_values=1.0)
    chunked = {}
    for name, tensor in network.state_dict().items():
        word, _, rest = name.partition(".")
        chunked[f"blocks.{int(rest[0]) // 2}.{rest}" if word == "blocks" else name] = tensor
    teacher = (
        under("backbone.", chunked | {"mask_token": torch.zeros(1, 192)})
        | under("dino_head.", dino_head())
        | under("ibot_head.", dino_head())
    )
    path = saved(folder, {"teacher": teacher}, "teacher_checkpoint.pth")
    return vit_layout(path, network, format="dinov2", key="teacher", arch="vit_width192_depth4_patch14_28")


# Masked images: MAE, BEiT, I-JEPA.


def mae_pretraining(folder: Path) -> Layout:
    network = vit()
    decoder = (
        {"mask_token": torch.zeros(1, 1, 16), "decoder_pos_embed": torch.ones(1, 17, 16)}
        | under("decoder_embed.", nn.Linear(192, 16))
        | under("decoder_blocks.0.norm1.", nn.LayerNorm(16))
        | under("decoder_blocks.0.attn.qkv.", nn.Linear(16, 48))
        | under("decoder_norm.", nn.LayerNorm(16))
        | under("decoder_pred.", nn.Linear(16, 192))
    )
    content = {
        "model": under("", network) | decoder,
        "optimizer": optimizer_state(),
        "epoch": 1599,
        "scaler": {"scale": 65536.0},
        "args": ARGS,
    }
    return vit_layout(saved(folder, content), network, format="mae", key="model")


def mae_encoder(folder: Path) -> Layout:
    network = vit()
    return vit_layout(saved(folder, {"model": network.state_dict()}), network, format="timm", key="model")


def mae_finetuned(folder: Path) -> Layout:
    network = vit(global_pool="avg")
    content = {
        "model": under("", network) | under("head.", nn.Linear(192, 10)),
        "optimizer": optimizer_state(),
        "epoch": 99,
        "args": ARGS,
    }
    return vit_layout(saved(folder, content), network, format="timm", key="model")


def ijepa(folder: Path) -> Layout:
    context, target = (vit(seed, class_token=False, global_pool="avg", fc_norm=False) for seed in (2, 1))
    predictor = {"mask_token": torch.zeros(1, 1, 16), "predictor_pos_embed": torch.ones(1, 16, 16)}
    content = {
        "encoder": under("module.", context),
        "predictor": under("module.", predictor | under("predictor_blocks.0.norm1.", nn.LayerNorm(16))),
        "opt": optimizer_state(),
        "scaler": {"scale": 65536.0},
        "target_encoder": under("module.", target),
        "epoch": 300,
        "loss": 0.2,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }
    return vit_layout(saved(folder, content, "IN1K-vit.pth.tar"), target, format="ijepa", key="target_encoder")


def beit(**keywords: object) -> Beit:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 0}
    return randomize(Beit(**sizes | {"init_values": 0.1, "use_abs_pos_emb": False} | keywords))


def beit_finetuned(folder: Path) -> Layout:
    """Write unilm's classifier: a table in every block, an average that is normed, tables of indices beside them."""
    network = beit(use_rel_pos_bias=True, global_pool="avg")
    tables = {
        f"blocks.{block}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long) for block in range(2)
    }
    content = {"model": under("", network) | tables | under("head.", nn.Linear(192, 10))}
    return vit_layout(
        saved(folder, content), network, format="beit", key="model", arch="beit_width192_depth2_patch8_32"
    )


def beit_pretraining(folder: Path) -> Layout:
    """Write unilm's pre-training: one table for all blocks, mask token and prediction of visual tokens."""
    network = beit(use_shared_rel_pos_bias=True, global_pool="token", num_heads=6)
    beside = {
        "mask_token": torch.zeros(1, 1, 192),
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
    } | under("lm_head.", nn.Linear(192, 64))
    content = {"model": under("", network) | beside, "epoch": 799, "args": ARGS}
    return vit_layout(
        saved(folder, content), network, format="beit", key="model", arch="beit_width192_depth2_patch8_32_heads6"
    )


def beit_with_positions(folder: Path) -> Layout:
    network = beit(use_abs_pos_emb=True, use_rel_pos_bias=True, qkv_bias=False, global_pool="token")
    path = saved(folder, network.state_dict())
    return vit_layout(path, network, format="beit", arch="beit_width192_depth2_patch8_32")


# Contrastive and negative-free methods, most of them on residual networks.


def mocov3_vit(folder: Path) -> Layout:
    """Write the small network, which has 12 heads where others have 6."""
    base, momentum = (with_fixed_positions(vit(seed, embed_dim=384, num_heads=12)) for seed in (1, 2))
    content = {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": under("module.base_encoder.", base)
        | under("module.base_encoder.head.", mlp(384, 16, 8))
        | under("module.momentum_encoder.", momentum)
        | under("module.momentum_encoder.head.", mlp(384, 16, 8))
        | under("module.predictor.", mlp(8, 16, 8)),
        "optimizer": optimizer_state(),
        "scaler": {"scale": 65536.0},
    }
    path, arch = saved(folder, content, "vit-s-300ep.pth.tar"), "vit_width384_depth2_patch8_32_heads12"
    return vit_layout(path, base, format="mocov3", key="state_dict.base_encoder", arch=arch)


def with_fixed_positions(network: nn.Module) -> nn.Module:
    """Set MoCo v3's positions in a network: no position for the class token, sines and cosines for 4 x 4 patches."""
    width = network.embed_dim
    first, second = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    omega = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    one, other = torch.outer(first.flatten(), omega), torch.outer(second.flatten(), omega)
    patches = torch.cat([one.sin(), one.cos(), other.sin(), other.cos()], dim=1)
    network.pos_embed.data = torch.cat([torch.zeros(1, width), patches])[None]
    return network


def mocov3_linear_probe(folder: Path) -> Layout:
    """Write what is left after the linear evaluation: nothing but the fixed positions tells whose network it is."""
    network = with_fixed_positions(vit(embed_dim=384, num_heads=12))
    content = {
        "epoch": 90,
        "arch": "vit_small",
        "state_dict": under("module.", network) | under("module.head.", mlp(384, 9, 8)),
    }
    path = saved(folder, content, "linear-vit-s-300ep.pth.tar")
    return vit_layout(path, network, format="mocov3", key="state_dict", arch="vit_width384_depth2_patch8_32_heads12")


def solo_learn_mocov3(folder: Path) -> Layout:
    layout = solo_learn(folder, lambda seed: with_fixed_positions(vit(seed, num_heads=12)), vit_layout)
    return replace(layout, arch="vit_width192_depth2_patch8_32_heads12")


def mocov3_resnet(folder: Path) -> Layout:
    base, momentum = headless(), rival()
    content = {
        "epoch": 100,
        "arch": "resnet18",
        "state_dict": under("module.base_encoder.", base)
        | under("module.base_encoder.fc.", mlp(512, 16, 8))
        | under("module.momentum_encoder.", momentum)
        | under("module.momentum_encoder.fc.", mlp(512, 16, 8))
        | under("module.predictor.", mlp(8, 16, 8)),
    }
    path = saved(folder, content, "r-18-100ep.pth.tar")
    return resnet_layout(path, resnet(1), format="mocov3", key="state_dict.base_encoder")


def mocov2(folder: Path) -> Layout:
    query, key = headless(), rival()
    content = {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": under("module.encoder_q.", query)
        | under("module.encoder_q.fc.", mlp(512, 16, 8))
        | under("module.encoder_k.", key)
        | under("module.encoder_k.fc.", mlp(512, 16, 8))
        | {"module.queue": torch.ones(8, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.long)},
        "optimizer": optimizer_state(),
    }
    return resnet_layout(saved(folder, content, "moco.pth.tar"), resnet(1), format="moco", key="state_dict.encoder_q")


def simsiam(folder: Path) -> Layout:
    network = headless()
    content = {
        "epoch": 100,
        "arch": "resnet18",
        "state_dict": under("module.encoder.", network)
        | under("module.encoder.fc.", mlp(512, 16, 8))
        | under("module.predictor.", mlp(8, 4, 8)),
        "optimizer": optimizer_state(),
        "best_acc1": torch.tensor(0.0),
    }
    return resnet_layout(saved(folder, content, "simsiam.pth.tar"), resnet(), format="simsiam", key="state_dict")


def swav(folder: Path) -> Layout:
    heads = under("projection_head.", mlp(512, 16, 8)) | {"prototypes.weight": torch.ones(32, 8)}
    content = under("module.", headless() | heads)
    return resnet_layout(saved(folder, content, "swav.pth.tar"), resnet(), format="swav")


def bare_resnet(folder: Path) -> Layout:
    """Write what Barlow Twins and VICReg released: torchvision's names without the classifier."""
    return resnet_layout(saved(folder, headless()), resnet(), format="torchvision")


def barlow_twins_training(folder: Path) -> Layout:
    heads = under("module.projector.", mlp(512, 16, 8)) | under("module.bn.", nn.BatchNorm1d(8, affine=False))
    content = {
        "epoch": 1000,
        "model": under("module.backbone.", headless()) | heads,
        "optimizer": optimizer_state(),
    }
    return resnet_layout(saved(folder, content), resnet(), format="torchvision", key="model")


def vicreg_training(folder: Path) -> Layout:
    backbone = under("module.backbone.", headless())
    content = {"epoch": 1000, "model": backbone | under("module.projector.", mlp(512, 16, 8)), "optimizer": {}}
    return resnet_layout(saved(folder, content, "resnet18_fullckp.pth"), resnet(), format="torchvision", key="model")


# Libraries.


def solo_learn(
    folder: Path,
    network: Callable[[int], nn.Module],
    layout: Callable[..., Layout],
    store: Callable[[Mapping[str, Tensor]], Weights] = dict,
) -> Layout:
    chosen, momentum = network(1), network(2)
    content = {
        "epoch": 399,
        "global_step": 1000,
        "pytorch-lightning_version": "1.8.6",
        "state_dict": under("backbone.", store(without(chosen.state_dict(), "fc.")))
        | under("momentum_backbone.", store(without(momentum.state_dict(), "fc.")))
        | under("classifier.", nn.Linear(192, 10))
        | under("momentum_classifier.", nn.Linear(192, 10))
        | under("projector.", mlp(192, 16, 8))
        | under("momentum_projector.", mlp(192, 16, 8)),
        "optimizer_states": [optimizer_state()],
        "hyper_parameters": {"method": "byol", "backbone": {"name": "vit_tiny"}},
    }
    return layout(saved(folder, content, "solo.ckpt"), chosen, format="solo-learn", key="state_dict.backbone")


def lightly(name: str) -> ModuleType:
    return pytest.importorskip(
        f"lightly.models.modules.{name}", reason="lightly is no dependency; install it for its files"
    )


def lightly_transformer(folder: Path) -> Layout:
    backbone = randomize(lightly("masked_vision_transformer_timm").MaskedVisionTransformerTIMM(vit=vit()))
    content = {"state_dict": under("backbone.", backbone) | under("projection_head.layers.", mlp(192, 16, 8))}
    return vit_layout(saved(folder, content, "mae.ckpt"), backbone.vit, format="lightly", key="state_dict")


def lightly_torchvision(folder: Path) -> Layout:
    network = torchvision_vit()
    backbone = randomize(
        lightly("masked_vision_transformer_torchvision").MaskedVisionTransformerTorchvision(vit=network)
    )
    content = {"state_dict": under("backbone.", backbone), "pytorch-lightning_version": "2.6.0"}
    return torchvision_layout(saved(folder, content, "dino.ckpt"), network, format="lightly", key="state_dict")


class LightlyMSN(nn.Module):
    """The module of lightly's own example of MSN, at the size of a test."""

    def __init__(self) -> None:
        super().__init__()
        transformers = lightly("masked_vision_transformer_torchvision")
        self.backbone = transformers.MaskedVisionTransformerTorchvision(vit=torchvision_vit())
        self.projection_head = lightly("heads").MSNProjectionHead(192, 16, 8)
        self.anchor_backbone = deepcopy(self.backbone)
        self.anchor_projection_head = deepcopy(self.projection_head)
        self.prototypes = nn.Parameter(torch.ones(32, 8))


def lightly_msn(folder: Path) -> Layout:
    network = randomize(LightlyMSN())
    path = saved(folder, {"state_dict": network.state_dict()}, "msn.ckpt")
    return torchvision_layout(path, network.backbone.vit, format="lightly", key="state_dict.backbone.vit")


def lightly_resnet(folder: Path) -> Layout:
    """Write `nn.Sequential(*list(resnet.children())[:-1])`, the backbone of lightly's examples."""
    heads = lightly("heads").SimSiamProjectionHead(512, 16, 8)
    backbone = nn.Sequential(*list(resnet().children())[:-1])
    content = {"state_dict": under("backbone.", halved(backbone.state_dict())) | under("projection_head.", heads)}
    return resnet_layout(saved(folder, content, "simsiam.ckpt"), resnet(), format="lightly", key="state_dict")


def lightning(folder: Path) -> Layout:
    """Let Lightning's Trainer make a step and write its own file, with hyper-parameters from a command line."""
    reason = "pytorch_lightning is no dependency; install it to test its files"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("pytorch_lightning", reason=reason)

        class Classifier(lightning.LightningModule):
            def __init__(self, arguments: Namespace) -> None:
                super().__init__()
                self.save_hyperparameters(arguments)
                self.backbone = vit()
                self.head = nn.Linear(192, 2)

            def training_step(self, batch: list[Tensor], _: int) -> Tensor:
                return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=1e-3)

        network = Classifier(ARGS)
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 0, 1]))
        trainer = lightning.Trainer(
            max_steps=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(network, torch.utils.data.DataLoader(data, batch_size=4))
        trainer.save_checkpoint(folder / "last.ckpt")
    return vit_layout(folder / "last.ckpt", network.backbone.eval(), format="timm", key="state_dict")


def compiled(network: nn.Module) -> nn.Module:
    """Wrap a network as torch.compile does, without loading its compilers."""
    return torch.compile(network, backend="eager")


def wrapped(folder: Path, wrap: Callable[[nn.Module], nn.Module], key: str | None = "model") -> Layout:
    """Write the names of a training tool: as the state dict itself, or under a key beside the optimizer."""
    network = vit()
    weights = wrap(network).state_dict()
    content = {key: weights, "optimizer": optimizer_state()} if key else weights
    return vit_layout(saved(folder, content), network, format="timm", key=key)


def fully_sharded(folder: Path) -> Layout:
    """Write FSDP's names, with checkpointed blocks: a wrapper around the network and one around every block."""
    network = vit()
    content = {}
    for name, tensor in network.state_dict().items():
        words = name.split(".")
        if words[0] == "blocks":
            words[2:2] = ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
        content[".".join(["_fsdp_wrapped_module", *words])] = tensor
    return vit_layout(saved(folder, {"model": content}), network, format="timm", key="model")


def timm_safetensors(folder: Path) -> Layout:
    network = vit(num_classes=10)
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    network.reset_classifier(0)
    return vit_layout(folder / "model.safetensors", network, format="timm")


def timm_old_container(folder: Path) -> Layout:
    network = vit()
    path = saved(folder, network.state_dict(), _use_new_zipfile_serialization=False)
    return vit_layout(path, network, format="timm")


def timm_lower_precision(folder: Path, dtype: torch.dtype) -> Layout:
    network = vit().to(dtype)
    return vit_layout(saved(folder, under("", network)), network.float(), format="timm")


def timm_folder(folder: Path) -> Layout:
    """Let timm write a folder for the hub; the heads, which no weight shows, are in its config.json."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4}
    network = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes))
    timm.models.save_for_hf(network, folder, model_args=sizes, safe_serialization=True)
    network.reset_classifier(0)
    return vit_layout(folder, network, format="timm", arch="vit_tiny_patch16_224")


def timm_resnet_folder(folder: Path) -> Layout:
    network = randomize(timm.create_model("resnet18", num_classes=5)).half()
    timm.models.save_for_hf(network, folder, safe_serialization=False)
    network.float().reset_classifier(0)
    layout = resnet_layout(folder, network, format="torchvision")
    return replace(layout, forward=lambda images: {"pool": outputs(network, images)[0]})


def torchvision_vit(seed: int = 1) -> TorchvisionViT:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return randomize(TorchvisionViT(**sizes), seed)


def torchvision_transformer(folder: Path) -> Layout:
    network = torchvision_vit()
    return torchvision_layout(saved(folder, network.state_dict()), network, format="torchvision")


def torchvision_resnet(folder: Path) -> Layout:
    return resnet_layout(saved(folder, resnet().state_dict()), resnet(), format="torchvision")


def torchvision_resnet50(folder: Path) -> Layout:
    network = randomize(torchvision.models.resnet50()).half()  # half the bytes to write and read
    path = saved(folder, network.state_dict())
    return replace(resnet_layout(path, network.float(), format="torchvision"), arch="resnet50")


# Hugging Face: folders by save_pretrained, whose config.json states heads and epsilon, and files alone, whose width must do.

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
ALONE = TINY | {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
SIZE_28 = {"image_size": 28, "patch_size": 14, "intermediate_size": None}
BEIT = {"layer_scale_init_value": 0.1}
MAE_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "mask_ratio": 0.0,
}
PATCHES_IN_ORDER = torch.arange(16.0).repeat(2, 1)  # the noise by which MAE would shuffle them
WIDTH_48 = "vit_width48_depth2"
TINY_ARCH = f"{WIDTH_48}_patch8_32_heads4"
EXACT_ARCH = f"{TINY_ARCH}_eps1e-12"  # transformers' usual epsilon


def huggingface(name: str, config: Mapping[str, object]) -> Any:
    """Build a transformers model by its name, from a configuration's."""
    import transformers

    described = re.sub("(Model|ForImageClassification|ForPreTraining)$", "Config", name)
    return randomize(getattr(transformers, name)(getattr(transformers, described)(**config)))


def run_backbone(network: Any, images: Tensor, **keywords: object) -> Any:
    """Return the output of a model without its head."""
    with torch.no_grad():
        return getattr(network, network.base_model_prefix, network)(images, output_hidden_states=True, **keywords)


def huggingface_taps(network: Any, images: Tensor, *, prefix: int = 1, **keywords: object) -> Taps:
    """Return the taps by transformers: hidden_states end before the last norm, last_hidden_state follows it."""
    output = run_backbone(network, images, **keywords)
    mean = output.last_hidden_state[:, prefix:].mean(1)
    if not prefix:
        return {"mean": mean}
    return {"cls": output.hidden_states[-1][:, 0], "cls-norm": output.last_hidden_state[:, 0], "mean": mean}


def pooled_taps(network: Any, images: Tensor) -> Taps:
    """Return the taps of BEiT's family, whose pooler norms the average of the patches, without another norm."""
    output = run_backbone(network, images)
    return {"cls": output.hidden_states[-1][:, 0], "mean": output.pooler_output}


def huggingface_folder(
    folder: Path,
    name: str,
    config: Mapping[str, object],
    arch: str = TINY_ARCH,
    taps: Callable[..., Taps] = huggingface_taps,
    **keywords: object,
) -> Layout:
    network = huggingface(name, config)
    network.save_pretrained(folder)
    return Layout(path=folder, forward=partial(taps, network, **keywords), format="huggingface", arch=arch)


def hub(
    name: str, config: Mapping[str, object] = MappingProxyType({}), arch: str = TINY_ARCH, **how: object
) -> Callable[[Path], Layout]:
    """Return the writer of a folder of a tiny model with unusual settings."""
    return partial(huggingface_folder, name=name, config={**TINY, **config}, arch=arch, **how)


def msn_folder(folder: Path, save: Callable[[Any, Path], object]) -> Layout:
    network = huggingface("ViTMSNModel", TINY)
    save(network, folder)
    forward = partial(huggingface_taps, network.float())
    return Layout(path=folder, forward=forward, format="huggingface", arch=TINY_ARCH)


def save_shards(network: Any, folder: Path) -> None:
    network.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def save_pickle(network: Any, folder: Path) -> None:
    network.config.save_pretrained(folder)
    saved(folder, network.state_dict(), "pytorch_model.bin")


def huggingface_file(
    folder: Path,
    name: str,
    arch: str = Layout.arch,
    *,
    config: Mapping[str, object] = MappingProxyType({}),
    taps: Callable[..., Taps] = huggingface_taps,
    older: bool = False,
    **keywords: object,
) -> Layout:
    """Write a file alone: by the names before version 5, as save_pretrained does, or by those that a model has in memory."""
    network = huggingface(name, {**ALONE, **config})
    path = folder / "network.safetensors"
    if older:
        network.save_pretrained(folder / "all")
        (folder / "all" / "model.safetensors").rename(path)
        assert any("attention.attention.query" in name for name in safetensors.torch.load_file(path))
    else:
        safetensors.torch.save_file(network.state_dict(), path)
    return Layout(path=path, forward=partial(taps, network, **keywords), format="huggingface", arch=arch)


# Hugging Face: networks that transformers itself runs.

CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32, "patch_size": 4}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "num_hidden_layers": 1, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BOTH = {"text_config": TEXT, "vision_config": TINY, "projection_dim": 16}
Tower = Callable[[Any, Tensor], Taps]


def normed(block: str, norm: str, prefix: int = 1) -> Tower:
    """Return the reader of a tower whose norm is its last layer."""

    def read(tower: Any, images: Tensor) -> Taps:
        return token_taps(tower, tower.get_submodule(block), tower.get_submodule(norm), images, prefix=prefix)

    return read


def clip_taps(tower: Any, images: Tensor) -> Taps:
    """Return the taps of CLIP, which norms its class token alone."""
    with torch.no_grad():
        output = tower(images)
        raw, norm = output.last_hidden_state, tower.post_layernorm
        return {"cls": raw[:, 0], "cls-norm": output.pooler_output, "mean": norm(raw[:, 1:]).mean(1)}


def outer_norm_taps(network: Any, images: Tensor) -> Taps:
    """Return the taps of BEiT's pre-training, whose last norm is beside the tower."""
    with torch.no_grad():
        raw = network.beit(images).last_hidden_state
        tokens = network.layernorm(raw)
        return {"cls": raw[:, 0], "cls-norm": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}


def library_pool(*taps: str) -> Tower:
    """Return the reader of a tower that pools by itself."""

    def read(tower: Any, images: Tensor) -> Taps:
        with torch.no_grad():
            pooled = tower(images).pooler_output.flatten(1)
        return dict.fromkeys(taps, pooled)

    return read


def map_mean(tower: Any, images: Tensor) -> Taps:
    with torch.no_grad():
        return {"pool": tower(images).last_hidden_state.mean(dim=(2, 3))}


def naflex_taps(tower: Any, images: Tensor) -> Taps:
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    patches = torch.stack([convert_image_to_patches(image, 8) for image in images])
    shapes, mask = torch.full((len(images), 2), 4), torch.ones(patches.shape[:2], dtype=torch.int32)
    with torch.no_grad():
        return {"out": tower(patches, mask, shapes).pooler_output}


def plain_mean(tower: Any, images: Tensor) -> Taps:
    with torch.no_grad():
        return {"mean": tower(images).last_hidden_state.mean(1)}


def save_declared(network: Any, folder: Path) -> None:
    """Write the old container beside a config that names the class, as save_pretrained does."""
    network.config.architectures = [type(network).__name__]
    save_pickle(network, folder)


def hub_tower(
    folder: Path,
    name: str,
    config: Mapping[str, object],
    taps: Tower,
    part: str = "",
    save: Callable[[Any, Path], object] = lambda network, folder: network.save_pretrained(folder),
) -> Layout:
    """Write a folder by save_pretrained. `part` is the name of the tower within the model."""
    import transformers

    described = re.sub(
        "(Vision)?(Model|For)(WithProjection|.*Classification.*|PreTraining|.*Modeling)?$", r"\1Config", name
    )
    network = randomize(getattr(transformers, name)(getattr(transformers, described)(**config)))
    save(network, folder)
    return Layout(path=folder, forward=partial(taps, network.get_submodule(part)), format="huggingface", arch="")


DINOV3 = {**TINY, "num_register_tokens": 4}
DINOV3_TAPS = normed("model.layer.1", "norm", 5)
TOWERS: dict[str, Callable[[Path], Layout]] = {
    name: partial(hub_tower, name=model, config=config, taps=taps, **how)
    for name, model, config, taps, how in (
        ("DINOv3 ViT", "DINOv3ViTModel", DINOV3, DINOV3_TAPS, {}),
        ("DINOv3 ViT without registers", "DINOv3ViTModel", TINY, normed("model.layer.1", "norm"), {}),
        ("DINOv3 ViT, gated", "DINOv3ViTModel", {**DINOV3, "use_gated_mlp": True}, DINOV3_TAPS, {}),
        ("DINOv3 ViT, shards", "DINOv3ViTModel", DINOV3, DINOV3_TAPS, {"save": save_shards}),
        ("DINOv3 ViT, pickle", "DINOv3ViTModel", DINOV3, DINOV3_TAPS, {"save": lambda n, f: save_declared(n, f)}),
        ("DINOv3 ConvNeXt", "DINOv3ConvNextModel", CONV, library_pool("pool"), {}),
        ("SigLIP", "SiglipModel", BOTH, library_pool("out"), {"part": "vision_model"}),
        ("SigLIP vision tower", "SiglipVisionModel", TINY, library_pool("out"), {}),
        ("SigLIP classifier", "SiglipForImageClassification", BOTH, library_pool("out"), {"part": "vision_model"}),
        ("SigLIP without its head", "SiglipVisionModel", {**TINY, "vision_use_head": False}, plain_mean, {}),
        (
            "SigLIP 2 NaFlex",
            "Siglip2Model",
            BOTH | {"vision_config": {**TINY, "num_patches": 16}},
            naflex_taps,
            {"part": "vision_model"},
        ),
        ("SigLIP 2 NaFlex vision tower", "Siglip2VisionModel", {**TINY, "num_patches": 16}, naflex_taps, {}),
        ("CLIP", "CLIPModel", BOTH, clip_taps, {"part": "vision_model"}),
        ("CLIP vision tower", "CLIPVisionModel", TINY, clip_taps, {}),
        (
            "CLIP vision tower with projection",
            "CLIPVisionModelWithProjection",
            TINY,
            clip_taps,
            {"part": "vision_model"},
        ),
        ("CLIP classifier", "CLIPForImageClassification", BOTH, clip_taps, {"part": "vision_model"}),
        ("CLIP with GELU", "CLIPVisionModel", {**TINY, "hidden_act": "gelu"}, clip_taps, {}),
        ("MetaCLIP 2", "MetaClip2Model", BOTH, clip_taps, {"part": "vision_model"}),
        ("AltCLIP", "AltCLIPModel", BOTH, clip_taps, {"part": "vision_model"}),
        ("Chinese CLIP", "ChineseCLIPModel", BOTH, clip_taps, {"part": "vision_model"}),
        ("Chinese CLIP vision tower", "ChineseCLIPVisionModel", TINY, clip_taps, {}),
        ("MLCD", "MLCDVisionModel", {**TINY, "num_key_value_groups": 1}, clip_taps, {}),
        ("AIMv2 vision tower", "Aimv2VisionModel", TINY, library_pool("out"), {}),
        ("Pixio", "PixioModel", TINY, library_pool("out"), {}),
        ("TIPSv2", "Tipsv2VisionModel", TINY, normed("encoder.layer.1", "layernorm", 2), {}),
        ("BEiT", "BeitModel", {**TINY, **BEIT, "use_relative_position_bias": True}, pooled_taps, {}),
        (
            "BEiT with positions",
            "BeitModel",
            {**TINY, **BEIT, "use_absolute_position_embeddings": True},
            pooled_taps,
            {},
        ),
        ("BEiT classifier", "BeitForImageClassification", {**TINY, **BEIT}, pooled_taps, {"part": "beit"}),
        (
            "BEiT with a shared table",
            "BeitModel",
            {**TINY, **BEIT, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
            normed("layers.1", "layernorm"),
            {},
        ),
        (
            "data2vec classifier",
            "Data2VecVisionForImageClassification",
            {**TINY, **BEIT, "use_relative_position_bias": True, "use_mean_pooling": True},
            pooled_taps,
            {"part": "data2vec_vision"},
        ),
        (
            "BEiT pre-training",
            "BeitForMaskedImageModeling",
            {**TINY, **BEIT, "use_mask_token": True, "vocab_size": 9},
            outer_norm_taps,
            {},
        ),
        ("DeiT", "DeiTModel", TINY, normed("layers.1", "layernorm", 2), {}),
        (
            "DeiT distilled classifier",
            "DeiTForImageClassificationWithTeacher",
            TINY,
            normed("layers.1", "layernorm", 2),
            {"part": "deit"},
        ),
        ("ConvNeXt", "ConvNextModel", CONV, library_pool("pool"), {}),
        ("ConvNeXt classifier", "ConvNextForImageClassification", CONV, library_pool("pool"), {"part": "convnext"}),
        ("ConvNeXt V2", "ConvNextV2Model", CONV, library_pool("pool"), {}),
        ("Swin", "SwinModel", SWIN, library_pool("mean", "pool"), {}),
        ("Swin classifier", "SwinForImageClassification", SWIN, library_pool("mean", "pool"), {"part": "swin"}),
        ("Swin V2", "Swinv2Model", SWIN, library_pool("mean", "pool"), {}),
        (
            "Hiera",
            "HieraModel",
            {"embed_dim": 16, "image_size": [64, 64], "depths": [1] * 4, "num_heads": [1] * 4, "num_layers": 4},
            library_pool("mean", "pool"),
            {},
        ),
        (
            "FocalNet",
            "FocalNetModel",
            {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "image_size": 32},
            library_pool("mean", "pool"),
            {},
        ),
        (
            "ResNet",
            "ResNetModel",
            {"image_size": 64, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
            library_pool("pool"),
            {},
        ),
        (
            "RegNet",
            "RegNetModel",
            {"image_size": 64, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
            library_pool("pool"),
            {},
        ),
        (
            "BiT",
            "BitModel",
            {"image_size": 64, "embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4},
            library_pool("pool"),
            {},
        ),
        (
            "PoolFormer",
            "PoolFormerModel",
            {"image_size": 64, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4},
            map_mean,
            {},
        ),
        (
            "SegFormer",
            "SegformerModel",
            {"image_size": 64, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4},
            map_mean,
            {},
        ),
        (
            "PVT v2",
            "PvtV2Model",
            {"image_size": 64, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4},
            map_mean,
            {},
        ),
    )
}

# timm: names that its own filters convert, and architectures beside its Vision Transformers.

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
NO_PATCH = {name: value for name, value in SIZES.items() if name != "patch_size"}


def timm_file(
    folder: Path,
    name: str,
    keywords: Mapping[str, object],
    taps: Callable[..., Taps],
    rename: Callable[[Weights], Weights] = dict,
) -> Layout:
    """Write a state dict under a publisher's names, which is read with --arch."""
    network = randomize(timm.create_model(name.partition(".")[0], num_classes=0, **keywords))
    path = saved(folder, {"model": rename(network.state_dict())})
    text = "&".join(f"{key}={value}" for key, value in keywords.items()).replace(" ", "")
    options = {"arch": f"{name}?{text}" if text else name}
    return Layout(path=path, forward=partial(taps, network), format="timm", key="model", arch="", options=options)


def last_tokens(prefix: int, network: nn.Module, images: Tensor) -> Taps:
    """Return the taps of a Transformer of timm whose norm is its last layer."""
    raw, tokens = [], None
    with torch.no_grad(), network.norm.register_forward_pre_hook(lambda module, given: raw.append(given[0])):
        tokens = network.forward_features(images)
    if not prefix:
        return {"mean": tokens.flatten(1, -2).mean(1), "pool": tokens.flatten(1, -2).mean(1)}
    return {"cls": raw[0][:, 0], "cls-norm": tokens[:, 0], "mean": tokens[:, prefix:].mean(1)}


def own_pool(tap: str, network: nn.Module, images: Tensor) -> Taps:
    with torch.no_grad():
        return {tap: network(images)}


def eva_taps(network: nn.Module, images: Tensor) -> Taps:
    with torch.no_grad():
        raw = network.forward_features(images)
        return {"cls": raw[:, 0], "cls-norm": network.fc_norm(raw[:, 0]), "mean": network(images)}


def openai_names(weights: Weights) -> Weights:
    """Return OpenAI's names: the image tower beside the text tower."""
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in (
            ("norm_pre", "ln_pre"),
            ("patch_embed.proj", "conv1"),
            ("pos_embed", "positional_embedding"),
            ("cls_token", "class_embedding"),
            ("attn.qkv.", "attn.in_proj_"),
            ("attn.proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            (".norm", ".ln_"),
            ("blocks.", "transformer.resblocks."),
        ):
            name = name.replace(ours, theirs)
        name = re.sub("^norm", "ln_post", name)
        outer = {"class_embedding": lambda t: t[0, 0], "positional_embedding": lambda t: t[0]}
        renamed[f"visual.{name}"] = outer.get(name, lambda t: t)(tensor).clone()
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(16), "token_embedding.weight": torch.ones(9, 16)}
    return renamed | text | {"visual.proj": torch.ones(64, 16), "logit_scale": torch.ones([])}


def microsoft_names(weights: Weights) -> Weights:
    """Return Swin's original names: a stage ends with its downsampling, and tables and masks are stored."""
    renamed = {name.replace("layers.1.downsample", "layers.0.downsample"): tensor for name, tensor in weights.items()}
    computed = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)}
    return (
        renamed | computed | {"layers.0.blocks.1.attn_mask": torch.ones(4, 16, 16)} | under("head.", nn.Linear(32, 3))
    )


def meta_names(weights: Weights) -> Weights:
    """Return DINOv3's original names, with its biases of zero."""
    renamed = {
        re.sub(r"gamma_(\d)", r"ls\1.gamma", name).replace("reg_token", "storage_tokens"): tensor
        for name, tensor in weights.items()
    }
    for name in [name for name in renamed if name.endswith("qkv.weight")]:
        renamed[name.replace("weight", "bias")] = torch.zeros(len(renamed[name]))
        renamed[name.replace("weight", "bias_mask")] = torch.zeros(len(renamed[name]))
    return renamed | {"mask_token": torch.ones(1, 64), "rope_embed.periods": torch.ones(4)}


CLIP_ARCH, DINOV3_ARCH = "vit_base_patch32_clip_quickgelu_224.openai", "vit_small_patch16_dinov3.lvd1689m"
SWIN_KEYS = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
TIMM_NAMES: dict[str, Callable[[Path], Layout]] = {
    label: partial(timm_file, name=name, keywords=keywords, taps=taps, **how)
    for label, name, keywords, taps, how in (
        ("CLIP, OpenAI's names", CLIP_ARCH, SIZES, partial(last_tokens, 1), {"rename": openai_names}),
        ("CLIP", CLIP_ARCH, SIZES, partial(last_tokens, 1), {}),
        (
            "CLIP, open_clip's names",
            "vit_base_patch16_siglip_224.webli",
            SIZES,
            partial(own_pool, "out"),
            {"rename": lambda weights: under("visual.trunk.", weights) | {"text.ln.weight": torch.ones(3)}},
        ),
        ("SigLIP", "vit_base_patch16_siglip_224.webli", SIZES, partial(own_pool, "out"), {}),
        (
            "Swin, Microsoft's names",
            "swin_tiny_patch4_window7_224.ms_in1k",
            SWIN_KEYS,
            partial(last_tokens, 0),
            {"rename": microsoft_names},
        ),
        ("Swin V2", "swinv2_tiny_window8_256", SWIN_KEYS, partial(last_tokens, 0), {}),
        ("DINOv3, Meta's names", DINOV3_ARCH, NO_PATCH, partial(last_tokens, 5), {"rename": meta_names}),
        ("DINOv3", DINOV3_ARCH, NO_PATCH, partial(last_tokens, 5), {}),
        ("CaiT", "cait_xxs24_224", NO_PATCH, partial(last_tokens, 1), {}),
        ("XCiT", "xcit_nano_12_p16_224", NO_PATCH, partial(last_tokens, 1), {}),
        ("ConViT", "convit_tiny", NO_PATCH, partial(last_tokens, 1), {}),
        ("DeiT distilled", "deit_tiny_distilled_patch16_224", SIZES, partial(last_tokens, 2), {}),
        ("EVA-02", "eva02_tiny_patch14_224", SIZES, eva_taps, {}),
        ("ConvNeXt", "convnext_atto", {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}, partial(own_pool, "pool"), {}),
        ("RegNet", "regnetx_002", {}, partial(own_pool, "pool"), {}),
        ("MobileNet V3", "mobilenetv3_small_050", {}, partial(own_pool, "pool"), {}),
    )
}


LAYOUTS: dict[str, Callable[[Path], Layout]] = {
    "MSN release": msn_release,
    "MSN training": msn_training,
    "DINO training": dino_training,
    "DINO backbone": dino_backbone,
    "DINO ResNet": dino_resnet,
    "iBOT training": ibot_training,
    "iBOT teacher": ibot_teacher,
    "DINOv2 at its native 518": partial(dinov2, image_pixels=518),
    "DINOv2 at 224": partial(dinov2, image_pixels=None),
    "DINOv2 with registers at 518": partial(dinov2_registers, image_pixels=518),
    "DINOv2 with registers at 224": partial(dinov2_registers, image_pixels=None),
    "DINOv2 SwiGLU": dinov2_swiglu,
    "DINOv2 training": dinov2_training,
    "MAE pre-training": mae_pretraining,
    "MAE encoder": mae_encoder,
    "MAE fine-tuned": mae_finetuned,
    "I-JEPA": ijepa,
    "BEiT fine-tuned": beit_finetuned,
    "BEiT pre-training": beit_pretraining,
    "BEiT with positions": beit_with_positions,
    "MoCo v3 ViT": mocov3_vit,
    "MoCo v3 linear probe": mocov3_linear_probe,
    "MoCo v3 ResNet": mocov3_resnet,
    "solo-learn MoCo v3": solo_learn_mocov3,
    "MoCo v2": mocov2,
    "SimSiam": simsiam,
    "SwAV": swav,
    "Barlow Twins, VICReg backbone": bare_resnet,
    "Barlow Twins training": barlow_twins_training,
    "VICReg training": vicreg_training,
    "solo-learn ViT": partial(solo_learn, network=vit, layout=vit_layout),
    "solo-learn ResNet": partial(solo_learn, network=resnet, layout=resnet_layout, store=halved),
    "lightly timm ViT": lightly_transformer,
    "lightly torchvision ViT": lightly_torchvision,
    "lightly MSN": lightly_msn,
    "lightly ResNet": lightly_resnet,
    "Lightning": lightning,
    "torch.compile": partial(wrapped, wrap=compiled, key=None),
    "DataParallel": partial(wrapped, wrap=nn.DataParallel),
    "DataParallel of torch.compile": partial(wrapped, wrap=lambda network: nn.DataParallel(compiled(network))),
    "FSDP": fully_sharded,
    "AveragedModel": partial(wrapped, wrap=torch.optim.swa_utils.AveragedModel, key="model_ema"),
    "timm safetensors": timm_safetensors,
    "timm in torch's old container": timm_old_container,
    "timm in float16": partial(timm_lower_precision, dtype=torch.float16),
    "timm in bfloat16": partial(timm_lower_precision, dtype=torch.bfloat16),
    "timm folder": timm_folder,
    "timm ResNet folder": timm_resnet_folder,
    "torchvision ViT": torchvision_transformer,
    "torchvision ResNet-18": torchvision_resnet,
    "torchvision ResNet-50": torchvision_resnet50,
    "HF ViTMSN": hub("ViTMSNModel"),
    "HF ViTMSN classifier": hub("ViTMSNForImageClassification"),
    "HF ViTMSN of another epsilon": hub("ViTMSNModel", {"layer_norm_eps": 1e-5}, f"{TINY_ARCH}_eps1e-05"),
    "HF ViT": hub("ViTModel", arch=EXACT_ARCH),
    "HF ViT without biases": hub("ViTModel", {"qkv_bias": False}, EXACT_ARCH),
    "HF ViT classifier": hub("ViTForImageClassification", arch=EXACT_ARCH),
    "HF DINOv2": hub("Dinov2Model", SIZE_28, f"{WIDTH_48}_patch14_28_heads4"),
    "HF DINOv2 SwiGLU": hub("Dinov2Model", SIZE_28 | {"use_swiglu_ffn": True}, f"{WIDTH_48}_patch14_28_heads4"),
    "HF DINOv2 with registers": hub(
        "Dinov2WithRegistersModel", SIZE_28, f"{WIDTH_48}_patch14_reg4_28_heads4", prefix=5
    ),
    "HF DINOv2 with registers at 224": hub(
        "Dinov2WithRegistersModel", SIZE_28 | {"image_size": 518}, f"{WIDTH_48}_patch14_reg4_518_heads4", prefix=5
    ),
    "HF MAE": hub("ViTMAEForPreTraining", MAE_DECODER, EXACT_ARCH, noise=PATCHES_IN_ORDER),
    "HF I-JEPA": hub("IJepaModel", arch=EXACT_ARCH, prefix=0),
    "HF shards": partial(msn_folder, save=save_shards),
    "HF pickle": partial(msn_folder, save=save_pickle),
    "HF float16": partial(msn_folder, save=lambda network, folder: network.half().save_pretrained(folder)),
    "HF ViTMSN file, older names": partial(huggingface_file, name="ViTMSNModel", older=True),
    "HF ViTMSN file": partial(huggingface_file, name="ViTMSNModel"),
    "HF ViTMSN classifier file, older names": partial(
        huggingface_file, name="ViTMSNForImageClassification", older=True
    ),
    "HF ViTMSN classifier file": partial(huggingface_file, name="ViTMSNForImageClassification"),
    "HF ViT file": partial(huggingface_file, name="ViTModel", arch=f"{Layout.arch}_eps1e-12"),
    "HF DINOv2 SwiGLU file": partial(
        huggingface_file,
        name="Dinov2Model",
        config=SIZE_28 | {"use_swiglu_ffn": True},
        arch="vit_width192_depth2_patch14_28",
    ),
    "HF MAE file": partial(
        huggingface_file,
        name="ViTMAEForPreTraining",
        config=MAE_DECODER,
        arch=f"{Layout.arch}_eps1e-12",
        noise=PATCHES_IN_ORDER,
    ),
    "HF I-JEPA file": partial(huggingface_file, name="IJepaModel", arch=f"{Layout.arch}_eps1e-12", prefix=0),
    "HF BEiT file": partial(
        huggingface_file,
        name="BeitModel",
        config=BEIT | {"use_relative_position_bias": True, "num_attention_heads": 6},
        arch="beit_width192_depth2_patch8_32_heads6_eps1e-12",
        taps=pooled_taps,
    ),
    **{f"HF {name}": writer for name, writer in TOWERS.items()},
    **{f"timm {name}": writer for name, writer in TIMM_NAMES.items()},
}


# The table that `msn-eval ls checkpoints --tested` prints and docs/checkpoints.md shows. To write it anew: make layouts.

DOCUMENT = Path(__file__).parents[1] / "docs" / "checkpoints.md"
START, END = "<!-- tested layouts: written by `make layouts` -->\n", "<!-- end of tested layouts -->\n"


def describe_layout(layout: Layout, encoder: Encoder) -> str:
    kind = "folder" if layout.path.is_dir() else layout.path.suffix
    return f"{kind}; taps {', '.join(encoder.taps)}"


def insert_table(document: str, rows: Mapping[str, str]) -> str:
    before, _, rest = document.partition(START)
    lines = "".join(f"| {name} | {summary.replace('; ', ' | ')} |\n" for name, summary in rows.items())
    return f"{before}{START}| layout | file | taps |\n| --- | --- | --- |\n{lines}{END}{rest.partition(END)[2]}"


def write_table() -> None:
    """Read all layouts, and write the table into the package and into the documentation."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, write) in enumerate(LAYOUTS.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            layout = write(place)
            rows[name] = describe_layout(layout, load_encoder(str(layout.path), device="cpu", **layout.options))
    TESTED_LAYOUTS.write_text("".join(f"{name}\t{summary}\n" for name, summary in rows.items()))
    DOCUMENT.write_text(insert_table(DOCUMENT.read_text(), rows))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: networks this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def entry_points_read_once() -> Iterator[None]:
    """Search the installed packages for plug-ins once, not once per layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", cache(registry.entry_points))
        yield


@pytest.fixture(scope="module", params=LAYOUTS)
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, Encoder]:
    """Write a layout once, and read it once."""
    layout = LAYOUTS[request.param](tmp_path_factory.mktemp("layout"))
    return layout, load_encoder(str(layout.path), device="cpu", **layout.options)


def test_features_are_those_of_the_library_that_wrote_the_layout(read: tuple[Layout, Encoder]) -> None:
    layout, encoder = read
    shape = (2, encoder.transform.crop, encoder.transform.crop, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    mean, std = torch.tensor(encoder.transform.mean), torch.tensor(encoder.transform.std)
    images = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    expected = layout.forward(images)

    features = encode(encoder, pixels, list(expected))
    errors = {tap: float((features[tap] - value).abs().max() / value.abs().max()) for tap, value in expected.items()}
    assert max(errors.values()) < 1e-4, errors


def test_table_of_tested_layouts_states_the_taps(read: tuple[Layout, Encoder], request: pytest.FixtureRequest) -> None:
    layout, encoder = read
    name = request.node.callspec.params["read"]

    assert read_tested_layouts()[name] == describe_layout(layout, encoder)


def test_table_of_tested_layouts_is_that_of_the_suite() -> None:
    assert len(LAYOUTS) >= 100
    assert list(read_tested_layouts()) == list(LAYOUTS)


def test_documentation_has_the_table_of_tested_layouts() -> None:
    assert insert_table(DOCUMENT.read_text(), read_tested_layouts()) == DOCUMENT.read_text()


def test_layout_is_reported_and_read_in_full(read: tuple[Layout, Encoder]) -> None:
    layout, checkpoint = read[0], read[1].checkpoint
    architecture = checkpoint.arch.partition("?")[0] if layout.arch else ""
    assert (checkpoint.format, checkpoint.key, architecture) == (layout.format, layout.key, layout.arch)
    assert checkpoint.matched == 1.0


# What is refused.


def refusal(path: Path, **options: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(str(path), device="cpu", **options)
    return caught.value


def changed_vit(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    return saved(folder, {"model": change(vit().state_dict())})


def changed_resnet(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    return saved(folder, {"state_dict": under("module.encoder_q.", change(halved(resnet().state_dict())))})


def changed_huggingface(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    path = huggingface_folder(folder, "ViTMSNModel", TINY).path
    safetensors.torch.save_file(
        change(safetensors.torch.load_file(path / "model.safetensors")), path / "model.safetensors"
    )
    return path


@pytest.mark.parametrize(
    ("write", "change", "line"),
    [
        (changed_vit, lambda w: without(w, "blocks.1.attn.proj.bias"), "blocks.1.attn.proj.bias: missing in the file"),
        (changed_vit, lambda w: w | {"neck.weight": torch.ones(3)}, "neck.weight: no place in the model"),
        (
            changed_vit,
            lambda w: w | {"norm.bias": torch.ones(3)},
            "norm.bias: file (3,), model (192,)",
        ),
        (changed_vit, lambda w: w | {"dist_token": torch.ones(1, 1, 192)}, "dist_token: no place in the model"),
        (changed_resnet, lambda w: without(w, "layer3.1.bn2.running_var"), "layer3.1.bn2.running_var: missing"),
        (changed_resnet, lambda w: w | {"layer3.1.se.weight": torch.ones(3)}, "layer3.1.se.weight: no place"),
        (
            changed_resnet,
            lambda w: w | {"conv1.weight": torch.ones(64, 3, 5, 5)},  # 3 x 3 is a stem for small images
            "conv1.weight: file (64, 3, 5, 5), model (64, 3, 7, 7)",
        ),
        (
            changed_huggingface,
            lambda w: without(w, "encoder.layer.1.layernorm_after.bias"),
            "blocks.1.norm2.bias: missing in the file",
        ),
        (
            changed_huggingface,
            lambda w: without(w, "encoder.layer.1.attention.attention.key.weight"),
            "blocks.1.attn.qkv.weight: file (48, 48), model (144, 48)",
        ),
        (
            changed_huggingface,
            lambda w: without(w, "encoder.layer.1.attention.attention.query.weight"),
            "blocks.1.attn.qkv.weight: missing in the file",
        ),
        (changed_huggingface, lambda w: w | {"adapter.weight": torch.ones(3)}, "adapter.weight: no place in the model"),
    ],
    ids=[
        "ViT, missing",
        "ViT, extra",
        "ViT, reshaped",
        "ViT, distilled",
        "ResNet, missing",
        "ResNet, extra",
        "ResNet, reshaped",
        "HF, missing",
        "HF, keys missing",
        "HF, queries missing",
        "HF, extra",
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path,
    write: Callable[[Path, Callable[[Weights], Weights]], Path],
    change: Callable[[Weights], Weights],
    line: str,
) -> None:
    assert line in str(refusal(write(tmp_path, change)))


if __name__ == "__main__":
    write_table()
