"""The networks in a file: where each stands, and which of them its method's authors evaluate."""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msn_eval.errors import CheckpointError

Equal = Callable[[Tensor, Tensor], bool]

# A weight that every network of a layout has, from which the place of a whole network in a file is read.
_ANCHORS = (
    "patch_embed.proj.weight",  # timm's Vision Transformers and the many that were copied from them
    "conv_proj.weight",  # torchvision's Vision Transformer
    "embeddings.patch_embeddings.projection.weight",  # Hugging Face's
    "layer1.0.conv1.weight",  # residual networks
    "4.0.conv1.weight",  # residual networks as nn.Sequential(*list(network.children())[:-1])
)
# What training tools put between the names of a module and of its parameters.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel, which otherwise holds the names of its network
_DEEPEST = 4
_MOST_WORDS = 16
_SHOWN = 10
_MOST_COMPARED = 100  # each with each other


@dataclass(frozen=True)
class _Choice:
    """Of two networks that stand beside each other in a file, the one that is evaluated, and by whom."""

    evaluated: str
    rival: str
    whose: str


_CHOICES = (
    _Choice("target_encoder", "encoder", "the target encoder, which MSN and I-JEPA evaluate"),
    _Choice("teacher", "student", "the teacher, which DINO and its successors evaluate"),
    _Choice("encoder_q", "encoder_k", "the query encoder, which MoCo evaluates"),
    _Choice("base_encoder", "momentum_encoder", "the base encoder, which MoCo v3 evaluates"),
    _Choice("online_encoder", "target_encoder", "the online encoder, which BYOL evaluates"),
    _Choice("encoder", "momentum_encoder", "the encoder itself, which solo-learn evaluates"),
    _Choice("backbone", "momentum_backbone", "the backbone itself, which solo-learn evaluates"),
    _Choice("backbone", "backbone_momentum", "the backbone itself, which lightly evaluates"),
    _Choice("backbone", "anchor_backbone", "the target network, which lightly keeps as `backbone`"),
    _Choice("backbone", "student_backbone", "the teacher, which lightly keeps as `backbone`"),
    _Choice("teacher_backbone", "student_backbone", "the teacher, which lightly evaluates"),
)


