"""Readout: where the features are in what a network of another library computes, found by a trial on noise."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from msn_eval.errors import CheckpointError
from msn_eval.models.hub import HubNetwork
from msn_eval.process import describe_exhausted_resource

_NORM = re.compile(r"(Layer|R[Mm][Ss])Norm(Fp32)?$")  # of tokens; those of maps end in 2d
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")
_CLASS_TOKEN = re.compile(r"(cls|class)_(token|emb)")


@dataclass(frozen=True, kw_only=True)
class Readout:
    """The taps of a network and how they are read.

    Attributes:
        taps: In the order of `encoder.TAPS`. `pool` and `out` are what the library itself returns.
        norm: Name of the norm after the last block, "" where there is none.
        norms_all: Whether that norm is applied to all tokens; its input is then the output of the last block.
        pools_first: Whether it is applied to the average of the patches.
        prefix: Number of tokens before the patches.
    """

    taps: tuple[str, ...] = ("pool",)
    norm: str = ""
    norms_all: bool = False
    pools_first: bool = False
    prefix: int = 0


def find_readout(network: nn.Module, image_pixels: int) -> Readout:
    """Find the taps of a network of timm or transformers.

    Nothing is taken from names alone: a norm counts if its output or input is, in a trial, that of the features.

    Raises:
        CheckpointError: The network does not run on such images alone, or its tokens cannot be told apart.
    """
    try:
        return _try_network(network, image_pixels)
    except Exception as error:  # networks raise whatever their layers do
        if describe_exhausted_resource(error) is not None:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        kind = type(network.tower if isinstance(network, HubNetwork) else network).__name__
        what = f"{kind} cannot be evaluated on images of {image_pixels} pixels: {reason}"
        raise CheckpointError(what, hint="Wrap the network: py:package.module:factory.") from error


@torch.no_grad()
def _try_network(network: nn.Module, image_pixels: int) -> Readout:
    calls: list[tuple[str, Tensor, Tensor]] = []
    names = {module: name for name, module in network.named_modules() if not _IN_BLOCK.search(name)}

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in names and _NORM.search(type(module).__name__):
            calls.append((names[module], inputs[0], output))

    noise = torch.randn(1, 3, image_pixels, image_pixels, generator=torch.Generator().manual_seed(0))
    with register_module_forward_hook(record):
        last, pooled = run_network(network, noise)
    if isinstance(cast(object, last), list):  # tokens of several scales
        return Readout()
    inside = next((name for name, _, made in calls if made.shape == last.shape and made.equal(last)), "")
    if isinstance(network, HubNetwork):
        prefix, has_class = network.count_prefix(noise, last)
    else:
        has_token = isinstance(getattr(network, "cls_token", None), Tensor)
        has_class = has_token and getattr(network, "num_prefix_tokens", 0) == 1
        prefix = int(has_class)
        if not has_class and any(_CLASS_TOKEN.search(name) for name, _ in network.named_parameters()):
            return Readout()
    if prefix is None or (last.dim() == 4 and not inside) or last.dim() < 3:
        if pooled is None:
            raise ValueError("it does not pool, and does not show which of its tokens are patches")
        return Readout()
    tokens = last.flatten(1, -2)
    mean = tokens[:, prefix:].mean(dim=1)
    on_first = next((name for name, given, _ in calls if _is_close(given, tokens[:, 0])), "")
    on_mean = next((name for name, given, _ in calls if _is_close(given, mean)), "")
    norm = inside or on_mean or (on_first if has_class else "")
    pools_first = bool(on_mean) and not inside
    if pools_first:
        mean = cast(Tensor, network.get_submodule(norm)(mean))
    if not norm and not isinstance(network, HubNetwork):
        return Readout()
    taps: tuple[str, ...]
    if has_class:
        taps = ("cls", "cls-norm", "mean") if norm else ("cls", "mean")
    elif pooled is None or (on_first and not on_mean):  # what is made of the first patch alone is not pooled
        taps = ("mean",)
    else:
        taps = ("mean", "pool") if _is_close(pooled, mean) else ("out",)
    return Readout(taps=taps, norm=norm, norms_all=bool(inside), pools_first=pools_first, prefix=prefix)


def run_network(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the last tokens or maps of a network, and the features that its library pools, None where it does not."""
    if isinstance(network, HubNetwork):
        return network.run(images)
    last = network.forward_features(images)  # type: ignore[operator]
    return last, network.forward_head(last, pre_logits=True)  # type: ignore[operator]


def read_taps(
    network: nn.Module, readout: Readout, norm: nn.Module, images: Tensor, taps: Sequence[str]
) -> dict[str, Tensor]:
    """Compute the features of a batch at several taps.

    Args:
        network: The network.
        readout: Of the network.
        norm: Its norm after the last block, in float32.
        images: (b, 3, S, S), normalised, in the network's dtype.
        taps: Of the readout.

    Returns:
        (b, d) float32 for each tap.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    module = network.get_submodule(readout.norm if readout.norms_all else "")
    with module.register_forward_hook(lambda module, inputs, made: calls.append((inputs[0], made))):
        last, pooled = run_network(network, images)
    if {*taps} <= {"pool", "out"}:
        return dict.fromkeys(taps, cast(Tensor, pooled).float())
    # The network may use its norm again, for its own pooling.
    same = (given for given, made in calls if made.shape == last.shape and (len(calls) == 1 or made.equal(last)))
    raw = (next(same) if readout.norms_all else last).flatten(1, -2)
    features: dict[str, Tensor] = {}
    for tap in taps:
        if tap in ("pool", "out"):
            features[tap] = cast(Tensor, pooled).float()
        elif tap == "mean":
            patches = raw[:, readout.prefix :].float()
            features[tap] = norm(patches.mean(dim=1)) if readout.pools_first else norm(patches).mean(dim=1)
        else:
            features[tap] = norm(raw[:, 0].float()) if tap == "cls-norm" else raw[:, 0].float()
    return features


def _is_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * other.abs().max())
