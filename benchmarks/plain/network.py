"""A plain implementation of MSN's training step in fp32, written from the paper and without any means to be fast.

Masked Siamese Networks (arXiv:2204.07141): a Vision Transformer that drops patches of the random anchor views, a projection head,
prototypes, targets that are sharpened and balanced by Sinkhorn, the mean-entropy term, AdamW, and a moving average as the target
network. Weights have timm's names, so that `load` can copy those of msn_pretrain's model. `benchmarks/pretrain.py` compares speed
with it, and a test compares losses.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-6  # of LayerNorm, as in the ViT paper's code


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend from (b, n, width) to (b, n, width)."""
        b, n, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return cast(Tensor, self.proj(attended.transpose(1, 2).reshape(b, n, width)))


class Block(nn.Module):
    """Transformer block with LayerNorm before attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        layers = (("fc1", nn.Linear(width, 4 * width)), ("act", nn.GELU()), ("fc2", nn.Linear(4 * width, width)))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform (b, n, width)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return cast(Tensor, tokens + self.mlp(self.norm2(tokens)))


class VisionTransformer(nn.Module):
    """Vision Transformer that returns the class token, (b, width)."""

    def __init__(self, *, pixels: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (pixels // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Compute class tokens of (b, 3, S, S) images; `kept`, (m,) or (b, m), are the patches that are not dropped."""
        patches = cast(nn.Module, self.patch_embed.proj)(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = tokens + self._positions(math.isqrt(patches.shape[1]))
        if kept is not None:
            index = kept.expand(len(images), -1).unsqueeze(-1).expand(-1, -1, tokens.shape[2])
            tokens = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, index)], dim=1)
        return cast(Tensor, self.norm(self.blocks(tokens))[:, 0])

    def _positions(self, side: int) -> Tensor:
        own_side = math.isqrt(self.pos_embed.shape[1] - 1)
        if side == own_side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, own_side, own_side, -1).permute(0, 3, 1, 2)
        resized = functional.interpolate(grid, size=(side, side), mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], resized], dim=1)


def projection_head(width: int, *, hidden: int, output: int) -> nn.Sequential:
    """Build the head: three linear layers, the first two followed by BatchNorm and GELU."""
    layers = [
        *(("fc1", nn.Linear(width, hidden)), ("bn1", nn.BatchNorm1d(hidden)), ("gelu1", nn.GELU())),
        *(("fc2", nn.Linear(hidden, hidden)), ("bn2", nn.BatchNorm1d(hidden)), ("gelu2", nn.GELU())),
        ("fc3", nn.Linear(hidden, output)),
    ]
    return nn.Sequential(OrderedDict(layers))


class PlainMSN(nn.Module):
    """Anchor network, target network and prototypes."""

    def __init__(self, encoder: VisionTransformer, head: nn.Module, prototypes: Tensor) -> None:
        super().__init__()
        self.anchor = nn.ModuleDict({"encoder": encoder, "head": head})
        self.target = copy.deepcopy(self.anchor).requires_grad_(False)
        self.prototypes = nn.Parameter(prototypes)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy the state of msn_pretrain's model."""
        self.load_state_dict({name.replace(".trunk.network.", ".encoder."): value for name, value in weights.items()})


def sinkhorn(assignments: Tensor, iterations: int = 3) -> Tensor:
    """Balance (n, k) assignments: alternately normalise columns and rows."""
    for _ in range(iterations):
        assignments = assignments / assignments.sum(dim=0, keepdim=True) / assignments.shape[1]
        assignments = assignments / assignments.sum(dim=1, keepdim=True)
    return assignments


def msn_loss(anchors: Tensor, targets: Tensor, prototypes: Tensor, *, temperature: float, sharpening: float) -> Tensor:
    """Compute the cross-entropy of anchors with their targets, minus the entropy of the mean prediction, plus log k."""
    anchors, targets, prototypes = (functional.normalize(rows, dim=1) for rows in (anchors, targets, prototypes))
    predicted = (anchors @ prototypes.T / temperature).softmax(dim=1)
    with torch.no_grad():
        assigned = (targets @ prototypes.T / temperature).softmax(dim=1) ** (1 / sharpening)
        assigned = sinkhorn(assigned / assigned.sum(dim=1, keepdim=True))
    assigned = assigned.repeat(len(anchors) // len(targets), 1)
    cross_entropy = -(assigned * predicted.log()).sum(dim=1).mean()
    mean = predicted.mean(dim=0)
    return cross_entropy + (mean * mean.log()).sum() + math.log(len(prototypes))


def build_adamw(model: PlainMSN) -> torch.optim.AdamW:
    """Build AdamW, with weight decay for matrices of encoder and head only."""
    named = list(model.anchor.named_parameters())
    is_vector = [value.dim() == 1 or name.endswith("bias") for name, value in named]
    decayed = [value for (_, value), vector in zip(named, is_vector, strict=True) if not vector]
    others = [value for (_, value), vector in zip(named, is_vector, strict=True) if vector]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": [*others, model.prototypes]}]
    return torch.optim.AdamW(groups)


def take_step(
    model: PlainMSN,
    optimizer: torch.optim.Optimizer,
    views: Sequence[Tensor],
    kept: Tensor | None,
    *,
    random_views: int,
    learning_rate: float,
    weight_decay: float,
    decay: float,
    temperature: float,
    sharpening: float,
    clip: float,
) -> float:
    """Take one step and return its loss.

    Args:
        model: Networks.
        optimizer: As returned by `build_adamw`.
        views: The target's view, the random anchor views, then the focal ones, (b, 3, S, S) each.
        kept: Patches that random anchor views keep.
        random_views: How many they are.
        learning_rate: Of this step.
        weight_decay: Of this step.
        decay: Of the moving average.
        temperature: Of the softmax.
        sharpening: T of the targets.
        clip: Maximum gradient norm of encoder and head.
    """
    for group, weight in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group["lr"], group["weight_decay"] = learning_rate, weight
    with torch.no_grad():
        targets = model.target["head"](model.target["encoder"](views[0]))
    anchors = []
    for group_views, mask in ((views[1 : 1 + random_views], kept), (views[1 + random_views :], None)):
        if group_views:
            anchors.append(model.anchor["head"](model.anchor["encoder"](torch.cat(list(group_views)), mask)))
    loss = msn_loss(torch.cat(anchors), targets, model.prototypes, temperature=temperature, sharpening=sharpening)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.anchor.parameters(), clip)
    optimizer.step()
    with torch.no_grad():
        for target, anchor in zip(model.target.parameters(), model.anchor.parameters(), strict=True):
            target.mul_(decay).add_(anchor, alpha=1 - decay)
    return loss.item()
