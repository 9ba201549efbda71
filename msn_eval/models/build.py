"""Build the network of an architecture without its classifier, with random weights or without memory."""

import itertools
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle

from msn_eval.errors import CheckpointError, ResourceError, did_you_mean
from msn_eval.models.architectures import Architecture
from msn_eval.models.hub import build_hub
from msn_eval.process import available_bytes

_MAX_TABLE_BYTES = 2 << 30
_MAX_PARAMETERS = 10_000  # tensors; the published networks have a few hundred
# Padding of the stems of residual networks for 32-pixel images: a 3 x 3 convolution of stride 1, without max-pool.
_STEM_PADDING = {"cifar": 1, "cifar_padded": 2}


def build_network(architecture: Architecture, *, seed: int = 0) -> nn.Module:
    """Build the network in eval mode on the CPU, with random weights from `seed`; the global generator is left alone.

    Raises:
        CheckpointError: timm does not know the name or does not accept the keywords.
        ResourceError: The memory does not suffice.
    """
    if architecture.keywords and architecture.timm_name is not None:
        _check_memory(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _construct(architecture).eval()


def outline_network(architecture: Architecture) -> nn.Module:
    """Build the network on the meta device: its weights have names and shapes and no values.

    Raises:
        CheckpointError: As `build_network`, and where tables that are not in the file, such as BEiT's offsets between
            patches, would need more memory than in any published network.
    """
    with torch.device("meta"):
        outline = _construct(architecture)
    table_bytes = sum(table.nbytes for table in outline.buffers())
    if table_bytes > _MAX_TABLE_BYTES:
        what = f"{architecture.name} needs {table_bytes:,} bytes for tables beside its weights"
        raise CheckpointError(what, hint="Is it made for images of this size? Name its architecture: --arch NAME.")
    return outline


def _check_memory(architecture: Architecture) -> None:
    """Raise ResourceError where keywords make a network larger than the memory, in which the system would end the process."""
    needed = sum(tensor.nbytes for tensor in outline_network(architecture).state_dict().values())
    free = available_bytes()
    if free is not None and needed > free:
        what = f"{architecture.name:.200} has weights of {needed:,} bytes, the free memory {free:,}"
        raise ResourceError(what, hint="Use a smaller network, or a machine with more memory.")


def _construct(architecture: Architecture) -> nn.Module:
    import timm
    from timm.layers import LayerNorm, SwiGLUPacked
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    check_architecture_name(architecture)
    keywords: dict[str, Any] = {**architecture.keywords}
    with _limit_parameters():
        if architecture.hub is not None:
            return build_hub(architecture.hub)
        try:
            if architecture.timm_name is None:  # a Transformer that timm may not have an entry for
                keywords |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if architecture.gated else {}
                transformer = Beit if architecture.kind == "beit" else VisionTransformer
                norm = partial(LayerNorm, eps=architecture.norm_eps)
                return cast(nn.Module, transformer(num_classes=0, norm_layer=norm, **keywords))
            network: nn.Module = timm.create_model(architecture.timm_name, num_classes=0, **keywords)
            if isinstance(side := keywords.get("img_size"), int):
                stated = cast(dict[str, Any], network.pretrained_cfg)
                network.pretrained_cfg = {**stated, "input_size": (3, side, side)}  # type: ignore[assignment]
            return network if architecture.stem is None else _replace_stem(network, architecture.stem)
        except Exception as error:  # timm does not catch what its keywords cause
            what = f"timm cannot build {architecture.name!r:.200}: {type(error).__name__}: {str(error)[:200]}"
            hint = "`msn-eval ls checkpoints` shows how architectures and their keywords are written."
            raise CheckpointError(what, hint=hint) from error


def _replace_stem(network: nn.Module, stem: str) -> nn.Module:
    """Replace the stem of a residual network by one for images of 32 pixels."""
    from timm.models.resnet import ResNet

    if stem not in _STEM_PADDING or not isinstance(network, ResNet) or not isinstance(network.conv1, nn.Conv2d):
        raise ValueError(f"stem={stem} is for residual networks only, and one of {', '.join(_STEM_PADDING)}")
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=_STEM_PADDING[stem], bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's other convolutions
    network.maxpool = nn.Identity()
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 32, 32)}
    return cast(nn.Module, network)


def _limit_parameters() -> RemovableHandle:
    """Stop the construction of a network that is too large, whichever keyword makes it so, until the handle is removed."""
    numbers = itertools.count(1)

    def check_count(module: nn.Module, name: str, parameter: object) -> None:
        if next(numbers) > _MAX_PARAMETERS:
            raise ValueError(f"it has more than {_MAX_PARAMETERS:,} weights")

    return register_module_parameter_registration_hook(check_count)


def check_architecture_name(architecture: Architecture) -> None:
    """Raise CheckpointError, with the nearest name, for a name that timm does not know."""
    import timm

    base = (architecture.timm_name or "").partition(".")[0]
    if base and not timm.is_model(base):
        what = f"timm knows no architecture {base!r}.{did_you_mean(base, timm.list_models())}"
        raise CheckpointError(what, hint="timm.list_models() lists their names; a file needs its path.")
