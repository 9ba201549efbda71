"""Encoder: a checkpoint's network on a device, its transform, and the vectors that can be tapped from it."""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.checkpoint import Checkpoint, read_checkpoint, weights_sha256
from msn_eval.data.images import EvalTransform, eval_transform
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.models.vit import (
    class_token_after,
    interpolate_positions,
    is_plain,
    patch_pixels,
    published_rule,
    stored_pixels,
)

Precision = Literal["fp32", "bf16", "fp16"]
TAPS = ("cls", "cls-norm", "mean", "cls4", "pool", "out", "pixels")
_CLASS_TOKEN_TAPS = frozenset({"cls", "cls-norm"})
_FALLBACKS = ("mean", "pool", "out", "pixels")
_LAST_BLOCKS = 4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen trunk that turns pixels into features.

    network:    in eval mode, on `device`, in the dtype of `precision`
    taps:       what can be tapped, in the order of TAPS
    final_norm: the norm after the last block, in float32, for the taps that are taken after it
    compiled:   its parts go through torch.compile
    """

    checkpoint: Checkpoint
    network: nn.Module
    device: torch.device
    precision: Precision
    transform: EvalTransform
    taps: tuple[str, ...]
    final_norm: nn.Module
    compiled: bool = False

    @property
    def arch(self) -> str:
        return self.checkpoint.arch

    @cached_property
    def dim(self) -> int:
        """Give the width of the default tap."""
        tap = self.taps[0]
        side = self.transform.crop
        blank = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        return encode(self, blank, [tap])[tap].shape[1]

    @property
    def precision_class(self) -> str:
        return precision_class(self.precision)


def precision_class(precision: Precision) -> str:
    """Give `exact` for float32 without TF32, `reduced` for bf16 and fp16."""
    return "exact" if precision == "fp32" else "reduced"


def load_encoder(
    checkpoint: str,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    arch: str | None = None,
    checkpoint_key: str | None = None,
    image_pixels: int | None = None,
    seed: int = 0,
) -> Encoder:
    """Read the checkpoint called `checkpoint` and put it on `device`.

    precision: fp32 on a CPU and bf16 on CUDA where None
    Raises CheckpointError for weights that do not fit, UsageError for a device that is not there.
    """
    chosen = choose_device(device)
    if precision not in (None, *_DTYPES):
        raise UsageError(f"--precision {precision}: no such precision", hint=f"Use {', '.join(_DTYPES)}.")
    return build_encoder(
        read_checkpoint(checkpoint, arch=arch, key=checkpoint_key, seed=seed),
        device=chosen,
        precision=precision or default_precision(chosen),
        image_pixels=image_pixels,
    )


def choose_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """Give the device called `auto`, `cpu`, `cuda` or `cuda:N`. Raises UsageError where it is not there.

    local_rank: number of this rank among those of its machine, None where there is but one; `auto` and `cuda` then mean
    the GPU of that number
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name}: not a device", hint="Use auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(
            f"--device {name}: this machine offers {torch.cuda.device_count()} CUDA devices to PyTorch",
            hint="Use --device cpu, or check the driver with nvidia-smi.",
        )
    return device


def default_precision(device: torch.device) -> Precision:
    """Give fp32 on a CPU, bf16 on CUDA."""
    return "bf16" if device.type == "cuda" else "fp32"


def build_encoder(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    precision: Precision,
    image_pixels: int | None = None,
    compiled: bool = False,
) -> Encoder:
    """Put a checkpoint's network on a device, for images of `image_pixels` (its native size where None).

    Another size than the native one interpolates the position embeddings, which otherwise never happens.
    compiled: by torch.compile, part by part, at the first batch; numbers then differ by rounding
    Raises UsageError for a size that the network cannot take.
    """
    network = copy.deepcopy(checkpoint.network)
    wanted = image_pixels or checkpoint.image_pixels
    if _has_tokens(network) and not checkpoint.runs_own_code and wanted != stored_pixels(network):
        network = _resized(network, wanted)  # a convolution takes any size, and the user's module knows for itself
    final_norm = copy.deepcopy(_final_norm(network))
    if _is_convolutional(checkpoint, network):
        network = network.to(memory_format=torch.channels_last)
    if compiled:
        _compile(checkpoint, network)
    return Encoder(
        checkpoint=checkpoint,
        network=network.to(device=device, dtype=_DTYPES[precision]).eval(),
        device=device,
        precision=precision,
        transform=eval_transform(image_pixels or checkpoint.image_pixels, checkpoint.mean, checkpoint.std),
        taps=_available_taps(checkpoint, network),
        final_norm=final_norm.to(device=device, dtype=torch.float32).eval(),
        compiled=compiled,
    )


