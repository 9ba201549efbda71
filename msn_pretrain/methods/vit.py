"""Vision Transformers in training: a part of the patches, and images of several sizes."""

import logging
import math
from collections.abc import Iterable
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from msn_eval.errors import UsageError
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import build_network
from msn_eval.models.vit import (
    MSN_POSITIONS,
    class_token_after,
    has_standard_attention,
    interpolate_positions,
    is_plain,
    keep_patches,
    patch_pixels,
    stored_pixels,
)
from msn_pretrain.config.recipe import Encoder, architecture_of

_log = logging.getLogger(__name__)


def build_transformer(encoder: Encoder, *, seed: int = 0) -> nn.Module:
    """Build a Vision Transformer of timm in training mode, with weights drawn from `seed`.

    Raises:
        CheckpointError: timm does not know the name.
        UsageError: The network is of another kind.
    """
    from timm.models.vision_transformer import VisionTransformer

    architecture = architecture_of(encoder, drop_path=encoder.drop_path)
    network = build_network(name_architecture(architecture), seed=seed)
    if not isinstance(network, VisionTransformer) or network.cls_token is None or network.pos_embed is None:
        what = f"encoder.name: {encoder.name} is not a Vision Transformer with class token and learned positions"
        raise UsageError(what, hint="Choose for example vit_small_patch16_224.")
    if encoder.first_weights == "release":
        init_weights(network, seed=seed)
    if encoder.position_scale != 1:
        with torch.no_grad():
            cast(Tensor, network.pos_embed).mul_(encoder.position_scale)
    for block in cast(nn.Sequential, network.blocks):
        if has_standard_attention(block):
            attention = cast(nn.Module, block.attn)
            attention.forward = MethodType(_attend, attention)  # copy.deepcopy binds the copy to itself
    return cast(nn.Module, network.train())


def _attend(attention: nn.Module, tokens: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
    """Compute what timm's attention does, to the bit, with one copy less of the gradients of query, key and value.

    Args:
        attention: Of a block for which `has_standard_attention` holds.
        tokens: (b, n, width).
        attn_mask: None, as blocks pass it.
        is_causal: False, as blocks pass it.

    Returns:
        (b, n, width).
    """
    # timm permutes before it takes the three apart, so that backward stacks their gradients and then copies the stack.
    packed = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1))  # type: ignore[operator]
    query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
    query, key = attention.q_norm(query), attention.k_norm(key)  # type: ignore[operator]
    dropout = cast(nn.Dropout, attention.attn_drop)
    if attention.fused_attn:
        rate = dropout.p if attention.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate)
    else:
        attended = dropout((query * attention.scale @ key.transpose(2, 3)).softmax(dim=3)) @ value
    return cast(Tensor, attention.proj_drop(attention.proj(attended.transpose(1, 2).flatten(2))))  # type: ignore[operator]


