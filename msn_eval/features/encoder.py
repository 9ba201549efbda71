"""Encoders: a frozen network on a device, its image transform, and its taps."""

import contextlib
import copy
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.checkpoint import Checkpoint, read_checkpoint, weights_sha256
from msn_eval.checkpoints.own_code import guard_own_code
from msn_eval.config.request import read_channels
from msn_eval.config.yaml_config import check_choice
from msn_eval.data.images import EvalTransform, make_eval_transform
from msn_eval.errors import CheckpointError, UsageError, format_count, named_as_arguments
from msn_eval.models.hub import HubNetwork
from msn_eval.models.readout import Readout, find_readout, read_taps, run_network
from msn_eval.models.vit import (
    class_token_after,
    find_position_rule,
    interpolate_positions,
    is_plain,
    patch_pixels,
    stored_pixels,
)

_log = logging.getLogger(__name__)
_TIMM_POSITIONS = "as timm"
Precision = Literal["fp32", "bf16", "fp16"]
TAPS = ("cls", "cls-norm", "mean", "cls4", "pool", "out", "pixels")
_CLASS_TOKEN_TAPS = frozenset({"cls", "cls-norm"})
_FALLBACKS = ("mean", "pool", "out", "pixels")
_LAST_BLOCKS = 4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen backbone that turns pixels into features.

    Attributes:
        network: In evaluation mode, on `device`, in the dtype of `precision`.
        transform: Resize, crop and normalisation.
        taps: The available taps, in the order of TAPS.
        final_norm: The norm after the last block, in float32, for taps after it.
        readout: How the taps of a network are read that is not one of timm's Vision Transformers.
        compiled: Whether its parts run through torch.compile.
    """

    checkpoint: Checkpoint
    network: nn.Module
    device: torch.device
    precision: Precision
    transform: EvalTransform
    taps: tuple[str, ...]
    final_norm: nn.Module
    readout: Readout = field(default_factory=Readout)
    compiled: bool = False

    @property
    def arch(self) -> str:
        return self.checkpoint.arch

    @cached_property
    def dim(self) -> int:
        """Width of the default tap."""
        return self.dim_of(self.taps[0])

    @cached_property
    def mean_and_std(self) -> Tensor:
        """(2, 3) float32 on the device."""
        return torch.tensor([self.transform.mean, self.transform.std]).to(self.device, non_blocking=True)

    def dim_of(self, tap: str) -> int:
        """Return the width of a tap."""
        side = self.transform.crop
        return encode(self, torch.zeros(1, side, side, 3, dtype=torch.uint8), [tap])[tap].shape[1]


def precision_class(precision: Precision) -> str:
    """Return `exact` for float32 without TF32, `reduced` for bf16 and fp16."""
    return "exact" if precision == "fp32" else "reduced"


@named_as_arguments(
    ("checkpoint", "device", "precision", "arch", "checkpoint_key", "image_pixels", "mean", "std", "seed")
)
def load_encoder(
    checkpoint: str,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    arch: str | None = None,
    checkpoint_key: str | None = None,
    image_pixels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Encoder:
    """Load a checkpoint as a frozen encoder.

    Args:
        checkpoint: A file, a folder or a scheme such as `msn:vits16` or `timm:NAME`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: None means fp32 on a CPU and bf16 on CUDA.
        arch: timm's name of the architecture, where the file leaves it open.
        checkpoint_key: Which of several networks in the file.
        image_pixels: Image size; None means the native size. Another size interpolates the position embeddings.
        mean: A value per channel on the [0, 1] scale; None means the checkpoint's own.
        std: The same.
        seed: Seed of untrained weights.

    Raises:
        CheckpointError: The checkpoint is missing, or its weights do not fit.
        UsageError: The device or precision does not exist, or a mean or std is out of range.
    """
    chosen = choose_device(device)
    if precision is not None:
        check_choice("--precision", precision, _DTYPES)
    return build_encoder(
        read_checkpoint(
            checkpoint,
            arch=arch,
            key=checkpoint_key,
            seed=seed,
            mean=read_channels("--mean", mean),
            std=read_channels("--std", std),
        ),
        device=chosen,
        precision=precision or default_precision(chosen),
        image_pixels=image_pixels,
    )


def choose_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """Return the device called `auto`, `cpu`, `cuda` or `cuda:N`.

    Args:
        name: Name of the device.
        local_rank: Number of this rank on its machine; `auto` and `cuda` then mean the GPU of that number, or the only GPU where
            the launcher shows each rank its own. None for one rank.

    Raises:
        UsageError: The device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank if torch.cuda.device_count() != 1 else 0}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name} is not a device", hint="Use auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        present = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        raise UsageError(
            f"--device {name} does not exist: PyTorch sees {format_count(count, 'CUDA device')}",
            hint=f"Use --device {present}; if a GPU is missing here, check its driver with nvidia-smi.",
        )
    return device