def _resized(network: nn.Module, image_pixels: int) -> nn.Module:
    patch = patch_pixels(network) or 1
    if image_pixels % patch:
        raise UsageError(
            f"--image-pixels {image_pixels} is no multiple of the patch size {patch}",
            hint=f"Use {max(1, image_pixels // patch) * patch} or {max(2, image_pixels // patch + 1) * patch}.",
        )
    rule, learned = published_rule(network), network.pos_embed
    with warnings.catch_warnings():
        # timm interpolates BEiT's tables of offsets in ways that torch advises against.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
        network.set_input_size(img_size=(image_pixels, image_pixels))  # type: ignore[operator]
    if rule is not None:
        positions = interpolate_positions(cast(Tensor, learned).data, patches_a_side=image_pixels // patch, rule=rule)
        network.pos_embed = nn.Parameter(positions, requires_grad=False)
    return network


def _has_tokens(network: nn.Module) -> bool:
    """Tell whether a network is a Transformer whose tokens can be tapped after every block."""
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(network, VisionTransformer | Beit)


def _is_convolutional(checkpoint: Checkpoint, network: nn.Module) -> bool:
    """Tell whether channels-last memory suits a network: timm's convolutional ones; a user's own is left as it is."""
    return not checkpoint.runs_own_code and checkpoint.format != "pixels" and not _has_tokens(network)


def _compile(checkpoint: Checkpoint, network: nn.Module) -> None:
    """Have a network compiled at its first batch, in place, so that weights keep their names: a Transformer block by block,
    since equal blocks are compiled once."""
    if checkpoint.runs_own_code or checkpoint.format == "pixels":
        network.compile()
    elif _has_tokens(network):
        for block in cast(nn.Sequential, network.blocks):
            block.compile()
    else:
        network.forward_features = torch.compile(network.forward_features)  # type: ignore[arg-type, assignment]


def _final_norm(network: nn.Module) -> nn.Module:
    """Give the norm behind the last block, wherever the architecture keeps it."""
    if not _has_tokens(network):
        return nn.Identity()
    norm, fc_norm = cast(nn.Module, network.norm), cast(nn.Module, network.fc_norm)
    return fc_norm if isinstance(norm, nn.Identity) else norm


def _available_taps(checkpoint: Checkpoint, network: nn.Module) -> tuple[str, ...]:
    if checkpoint.format == "pixels":
        return ("pixels",)
    if checkpoint.runs_own_code:  # its forward is the user's, even where it is a Vision Transformer of timm's
        return ("out",)
    if not _has_tokens(network):
        return ("pool",)
    if getattr(network, "attn_pool", None) is not None:
        return ("out",)
    if getattr(network, "cls_token", None) is None:
        return ("mean",)
    deep = len(network.blocks) >= _LAST_BLOCKS  # type: ignore[arg-type]
    return ("cls", "cls-norm", "mean", "cls4") if deep else ("cls", "cls-norm", "mean")


def resolve_tap(encoder: Encoder, wanted: str, *, by_hand: bool, option: str = "--tap") -> str:
    """Give the tap to use: `wanted` where the network has it, else the first it has of mean, pool, out, pixels.

    by_hand: the user asked for this very tap by `option`, and another would be a surprise
    Raises UsageError where a tap asked for by hand is not there.
    """
    if wanted in encoder.taps:
        return wanted
    if by_hand:
        raise UsageError(
            f"{option} {wanted}: {encoder.checkpoint.name} ({encoder.arch}) has no such tap",
            hint=f"It has: {', '.join(encoder.taps)}.",
        )
    return next(tap for tap in _FALLBACKS if tap in encoder.taps)


def encode(encoder: Encoder, pixels: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
    """Give the features of a batch at every tap, in one pass.

    pixels:  (b, S, S, 3) uint8, on any device
    returns: (b, d) float32 for each tap, on the encoder's device
    """
    with torch.inference_mode(), exact_float32():
        images = normalised(pixels.to(encoder.device, non_blocking=True), encoder)
        if encoder.checkpoint.runs_own_code or not _has_tokens(encoder.network):
            return {taps[0]: _whole_image(encoder, images).float()}
        if "out" in taps:
            return {"out": cast(Tensor, encoder.network(images)).float()}
        return _token_taps(encoder, images, taps)


@contextlib.contextmanager
def unchanged(encoder: Encoder) -> Iterator[None]:
    """Prove that the features taken inside come from the weights that are reported: evaluation mode and the same bytes, before
    and after.

    Raises CheckpointError where that is not so.
    """
    _check_evaluation_mode(encoder)
    before = weights_sha256(encoder.network.state_dict())
    yield
    _check_evaluation_mode(encoder)
    if weights_sha256(encoder.network.state_dict()) != before:
        raise CheckpointError(
            "its weights changed while features were taken from it",
            where=encoder.checkpoint.path,
            hint="A frozen network changes nothing in its forward pass; look for statistics that are updated there.",
        )


def _check_evaluation_mode(encoder: Encoder) -> None:
    training = [name or "the network itself" for name, module in encoder.network.named_modules() if module.training]
    if training:
        raise CheckpointError(
            f"{len(training)} of its modules are in training mode ({', '.join(training[:3])})",
            where=encoder.checkpoint.path,
            hint="Features are taken in evaluation mode; its forward pass must not call train().",
        )


def normalised(pixels: Tensor, encoder: Encoder) -> Tensor:
    """Give (b, 3, S, S) images in the network's dtype; the arithmetic is float32."""
    mean = torch.tensor(encoder.transform.mean, device=pixels.device)
    std = torch.tensor(encoder.transform.std, device=pixels.device)
    scaled = (pixels.float() / 255 - mean) / std
    images = scaled.permute(0, 3, 1, 2)  # which is channels-last as it stands
    if not _is_convolutional(encoder.checkpoint, encoder.network):
        images = images.contiguous()
    return images.to(_DTYPES[encoder.precision])


def _whole_image(encoder: Encoder, images: Tensor) -> Tensor:
    network = encoder.network
    if encoder.checkpoint.runs_own_code or encoder.checkpoint.format == "pixels":
        return _one_row_an_image(network(images), encoder, len(images))
    maps = network.forward_features(images)  # type: ignore[operator]
    return cast(Tensor, network.forward_head(maps, pre_logits=True))  # type: ignore[operator]


def _one_row_an_image(answer: object, encoder: Encoder, images: int) -> Tensor:
    if isinstance(answer, Tensor) and answer.dim() == 2 and len(answer) == images:
        return answer
    given = f"a tensor {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    raise CheckpointError(
        f"gave {given} for {images} images, not ({images}, d)",
        where=encoder.checkpoint.path,
        hint="The module maps images (n, 3, S, S) to features (n, d).",
    )


def _token_taps(encoder: Encoder, images: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
    network, norm = encoder.network, encoder.final_norm
    token_alone = is_plain(network)
    whole = not token_alone or not _CLASS_TOKEN_TAPS.issuperset(taps)
    depth = len(cast(nn.Sequential, network.blocks))
    blocks: list[Tensor | tuple[Tensor, Tensor]] = network.forward_intermediates(  # type: ignore[operator]
        images,
        indices=list(range(max(0, depth - _LAST_BLOCKS), depth)) if whole else [depth - 2],
        return_prefix_tokens=True,
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    # Without prefix tokens timm gives the patches alone.
    tokens = [(one, one[:, :0]) if isinstance(one, Tensor) else one for one in blocks]
    patches, prefix = tokens[-1]
    if token_alone and not _CLASS_TOKEN_TAPS.isdisjoint(taps):
        # The same arithmetic whatever else is asked for: a number must not depend on its neighbours in a plan.
        before = torch.cat(tokens[-2 if whole else -1][::-1], dim=1)
        prefix = class_token_after(cast(nn.Sequential, network.blocks)[-1], before)[:, None]
    features: dict[str, Tensor] = {}
    for tap in taps:
        if tap == "cls":
            features[tap] = prefix[:, 0].float()
        elif tap == "cls-norm":
            features[tap] = norm(prefix[:, 0].float())
        elif tap == "cls4":
            features[tap] = torch.cat([norm(classes[:, 0].float()) for _, classes in tokens], dim=1)
        elif isinstance(network.norm, nn.Identity):  # this architecture norms what it has pooled
            features[tap] = norm(patches.float().mean(dim=1))
        else:
            features[tap] = norm(patches.float()).mean(dim=1)
    return features


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Keep TF32 and bf16 out of float32 products and convolutions, and put the settings back."""
    cuda = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    settings = (*cuda, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
