"""Transformer: a Vision Transformer in training, which may be given only some of its patches and images of several sizes."""

import logging
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.errors import UsageError
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import build_network
from msn_eval.models.vit import (
    PositionRule,
    class_token_after,
    interpolate_positions,
    is_plain,
    patch_pixels,
    stored_pixels,
)

_log = logging.getLogger(__name__)
_RELEASED = PositionRule(image_pixels=224, antialias=False, offset=0.0)


def build_transformer(
    name: str,
    *,
    drop_path: float = 0.0,
    first_weights: str = "release",
    position_scale: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """Build timm's Vision Transformer `name`, in training mode, its weights drawn from `seed`.

    name: as `--arch` takes it, keywords behind it
    first_weights:  `release`, as the MSN release draws them, or `timm`
    position_scale: of the first position embeddings, to what they are drawn as
    Raises CheckpointError for a name that timm does not know, UsageError for a network of another kind.
    """
    from timm.models.vision_transformer import VisionTransformer

    keywords = f"{'&' if '?' in name else '?'}drop_path_rate={drop_path}" if drop_path else ""
    network = build_network(name_architecture(name + keywords), seed=seed)
    if not isinstance(network, VisionTransformer) or network.cls_token is None or network.pos_embed is None:
        raise UsageError(
            f"encoder.name: {name} is no Vision Transformer with class token and learned positions",
            hint="Choose for example vit_small_patch16_224.",
        )
    if first_weights == "release":
        draw_weights(network, seed=seed)
    if position_scale != 1:
        with torch.no_grad():
            cast(Tensor, network.pos_embed).mul_(position_scale)
    return cast(nn.Module, network.train())


@torch.no_grad()
def draw_weights(network: nn.Module, *, seed: int) -> None:
    """Draw a Transformer's weights as the MSN release does: normal, cut at ±2, of standard deviation 0.02; biases 0.

    The patch embedding is Kaiming-normal by its inputs. Source: github.com/facebookresearch/msn, src/deit.py.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in ("pos_embed", "cls_token", "reg_token"):
            if getattr(network, name, None) is not None:
                nn.init.trunc_normal_(cast(Tensor, getattr(network, name)), std=0.02)
        for module in network.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)


class MaskedTransformer(nn.Module):
    """A timm Vision Transformer whose patches may be dropped before its blocks, for images of several sizes.

    network:     timm's, the only part with weights; its names are as timm's behind `network.`
    image_sides: pixels of the images that it will see
    Positions of another size than the network's are interpolated bicubically, without antialiasing, as the release does;
    that is a fixed matrix for each size, so its gradient is a product, alike on every device.
    """

    def __init__(self, network: nn.Module, *, image_sides: Iterable[int]) -> None:
        super().__init__()
        self.network = network
        self.width = cast(int, network.embed_dim)
        self.prefix = cast(int, network.num_prefix_tokens)
        self.patch_pixels = cast(int, patch_pixels(network))
        own_side = cast(int, stored_pixels(network)) // self.patch_pixels
        for side in {pixels // self.patch_pixels for pixels in map(self._checked, image_sides)} - {own_side}:
            self.register_buffer(f"to_{side}_a_side", _interpolation(own_side, side), persistent=False)
        self._own_side = own_side
        # Only the class token leaves the last block; nothing else of it need be computed, unless blocks may be skipped.
        self._class_token_alone = is_plain(network) and _never_drops(network)

    def patches(self, pixels: int) -> int:
        """Give how many patches an image of this side has."""
        return (pixels // self.patch_pixels) ** 2

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Give the class tokens after the final norm.

        images:  (b, 3, S, S), normalised
        kept:    (m,) or (b, m) int64, the patches that are not dropped; None keeps all
        returns: (b, width)
        """
        tokens = self._tokens(images)
        if kept is not None:
            tokens = keep_patches(tokens, kept, prefix=self.prefix)
        network = self.network
        tokens = network.norm_pre(tokens)  # type: ignore[operator]
        blocks = cast(nn.Sequential, network.blocks)
        alone = self._class_token_alone
        token = class_token_after(blocks[-1], blocks[:-1](tokens)) if alone else blocks(tokens)[:, 0]
        return cast(Tensor, network.fc_norm(network.norm(token)))  # type: ignore[operator]

    def _tokens(self, images: Tensor) -> Tensor:
        """Give (b, prefix + n, width), patches with their positions behind the prefix tokens."""
        network = self.network
        embed = cast(nn.Module, network.patch_embed)
        patches = cast(nn.Module, embed.norm)(cast(nn.Module, embed.proj)(images).flatten(2).transpose(1, 2))
        positions = cast(Tensor, network.pos_embed)
        n_prefix_positions = positions.shape[1] - self._own_side**2
        side = images.shape[-1] // self.patch_pixels
        of_patches = positions[:, n_prefix_positions:]
        if side != self._own_side:
            with torch.autocast(images.device.type, enabled=False):
                of_patches = cast(Tensor, getattr(self, f"to_{side}_a_side")) @ of_patches
        prefix = [cast(Tensor, token) for token in (network.cls_token, network.reg_token) if token is not None]
        front = torch.cat(prefix, dim=1)
        if n_prefix_positions:
            front = front + positions[:, :n_prefix_positions]
        front = front.expand(len(images), -1, -1).to(patches.dtype)
        tokens = torch.cat([front, patches + of_patches], dim=1)
        return cast(Tensor, cast(nn.Module, network.pos_drop)(tokens))

    def _checked(self, pixels: int) -> int:
        if pixels < self.patch_pixels:
            raise UsageError(
                f"views of {pixels} pixels are smaller than a patch of {self.patch_pixels}",
                hint="Raise views.image_pixels or views.focal_pixels.",
            )
        if pixels % self.patch_pixels:
            _log.warning(
                "views of %d pixels are no whole number of patches of %d: %d pixels at two edges are not seen",
                *(pixels, self.patch_pixels, pixels % self.patch_pixels),
            )
        return pixels


def _interpolation(own_side: int, side: int) -> Tensor:
    """Give (side ** 2, own_side ** 2) float32, the matrix that interpolates positions of one grid to another."""
    basis = torch.eye(own_side**2, dtype=torch.float64).unsqueeze(0)
    return interpolate_positions(basis, patches_a_side=side, rule=_RELEASED)[0].float()


def _never_drops(network: nn.Module) -> bool:
    from timm.layers import DropPath

    return not any(
        isinstance(module, DropPath) or (isinstance(module, nn.Dropout) and module.p > 0)
        for module in cast(nn.Sequential, network.blocks)[-1].modules()
    )


def kept_count(n_patches: int, ratio: float) -> int:
    """Give how many of `n_patches` are kept when a share `ratio` is dropped, rounded down as the release does.

    Raises UsageError where none would be left, and for a ratio outside [0, 1).
    """
    kept = math.floor(n_patches * (1.0 - ratio)) if 0 <= ratio < 1 else 0
    if not kept:
        raise UsageError(
            f"a view of {n_patches} patches of which a share of {ratio} is dropped keeps none",
            hint="Drop a smaller share: masking.ratio=0.15.",
        )
    return kept


def kept_patches(n_patches: int, ratio: float, generator: torch.Generator, *, images: int | None = None) -> Tensor:
    """Draw the patches that are kept, each set equally likely, by a generator on the CPU.

    images:  how many images get a set of their own; None draws one set for all of a batch, as the release does
    returns: (kept,) or (images, kept) int64 on the CPU, ascending, in [0, n_patches)
    """
    kept = kept_count(n_patches, ratio)
    if images is None:
        return torch.randperm(n_patches, generator=generator)[:kept].sort().values
    order = torch.rand(images, n_patches, generator=generator, dtype=torch.float64).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values


def keep_patches(tokens: Tensor, kept: Tensor, *, prefix: int) -> Tensor:
    """Leave the first `prefix` tokens and, of the patches behind them, those in `kept`.

    tokens:  (b, prefix + n, d)
    kept:    (m,) or (b, m) int64, numbers of patches
    returns: (b, prefix + m, d)
    """
    patches = tokens[:, prefix:]
    if kept.dim() == 1:
        chosen = patches.index_select(1, kept)
    else:
        chosen = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    return torch.cat([tokens[:, :prefix], chosen], dim=1)