def default_precision(device: torch.device) -> Precision:
    """Return fp32 for a CPU, bf16 for CUDA."""
    return "bf16" if device.type == "cuda" else "fp32"


def build_encoder(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    precision: Precision,
    image_pixels: int | None = None,
    compiled: bool = False,
) -> Encoder:
    """Put a checkpoint's network on a device.

    Args:
        checkpoint: As returned by `read_checkpoint`; its network is copied.
        device: Where the network runs.
        precision: Dtype of the network.
        image_pixels: Image size; None means the native size. Another size interpolates the position embeddings.
        compiled: Compile the parts of the network at the first batch. Numbers then differ by rounding.

    Raises:
        UsageError: The network cannot take images of this size.
    """
    network = copy.deepcopy(checkpoint.network)
    wanted = image_pixels or checkpoint.image_pixels
    positions = None
    if not checkpoint.runs_own_code and _has_tokens(network) and wanted != stored_pixels(network):
        positions = _resize_input(network, wanted, checkpoint)
    elif not checkpoint.runs_own_code and wanted != checkpoint.image_pixels:
        positions = _resize_other(network, wanted, checkpoint)
    transform = make_eval_transform(wanted, checkpoint.mean, checkpoint.std)
    readout = _find_readout(checkpoint, network, wanted)
    final_norm = copy.deepcopy(_final_norm(network, readout))
    if _is_convolutional(checkpoint, network):
        network = network.to(memory_format=torch.channels_last)
    if compiled:
        _compile(checkpoint, network, readout)
    return Encoder(
        checkpoint=checkpoint,
        network=network.to(device=device, dtype=_DTYPES[precision]).eval(),
        device=device,
        precision=precision,
        transform=replace(transform, positions=positions),
        taps=_available_taps(checkpoint, network, readout),
        final_norm=final_norm.to(device=device, dtype=torch.float32).eval(),
        readout=readout,
        compiled=compiled,
    )


def _resize_input(network: nn.Module, image_pixels: int, checkpoint: Checkpoint) -> str:
    """Interpolate the positions of a Transformer in place, and return by which rule."""
    rule, learned = find_position_rule(network, checkpoint.positions), network.pos_embed
    if rule is None and checkpoint.positions == "open":
        _log.warning(
            "%s: its positions are interpolated as timm does. DINO's and MSN's authors do not antialias; if the file is one "
            "of theirs, give the complete file, or for DINO --arch vit_small_patch16_224.dino (or its like)",
            checkpoint.name,
        )
    _set_input_size(network, image_pixels)
    if rule is None:
        return _TIMM_POSITIONS
    grid = image_pixels // cast(int, patch_pixels(network))
    positions = interpolate_positions(cast(Tensor, learned).data, patches_a_side=grid, rule=rule)
    network.pos_embed = nn.Parameter(positions, requires_grad=False)
    return str(rule)


def _resize_other(network: nn.Module, image_pixels: int, checkpoint: Checkpoint) -> str | None:
    """Prepare a network of another kind for images of another size, in place, and return the rule for its positions.

    Convolutional networks take nearly any size, others a few. Only a trial shows it.
    """
    has_input_size = hasattr(network, "set_input_size")
    try:
        if has_input_size:
            _set_input_size(network, image_pixels)
        elif isinstance(network, HubNetwork):
            _check_patches(network, image_pixels)
        with torch.inference_mode():
            run_network(network, torch.zeros(1, 3, image_pixels, image_pixels))
    except UsageError:
        raise
    except Exception as error:  # timm's networks raise whatever their layers do
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UsageError(
            f"--image-pixels {image_pixels}: {checkpoint.name} ({type(network).__name__}) takes no such images: {reason}",
            hint=f"Leave the option out; the network's own size is {checkpoint.image_pixels}.",
        ) from error
    if isinstance(network, HubNetwork):
        return "as transformers"
    return _TIMM_POSITIONS if has_input_size else None


def _find_readout(checkpoint: Checkpoint, network: nn.Module, image_pixels: int) -> Readout:
    if checkpoint.runs_own_code or checkpoint.format == "pixels" or _has_tokens(network):
        return Readout()
    return checkpoint.readout or find_readout(network, image_pixels)


def _check_patches(network: nn.Module, image_pixels: int) -> None:
    patch = patch_pixels(network) or 1
    if image_pixels % patch:
        raise UsageError(
            f"--image-pixels {image_pixels} is not a multiple of the patch size {patch}",
            hint=f"Use {max(1, image_pixels // patch) * patch} or {max(2, image_pixels // patch + 1) * patch}.",
        )


