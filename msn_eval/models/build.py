"""Trunk: the network of an architecture, built without its classifier, with drawn weights or with none."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import nn

from msn_eval.errors import CheckpointError, did_you_mean
from msn_eval.models.architectures import Architecture

_MOST_TABLE_BYTES = 2 << 30
_MOST_PARAMETERS = 10_000  # tensors; the published networks have a few hundred
# Of residual networks for images of 32 pixels, by the padding: a 3 x 3 convolution of stride 1 comes first, and no max-pool.
_STEM_PADDING = {"cifar": 1, "cifar_padded": 2}
_STEM_PIXELS = 32


def build_network(architecture: Architecture, *, seed: int = 0) -> nn.Module:
    """Build the trunk in eval mode on the CPU, its weights drawn from `seed` without touching the global generator.

    Raises CheckpointError for a name that timm does not know or keywords that it does not take.
    """
    check_architecture_name(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _constructed(architecture).eval()


def outline_network(architecture: Architecture) -> nn.Module:
    """Build the trunk without memory, on the meta device: its weights have names and shapes and no values.

    Raises CheckpointError as `build_network` does, and where tables that are in no file, such as BEiT's of offsets between
    patches, would take more memory than any published network's.
    """
    check_architecture_name(architecture)
    with torch.device("meta"):
        outline = _constructed(architecture)
    table_bytes = sum(table.numel() * table.element_size() for table in outline.buffers())
    if table_bytes > _MOST_TABLE_BYTES:
        raise CheckpointError(
            f"{architecture.name} needs {table_bytes:,} bytes for tables beside its weights",
            hint="Is it made for images of this size? Name its architecture: --arch NAME.",
        )
    return outline


def _constructed(architecture: Architecture) -> nn.Module:
    import timm

    try:
        with _few_parameters():
            if architecture.timm_name is None:
                return _described(architecture)
            network: nn.Module = timm.create_model(
                architecture.timm_name, pretrained=False, num_classes=0, **architecture.keywords
            )
            return network if architecture.stem is None else _with_stem(network, architecture.stem)
    except Exception as error:  # timm lets through whatever its keywords lead to
        raise _unbuildable(architecture, error) from error


def _with_stem(network: nn.Module, stem: str) -> nn.Module:
    """Let a residual network see images of 32 pixels. Raises ValueError for one that has no such stem."""
    from timm.models.resnet import ResNet

    if stem not in _STEM_PADDING or not isinstance(network, ResNet) or not isinstance(network.conv1, nn.Conv2d):
        raise ValueError(f"stem={stem} is one of {', '.join(_STEM_PADDING)}, and for residual networks alone")
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=_STEM_PADDING[stem], bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's other convolutions
    network.maxpool = nn.Identity()
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, _STEM_PIXELS, _STEM_PIXELS)}
    return cast(nn.Module, network)


@contextlib.contextmanager
def _few_parameters() -> Iterator[None]:
    """Have the building of a network of no end stopped, whatever keyword makes it one."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def counted(module: nn.Module, name: str, parameter: object) -> None:
        nonlocal count
        count += 1
        if count > _MOST_PARAMETERS:
            raise ValueError(f"it has more than {_MOST_PARAMETERS:,} weights")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _described(architecture: Architecture) -> nn.Module:
    """Build a Transformer that timm may have no entry for, from what its weights told."""
    from timm.layers import LayerNorm, SwiGLUPacked
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    keywords = dict(architecture.keywords)
    if architecture.gated:
        keywords["mlp_layer"], keywords["act_layer"] = SwiGLUPacked, nn.SiLU
    norm_layer = partial(LayerNorm, eps=architecture.norm_eps)
    transformer = Beit if architecture.kind == "beit" else VisionTransformer
    return cast(nn.Module, transformer(num_classes=0, norm_layer=norm_layer, **keywords))


def _unbuildable(architecture: Architecture, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"no network can be built from {architecture.name!r:.200}: {type(error).__name__}: {str(error)[:200]}",
        hint="`msn-eval ls checkpoints` shows how architectures and their keywords are written.",
    )


def check_architecture_name(architecture: Architecture) -> None:
    """Raise CheckpointError for a name that timm does not know, with the nearest that it does."""
    import timm

    base = (architecture.timm_name or "").partition(".")[0]
    if base and not timm.is_model(base):
        raise CheckpointError(
            f"timm knows no architecture {base!r}.{did_you_mean(base, timm.list_models())}",
            hint="timm.list_models() lists their names; a file needs its path.",
        )
