"""Families: how published files lay out their networks, and which network their authors evaluate.

A family is one branch of `choose_network` (which dictionary of the file) and one of `trunk_weights` (its names in
timm's naming, its heads dropped).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from msn_eval.errors import CheckpointError

_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True, kw_only=True)
class StoredNetwork:
    """One of the networks in a file.

    key:     the entry of the file that holds it, None where the file is the state dict itself
    tensors: by the file's names
    epoch:   as the file states it
    """

    key: str | None
    tensors: Mapping[str, Tensor]
    epoch: int | None


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """The evaluated weights in timm's naming, without heads.

    format:  the family: msn, timm, torchvision, or other
    weights: by name
    dropped: names of head weights that were left out
    """

    format: str
    weights: Mapping[str, Tensor]
    dropped: tuple[str, ...]


def choose_network(content: object, key: str | None, *, where: str) -> StoredNetwork:
    """Choose the network to evaluate: the one asked for by `key`, else the target encoder, else the only one.

    Raises CheckpointError listing the candidates where the choice is open.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"holds a {type(content).__name__}, not a state dict", where=where, remedy="Save model.state_dict()."
        )
    candidates = _candidates(content)
    epoch = content.get("epoch")
    if key is None and "target_encoder" in candidates:
        chosen: str | None = "target_encoder"
    elif key is None and len(candidates) == 1:
        chosen = next(iter(candidates))
    elif key in candidates and key is not None:
        chosen = key
    else:
        raise _open_choice(candidates, key, where)
    return StoredNetwork(key=chosen, tensors=candidates[chosen], epoch=epoch if isinstance(epoch, int) else None)


def _candidates(content: Mapping[str, object]) -> dict[str | None, Mapping[str, Tensor]]:
    flat = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    found: dict[str | None, Mapping[str, Tensor]] = {}
    # A network's weights have dotted names; a lone tensor such as MSN's prototypes beside a network has not.
    if flat and (len(flat) == len(content) or any("." in name for name in flat)):
        found[None] = flat
    for name, entry in content.items():
        if isinstance(entry, Mapping):
            tensors = {str(inner): value for inner, value in entry.items() if isinstance(value, Tensor)}
            if tensors:
                found[str(name)] = tensors
    return found


def _open_choice(candidates: Mapping[str | None, Mapping[str, Tensor]], key: str | None, where: str) -> CheckpointError:
    listed = "".join(
        f"\n  {name or '(the file itself)'}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values"
        for name, tensors in candidates.items()
    )
    if not candidates:
        return CheckpointError("holds no tensors", where=where, remedy="Save model.state_dict().")
    asked = f"has no network {key!r}; it holds" if key else "holds several networks"
    return CheckpointError(f"{asked}:{listed}", where=where, remedy="Choose one by name: --checkpoint-key NAME.")


def trunk_weights(network: StoredNetwork) -> Trunk:
    """Give the trunk of a stored network in timm's naming."""
    tensors = _unwrap(network.tensors)
    if "patch_embed.proj.weight" in tensors:
        # MSN's encoders carry their projection head as `fc`; timm's classifier is `head`.
        if network.key == "target_encoder" or any(name.startswith("fc.") for name in tensors):
            return _without_heads("msn", tensors, ("fc.",))
        return _without_heads("timm", tensors, ("head.", "head_dist."))
    if "conv_proj.weight" in tensors:
        return _without_heads("torchvision", {_rename_torchvision(name): t for name, t in tensors.items()}, ("heads.",))
    if "layer1.0.conv1.weight" in tensors:
        return _without_heads("torchvision", tensors, ("fc.",))
    return _without_heads("other", tensors, ("head.", "fc.", "classifier."))


def _unwrap(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take off what DistributedDataParallel and torch.compile put before every name."""
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            return _unwrap({name.removeprefix(wrapper): tensor for name, tensor in tensors.items()})
    return tensors


def _without_heads(family: str, tensors: Mapping[str, Tensor], heads: tuple[str, ...]) -> Trunk:
    dropped = tuple(name for name in tensors if name.startswith(heads))
    return Trunk(
        format=family,
        weights={name: tensor for name, tensor in tensors.items() if name not in dropped},
        dropped=dropped,
    )


_TORCHVISION_NAMES = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)\.", r"blocks.\1.norm\2."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
)


def _rename_torchvision(name: str) -> str:
    for pattern, replacement in _TORCHVISION_NAMES:
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    return name