def _set_input_size(network: nn.Module, image_pixels: int) -> None:
    _check_patches(network, image_pixels)
    with warnings.catch_warnings():
        # timm interpolates tables of relative positions with arguments that torch warns about.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
        network.set_input_size(img_size=(image_pixels, image_pixels))  # type: ignore[operator]


def _has_tokens(network: nn.Module) -> bool:
    """Whether a network is a Transformer of timm whose tokens are available after every block."""
    if "timm" not in sys.modules:  # importing it takes seconds
        return False
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(network, VisionTransformer | Beit | Eva)


def _is_convolutional(checkpoint: Checkpoint, network: nn.Module) -> bool:
    """Whether to use channels-last memory: for timm's convolutional networks, not for a user's own."""
    is_foreign = checkpoint.runs_own_code or checkpoint.format == "pixels" or isinstance(network, HubNetwork)
    return not is_foreign and not _has_tokens(network)


def _compile(checkpoint: Checkpoint, network: nn.Module, readout: Readout) -> None:
    """Compile a network in place, so that weights keep their names: Transformers block by block, as equal blocks share code."""
    if checkpoint.runs_own_code or checkpoint.format == "pixels":
        network.compile()
    elif _has_tokens(network):
        for block in cast(nn.Sequential, network.blocks):
            block.compile()
    elif readout.norms_all or isinstance(network, HubNetwork):
        _log.warning("%s: --compile is for other networks; this one runs as it is", checkpoint.name)
    else:
        network.forward_features = torch.compile(network.forward_features)  # type: ignore[arg-type, assignment]


def _final_norm(network: nn.Module, readout: Readout) -> nn.Module:
    """Return the norm after the last block: `norm`, or `fc_norm` for architectures that pool first."""
    if not _has_tokens(network):
        return network.get_submodule(readout.norm) if readout.norm else nn.Identity()
    norm, fc_norm = cast(nn.Module, network.norm), cast(nn.Module, network.fc_norm)
    return fc_norm if isinstance(norm, nn.Identity) else norm


def _available_taps(checkpoint: Checkpoint, network: nn.Module, readout: Readout) -> tuple[str, ...]:
    if checkpoint.format == "pixels":
        return ("pixels",)
    if checkpoint.runs_own_code:  # its forward pass is the user's, even for a Vision Transformer of timm
        return ("out",)
    if not _has_tokens(network):
        return readout.taps
    if getattr(network, "attn_pool", None) is not None:
        return ("out",)
    if getattr(network, "cls_token", None) is None:
        return ("mean",)
    deep = len(network.blocks) >= _LAST_BLOCKS  # type: ignore[arg-type]
    return ("cls", "cls-norm", "mean", "cls4") if deep else ("cls", "cls-norm", "mean")


def resolve_tap(encoder: Encoder, wanted: str, *, by_hand: bool, option: str = "--tap") -> str:
    """Return the tap to use: `wanted` if the network has it, else the first that it has of mean, pool, out, pixels.

    Args:
        encoder: The encoder.
        wanted: Name of a tap.
        by_hand: The user named this tap, so no other one may replace it.
        option: The option that named it, for the error.

    Raises:
        UsageError: A tap that the user named does not exist.
    """
    if wanted in encoder.taps:
        return wanted
    if by_hand:
        raise UsageError(
            f"{option} {wanted}: {encoder.checkpoint.name} ({encoder.arch}) has no tap of this name",
            hint=f"It has: {', '.join(encoder.taps)}.",
        )
    return next(tap for tap in _FALLBACKS if tap in encoder.taps)