@torch.no_grad()
def init_weights(network: nn.Module, *, seed: int) -> None:
    """Draw weights as the MSN release does: truncated normal with standard deviation 0.02, biases 0.

    The patch embedding is Kaiming-normal by fan-in.

    Source: github.com/facebookresearch/msn, src/deit.py.
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
    """A Vision Transformer of timm that can drop patches before its blocks and take images of several sizes.

    Position embeddings of other sizes are interpolated bicubically without antialiasing, as in the release. For each size this is
    a fixed matrix, so the gradient is a matrix product, which is deterministic on every device.

    Attributes:
        network: timm's network, the only part with weights.
        width: Width of the class token.
        prefix: Number of class and register tokens.
        patch_pixels: Side of a patch.
    """

    def __init__(self, network: nn.Module, *, image_sides: Iterable[int]) -> None:
        """Create the module.

        Args:
            network: As returned by `build_transformer`.
            image_sides: Sides in pixels of the images that it will see.
        """
        super().__init__()
        self.network = network
        self.width = cast(int, network.embed_dim)
        self.prefix = cast(int, network.num_prefix_tokens)
        self.patch_pixels = cast(int, patch_pixels(network))
        own_side = cast(int, stored_pixels(network)) // self.patch_pixels
        for side in {pixels // self.patch_pixels for pixels in map(self._check_side, image_sides)} - {own_side}:
            self.register_buffer(f"to_{side}_per_side", _interpolation_matrix(own_side, side), persistent=False)
        self._own_side = own_side
        # Only the class token of the last block is used. Compute it alone, unless stochastic depth may skip the block.
        self._class_token_only = is_plain(network) and _never_drops(network)

    def patches(self, pixels: int) -> int:
        """Return the number of patches of an image of this side."""
        return (pixels // self.patch_pixels) ** 2

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Compute the class tokens after the final norm.

        Args:
            images: (b, 3, S, S), normalised.
            kept: (m,) or (b, m) int64, the patches to keep; None keeps all.

        Returns:
            (b, width).
        """
        tokens = self._embed(images, kept)
        network = self.network
        tokens = network.norm_pre(tokens)  # type: ignore[operator]
        blocks = cast(nn.Sequential, network.blocks)
        is_alone = self._class_token_only
        others = blocks[:-1] if is_alone else blocks
        if network.grad_checkpointing and torch.is_grad_enabled():
            for block in others:
                tokens = checkpoint(block, tokens, use_reentrant=False)
        else:
            tokens = others(tokens)
        token = class_token_after(blocks[-1], tokens) if is_alone else tokens[:, 0]
        return cast(Tensor, network.fc_norm(network.norm(token)))  # type: ignore[operator]

    def _embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """Return prefix tokens and kept patches with their positions, (b, prefix + m, width), in the dtype of linear layers."""
        network, side = self.network, images.shape[-1] // self.patch_pixels
        # Not timm's patch_embed(): it refuses image sizes other than the network's own, and embeds dropped patches too.
        embed = cast(nn.Module, network.patch_embed)
        projection = cast(nn.Conv2d, embed.proj)
        pixels = _cut_into_patches(images, side=side, patch_pixels=self.patch_pixels)
        positions = cast(Tensor, network.pos_embed)
        n_prefix_positions = positions.shape[1] - self._own_side**2
        patch_positions = positions[:, n_prefix_positions:]
        if side != self._own_side:
            with torch.autocast(images.device.type, enabled=False):
                patch_positions = cast(Tensor, getattr(self, f"to_{side}_per_side")) @ patch_positions
        if kept is not None:
            pixels = keep_patches(pixels, kept, prefix=0)
            # Each image's rows first, then their sum: an index with duplicates has no deterministic gradient on all devices.
            shared = patch_positions if kept.dim() == 1 else patch_positions.expand(len(images), -1, -1)
            patch_positions = keep_patches(shared, kept, prefix=0)
        patches = functional.linear(pixels, projection.weight.flatten(1), projection.bias)
        patches = cast(nn.Module, embed.norm)(patches)
        tokens = [cast(Tensor, token) for token in (network.cls_token, network.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1)
        if n_prefix_positions:
            prefix = prefix + positions[:, :n_prefix_positions]
        prefix = prefix.to(patches.dtype).expand(len(images), -1, -1)
        patches = patches + patch_positions.to(patches.dtype)
        return cast(Tensor, cast(nn.Module, network.pos_drop)(torch.cat([prefix, patches], dim=1)))

    def _check_side(self, pixels: int) -> int:
        if pixels < self.patch_pixels:
            what = f"views of {pixels} pixels are smaller than a patch of {self.patch_pixels}"
            raise UsageError(what, hint="Raise views.image_pixels or views.focal_pixels.")
        if pixels % self.patch_pixels:
            text = "views of %d pixels are not a multiple of the patch size %d: %d pixels at two edges are ignored"
            _log.warning(text, pixels, self.patch_pixels, pixels % self.patch_pixels)
        return pixels


def _cut_into_patches(images: Tensor, *, side: int, patch_pixels: int) -> Tensor:
    """Return the pixels of the patches of (b, 3, S, S) images, (b, side ** 2, 3 * patch_pixels ** 2)."""
    used = side * patch_pixels
    grid = images[..., :used, :used].reshape(len(images), -1, side, patch_pixels, side, patch_pixels)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _interpolation_matrix(own_side: int, side: int) -> Tensor:
    """Return the matrix that interpolates positions from one grid to another, (side ** 2, own_side ** 2) float32."""
    # Interpolation is linear: applied to the identity, it gives its own matrix.
    basis = torch.eye(own_side**2, dtype=torch.float64).unsqueeze(0)
    return interpolate_positions(basis, patches_a_side=side, rule=MSN_POSITIONS)[0].float()


def _never_drops(network: nn.Module) -> bool:
    from timm.layers import DropPath

    return not any(
        isinstance(module, DropPath) or (isinstance(module, nn.Dropout) and module.p > 0)
        for module in cast(nn.Sequential, network.blocks)[-1].modules()
    )


def kept_count(n_patches: int, ratio: float) -> int:
    """Return how many patches are kept when a share `ratio` is dropped, rounded down as in the release.

    Raises:
        UsageError: No patch would be kept.
    """
    kept = math.floor(n_patches * (1.0 - ratio))
    if not kept:
        what = f"masking.ratio={ratio} keeps none of the {n_patches} patches of a view"
        raise UsageError(what, hint="Drop a smaller share: masking.ratio=0.15.")
    return kept


def draw_kept_patches(n_patches: int, ratio: float, generator: torch.Generator, *, images: int | None = None) -> Tensor:
    """Draw the patches to keep; every set of this size is equally likely.

    Args:
        n_patches: Patches of an image.
        ratio: Share to drop, in [0, 1).
        generator: Source of randomness, on the CPU.
        images: Number of images with a set each; None draws one set for the complete batch, as in the release.

    Returns:
        (kept,) or (images, kept) int64 on the CPU, ascending, in [0, n_patches).
    """
    kept = kept_count(n_patches, ratio)
    if images is None:
        return torch.randperm(n_patches, generator=generator)[:kept].sort().values
    order = torch.rand(images, n_patches, generator=generator, dtype=torch.float64).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values