@dataclass(frozen=True, kw_only=True)
class StoredNetwork:
    """One of the networks in a file.

    key:     as --checkpoint-key takes it, None where the file is one network's state dict
    words:   of its place in the file, such as `state_dict` and `encoder_q`
    tensors: by their names within the network
    beside:  what else stands in the same state dict and belongs to no network: heads, queues, prototypes
    """

    key: str | None
    words: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def values(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class ChosenNetwork:
    """The network that is evaluated, why, and which of the file's others would have gone before it."""

    network: StoredNetwork
    why: str
    passed_over: StoredNetwork | None = None


def find_networks(content: Mapping[str, object]) -> tuple[StoredNetwork, ...]:
    """Find the networks in a file's content, told by the weights that mark a layout; where there are none, by dictionaries
    of tensors."""
    state_dicts = dict(_state_dicts(content, ()))
    trunks = [one for path, tensors in state_dicts.items() for one in _trunks(path, tensors)]
    return tuple(
        trunks or (_whole(path, tensors) for path, tensors in state_dicts.items() if _is_network(path, tensors))
    )


def choose_network(
    networks: tuple[StoredNetwork, ...], key: str | None, *, where: str, are_equal: Equal = torch.equal
) -> ChosenNetwork:
    """Choose the network to evaluate: the one called `key`, else the one that the method's authors evaluate.

    are_equal: compares the values of two tensors of one shape
    Raises CheckpointError listing the candidates where the choice is open.
    """
    if not networks:
        raise CheckpointError("holds no network: no tensors by name", where=where, hint="Save model.state_dict().")
    asked = tuple(network for network in networks if key is None or key in _spellings(network))
    if not asked:
        raise _open_choice(f"has no network {key!r}; it holds", networks, where)
    if len(asked) > _MOST_COMPARED:
        raise _open_choice("holds very many networks", asked, where)
    best, why = _evaluated(asked)
    if len(best) > 1 and not _all_equal(best, are_equal):
        raise _open_choice("holds several networks", best, where)
    chosen = min(best, key=lambda network: len(network.words))
    if len(best) > 1:
        why = f"stored {len(best)} times with equal weights"
    elif key is not None:
        why = "asked for by --checkpoint-key"
    return ChosenNetwork(network=chosen, why=why, passed_over=_better_than(chosen, networks))


def _state_dicts(
    content: Mapping[str, object], path: tuple[str, ...]
) -> Iterable[tuple[tuple[str, ...], dict[str, Tensor]]]:
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield path, _unwrapped(tensors)
    if len(path) < _DEEPEST:
        for name, value in content.items():
            if isinstance(value, Mapping):
                yield from _state_dicts(value, (*path, name))


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take wrappers out of names, unless two weights would then be called the same."""
    plain = {
        ".".join(word for word in name.split(".") if word not in _WRAPPERS): tensor for name, tensor in tensors.items()
    }
    return plain if len(plain) == len(tensors) and "" not in plain else dict(tensors)


def _trunks(path: tuple[str, ...], tensors: Mapping[str, Tensor]) -> list[StoredNetwork]:
    prefixes = sorted(
        {name.removesuffix(anchor) for name in tensors for anchor in _ANCHORS if _ends_with(name, anchor)}
    )
    owned: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    beside: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner = _owner(name, owned)
        if owner is None or name in _COUNTERS:
            beside[name] = tensor
        else:
            owned[owner][name.removeprefix(owner)] = tensor
    if len(prefixes) == 1:
        _reunite(owned[prefixes[0]], beside)
    return [
        StoredNetwork(
            key=".".join([*path, *(_words(prefix) if len(prefixes) > 1 else ())]) or None,
            words=(*path, *_words(prefix)),
            tensors=owned[prefix],
            beside=beside,
        )
        for prefix in prefixes
    ]


def _owner(name: str, prefixes: Container[str]) -> str | None:
    """Give the longest of the prefixes that a name has; walked word by word, since a file may claim many networks."""
    words = name.split(".", _MOST_WORDS)[:-1]
    starts = (".".join(words[:count]) + "." for count in range(len(words), 0, -1))
    return next((start for start in (*starts, "") if start in prefixes), None)


def _reunite(network: dict[str, Tensor], beside: dict[str, Tensor]) -> None:
    """Move the blocks to their embeddings, which transformers 5 writes without their prefix for
    ViTMSNForImageClassification: `vit.embeddings.…` beside `encoder.layer.…`."""
    if "embeddings.patch_embeddings.projection.weight" in network and not any(
        name.startswith("encoder.") for name in network
    ):
        for name in [name for name in beside if name.startswith("encoder.layer.")]:
            network[name] = beside.pop(name)


def _ends_with(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _words(prefix: str) -> tuple[str, ...]:
    return tuple(word for word in prefix.split(".") if word)


def _is_network(path: tuple[str, ...], tensors: Mapping[str, Tensor]) -> bool:
    # A network's weights have dotted names; a lone tensor such as MSN's prototypes beside a network has not.
    return bool(path) or any("." in name for name in tensors)


def _whole(path: tuple[str, ...], tensors: Mapping[str, Tensor]) -> StoredNetwork:
    return StoredNetwork(key=".".join(path) or None, words=path, tensors=tensors)


def _spellings(network: StoredNetwork) -> set[str]:
    """Give what --checkpoint-key may call a network: its whole place, or any word of it."""
    place = ".".join(network.words)
    return {place, f"module.{place}", network.key or "", *network.words} - {""}


def _evaluated(networks: tuple[StoredNetwork, ...]) -> tuple[tuple[StoredNetwork, ...], str]:
    """Give the networks that no other goes before, and why the rest was left."""
    if len(networks) == 1:
        return networks, "the only network"
    best = tuple(one for one in networks if _better_than(one, networks) is None)
    reasons = {choice.whose for one in best for other in networks if (choice := _preference(one, other)) is not None}
    return best, "; ".join(sorted(reasons))


def _better_than(network: StoredNetwork, networks: Iterable[StoredNetwork]) -> StoredNetwork | None:
    return next((other for other in networks if _preference(other, network) is not None), None)


def _preference(one: StoredNetwork, other: StoredNetwork) -> _Choice | None:
    """Give the choice by which `one` goes before `other`, if there is one."""
    mine, theirs = set(one.words) - set(other.words), set(other.words) - set(one.words)
    return next((choice for choice in _CHOICES if choice.evaluated in mine and choice.rival in theirs), None)


def _all_equal(networks: tuple[StoredNetwork, ...], are_equal: Equal) -> bool:
    """Tell whether networks hold the same weights under the same names, as where a module was registered twice."""
    first = networks[0].tensors
    return all(
        other.tensors.keys() == first.keys()
        and all(one.shape == (two := other.tensors[name]).shape and are_equal(one, two) for name, one in first.items())
        for other in networks[1:]
    )


def _open_choice(what: str, networks: tuple[StoredNetwork, ...], where: str) -> CheckpointError:
    listed = "".join(
        f"\n  {network.key or '(the file itself)'}: {len(network.tensors)} tensors, {network.values:,} values"
        for network in networks[:_SHOWN]
    )
    listed += f"\n  and {len(networks) - _SHOWN:,} more" if len(networks) > _SHOWN else ""
    return CheckpointError(f"{what}:{listed}", where=where, hint="Choose one by name: --checkpoint-key NAME.")


def stated_epoch(content: Mapping[str, object]) -> int | None:
    """Give the epoch that a file states, None where it states none."""
    epoch = content.get("epoch")
    if isinstance(epoch, str) and re.fullmatch(r"\d{1,9}", epoch):
        return int(epoch)
    return epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None