def encode(encoder: Encoder, pixels: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
    """Compute the features of a batch at several taps in one forward pass.

    Args:
        encoder: The encoder.
        pixels: (b, S, S, 3) uint8, on any device.
        taps: Names of taps that the encoder has.

    Returns:
        (b, d) float32 for each tap, on the encoder's device.
    """
    with torch.inference_mode(), exact_float32():
        images = normalise_pixels(pixels.to(encoder.device, non_blocking=True), encoder)
        if encoder.checkpoint.runs_own_code or encoder.checkpoint.format == "pixels":
            return {taps[0]: _run_module(encoder.network, encoder.checkpoint, images).float()}
        if not _has_tokens(encoder.network):
            return read_taps(encoder.network, encoder.readout, encoder.final_norm, images, taps)
        if "out" in taps:
            return {"out": cast(Tensor, encoder.network(images)).float()}
        return _token_taps(encoder, images, taps)


@contextlib.contextmanager
def check_frozen(encoder: Encoder) -> Iterator[None]:
    """Check before and after the block that the network is in evaluation mode and its weights have the same bytes.

    Raises:
        CheckpointError: A module is in training mode, or the weights have changed.
    """
    _check_evaluation_mode(encoder)
    before = weights_sha256(encoder.network.state_dict())
    yield
    _check_evaluation_mode(encoder)
    if weights_sha256(encoder.network.state_dict()) != before:
        raise CheckpointError(
            "its weights changed during feature extraction",
            where=encoder.checkpoint.path,
            hint="The forward pass of a frozen network must change nothing. Look for statistics that it updates.",
        )


def _check_evaluation_mode(encoder: Encoder) -> None:
    training = [name or "the network itself" for name, module in encoder.network.named_modules() if module.training]
    if training:
        are = "is" if len(training) == 1 else "are"
        raise CheckpointError(
            f"{len(training)} of its modules {are} in training mode ({', '.join(training[:3])})",
            where=encoder.checkpoint.path,
            hint="Features are extracted in evaluation mode. The forward pass must not call train().",
        )


def normalise_pixels(pixels: Tensor, encoder: Encoder) -> Tensor:
    """Normalise pixels in float32.

    Args:
        pixels: (b, S, S, 3) uint8.
        encoder: Encoder whose mean, standard deviation and dtype apply.

    Returns:
        (b, 3, S, S) in the network's dtype.
    """
    mean, std = encoder.mean_and_std.unbind()
    scaled = (pixels.float() / 255 - mean) / std
    images = scaled.permute(0, 3, 1, 2)  # channels-last in memory
    if not _is_convolutional(encoder.checkpoint, encoder.network):
        images = images.contiguous()
    return images.to(_DTYPES[encoder.precision])


def _run_module(network: nn.Module, checkpoint: Checkpoint, images: Tensor) -> Tensor:
    is_own = checkpoint.runs_own_code
    with guard_own_code("the module", where=checkpoint.path) if is_own else contextlib.nullcontext():
        return _check_features(network(images), checkpoint, len(images))


def _check_features(output: object, checkpoint: Checkpoint, images: int) -> Tensor:
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == images:
        return output
    kind = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise CheckpointError(
        f"the module returned {kind} for {images} images, not a tensor ({images}, d)",
        where=checkpoint.path,
        hint="It must map images (n, 3, S, S) to features (n, d).",
    )


def _token_taps(encoder: Encoder, images: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
    network, norm = encoder.network, encoder.final_norm
    plain = is_plain(network)
    # The last block is needed for all tokens only if a tap uses patches, or intermediate class tokens.
    run_last_block = not plain or not _CLASS_TOKEN_TAPS.issuperset(taps)
    depth = len(cast(nn.Sequential, network.blocks))
    blocks: list[Tensor | tuple[Tensor, Tensor]] = network.forward_intermediates(  # type: ignore[operator]
        images,
        indices=list(range(max(0, depth - _LAST_BLOCKS), depth)) if run_last_block else [depth - 2],
        return_prefix_tokens=True,
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    # timm returns the patches alone for networks without prefix tokens.
    outputs = [(block, block[:, :0]) if isinstance(block, Tensor) else block for block in blocks]
    patches, prefix = outputs[-1]
    if plain and not _CLASS_TOKEN_TAPS.isdisjoint(taps):
        # The same arithmetic whatever other taps are extracted: a feature must not depend on them.
        last_input = torch.cat(outputs[-2 if run_last_block else -1][::-1], dim=1)
        prefix = class_token_after(cast(nn.Sequential, network.blocks)[-1], last_input)[:, None]
    features: dict[str, Tensor] = {}
    for tap in taps:
        if tap == "cls":
            features[tap] = prefix[:, 0].float()
        elif tap == "cls-norm":
            features[tap] = norm(prefix[:, 0].float())
        elif tap == "cls4":
            features[tap] = torch.cat([norm(prefix_tokens[:, 0].float()) for _, prefix_tokens in outputs], dim=1)
        elif isinstance(network.norm, nn.Identity):  # this architecture pools first, then normalises
            features[tap] = norm(patches.float().mean(dim=1))
        else:
            features[tap] = norm(patches.float()).mean(dim=1)
    return features


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Disable TF32 and bf16 in float32 matrix products and convolutions inside the block.

    torch has two sets of these settings. It raises wherever it reads an older one that contradicts the newer ones, as in
    torch.compile and `torch.backends.cudnn.flags`, so both are set. An older one that raises
    before the block is not restored.
    """
    backends: Any = torch.backends
    settings = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    before = [setting.fp32_precision for setting in settings]
    restore: list[Callable[[], None]] = []
    with contextlib.suppress(RuntimeError):
        restore.append(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    with contextlib.suppress(RuntimeError):
        restore.append(partial(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32))
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = False
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for put_back in restore:
            put_back()
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
