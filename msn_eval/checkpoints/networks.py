"""The networks in a file: where they are, and which of them its method's authors evaluate."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msn_eval.errors import CheckpointError, format_count, list_first

FAMILIES = {
    "embeddings.patch_embeddings.projection.weight": "msn_eval.checkpoints.families:read_huggingface",
    "conv_proj.weight": "msn_eval.checkpoints.families:read_torchvision_vit",
    "4.0.conv1.weight": "msn_eval.checkpoints.families:read_sequential_resnet",
    "layer1.0.conv1.weight": "msn_eval.checkpoints.families:read_resnet",
    "patch_embed.proj.weight": "msn_eval.checkpoints.families:read_vit",
}
"""Families of file layouts, in the order in which they are tried. To add one, write a module and add a line.

The key, the family's anchor, is the name of a weight that each network of the layout has and no earlier layout has; where
it occurs in a file, after any prefix, there is a network. The value, `package.module:function`, is a function that gets
the `StoredNetwork` and returns its `families.Backbone`: the weights by timm's names, without heads. It must not lose a
weight without listing it in `dropped`; what does not fit timm's network is refused later.
"""

# What training tools insert between the names of a module and of its parameters.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_MAX_DEPTH = 4
_MAX_WORDS = 16
_MAX_SHOWN = 10
_MAX_COMPARED = 100  # all pairs are compared


# Of two networks beside each other in a file: the one that is evaluated, the other one, and by whom.
_PREFERENCES = (
    ("target_encoder", "encoder", "the target encoder, which MSN and I-JEPA evaluate"),
    ("teacher", "student", "the teacher, which DINO and its successors evaluate"),
    ("encoder_q", "encoder_k", "the query encoder, which MoCo evaluates"),
    ("base_encoder", "momentum_encoder", "the base encoder, which MoCo v3 evaluates"),
    ("online_encoder", "target_encoder", "the online encoder, which BYOL evaluates"),
    ("encoder", "momentum_encoder", "the encoder itself, which solo-learn evaluates"),
    ("backbone", "momentum_backbone", "the backbone itself, which solo-learn evaluates"),
    ("backbone", "backbone_momentum", "the backbone itself, which lightly evaluates"),
    ("backbone", "anchor_backbone", "the target network, which lightly keeps as `backbone`"),
    ("backbone", "student_backbone", "the teacher, which lightly keeps as `backbone`"),
    ("teacher_backbone", "student_backbone", "the teacher, which lightly evaluates"),
)


@dataclass(frozen=True, kw_only=True)
class StoredNetwork:
    """One of the networks in a file.

    Attributes:
        key: As --checkpoint-key takes it, None where the file is one network's state dict.
        words: The path in the file, such as `state_dict` and `encoder_q`.
        tensors: By their names within the network.
        beside: What else is in the same state dict and belongs to no network: heads, queues, prototypes.
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
    """The network that is evaluated, the reason, and the file's network that its authors would rather evaluate."""

    network: StoredNetwork
    why: str
    passed_over: StoredNetwork | None = None


def find_networks(content: Mapping[str, object]) -> tuple[StoredNetwork, ...]:
    """Find the networks in a file's content by their families' anchors; without anchors, by dictionaries of tensors."""
    state_dicts = dict(_find_state_dicts(content, ()))
    networks = [network for path, tensors in state_dicts.items() for network in _split_state_dict(path, tensors)]
    if networks:
        return tuple(networks)
    # The weights of a network have dotted names; a lone tensor such as MSN's prototypes does not.
    return tuple(
        StoredNetwork(key=".".join(path) or None, words=path, tensors=tensors)
        for path, tensors in state_dicts.items()
        if path or any("." in name for name in tensors)
    )


def choose_network(networks: tuple[StoredNetwork, ...], key: str | None, *, where: str) -> ChosenNetwork:
    """Choose the network to evaluate: the one called `key`, or else the one that the method's authors evaluate.

    Raises:
        CheckpointError: There is no such network, or several; the candidates are listed.
    """
    if not networks:
        raise CheckpointError("holds no network: no tensors by name", where=where, hint="Save model.state_dict().")
    candidates = tuple(network for network in networks if key is None or key in _spellings(network))
    if not candidates:
        raise _open_choice(f"has no network {key!r}; it holds", networks, where)
    if len(candidates) > _MAX_COMPARED:
        raise _open_choice("holds very many networks", candidates, where)
    best = tuple(network for network in candidates if _find_better(network, candidates) is None)
    if len(best) > 1 and not _are_equal(best):
        raise _open_choice("holds several networks", best, where)
    if len(best) > 1:
        why = f"stored {len(best)} times with equal weights"
    elif key is not None:
        why = "asked for by --checkpoint-key"
    elif len(candidates) == 1:
        why = "the only network"
    else:
        why = "; ".join(sorted({_prefer(best[0], network) for network in candidates} - {""}))
    chosen = min(best, key=lambda network: len(network.words))
    return ChosenNetwork(network=chosen, why=why, passed_over=_find_better(chosen, networks))


def _find_state_dicts(
    content: Mapping[str, object], path: tuple[str, ...]
) -> Iterable[tuple[tuple[str, ...], dict[str, Tensor]]]:
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield path, _remove_wrappers(tensors)
    if len(path) < _MAX_DEPTH:
        for name, value in content.items():
            if isinstance(value, Mapping):
                yield from _find_state_dicts(value, (*path, name))


def _remove_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrappers from names, unless two weights would then have the same name."""
    plain = {
        ".".join(word for word in name.split(".") if word not in _WRAPPERS): tensor for name, tensor in tensors.items()
    }
    return plain if len(plain) == len(tensors) and "" not in plain else dict(tensors)


def _split_state_dict(path: tuple[str, ...], tensors: Mapping[str, Tensor]) -> list[StoredNetwork]:
    anchored = [(name, anchor) for name in tensors for anchor in FAMILIES if f".{name}".endswith(f".{anchor}")]
    prefixes = sorted({name.removesuffix(anchor) for name, anchor in anchored})
    owned: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    beside: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner = _find_owner(name, owned)
        if owner is None or name == "n_averaged":  # a counter of torch.optim.swa_utils.AveragedModel
            beside[name] = tensor
        else:
            owned[owner][name.removeprefix(owner)] = tensor
    if len(prefixes) == 1:
        _move_blocks(owned[prefixes[0]], beside)
    words = {prefix: (*path, *filter(None, prefix.split("."))) for prefix in prefixes}
    keys = {prefix: ".".join(words[prefix] if len(prefixes) > 1 else path) or None for prefix in prefixes}
    return [StoredNetwork(key=keys[at], words=words[at], tensors=owned[at], beside=beside) for at in prefixes]


def _find_owner(name: str, prefixes: Container[str]) -> str | None:
    """Return the longest of the prefixes that a name has. Looked up word by word, since a file may have many networks."""
    words = name.split(".", _MAX_WORDS)[:-1]
    starts = (".".join(words[:count]) + "." for count in range(len(words), 0, -1))
    return next((start for start in (*starts, "") if start in prefixes), None)


def _move_blocks(network: dict[str, Tensor], beside: dict[str, Tensor]) -> None:
    """Move the blocks to their embeddings; for ViTMSNForImageClassification transformers 5 writes them without their
    prefix: `vit.embeddings.…` beside `encoder.layer.…`."""
    has_blocks = any(name.startswith("encoder.") for name in network)
    if "embeddings.patch_embeddings.projection.weight" in network and not has_blocks:
        for name in [name for name in beside if name.startswith("encoder.layer.")]:
            network[name] = beside.pop(name)


def _spellings(network: StoredNetwork) -> set[str]:
    """Return the names that --checkpoint-key may use: the complete path, or any word of it."""
    path = ".".join(network.words)
    return {path, f"module.{path}", network.key or "", *network.words} - {""}


def _find_better(network: StoredNetwork, networks: Iterable[StoredNetwork]) -> StoredNetwork | None:
    return next((rival for rival in networks if _prefer(rival, network)), None)


def _prefer(network: StoredNetwork, rival: StoredNetwork) -> str:
    """Return why `network` is evaluated rather than `rival`, an empty string where no rule says so."""
    own, others = set(network.words) - set(rival.words), set(rival.words) - set(network.words)
    return next((why for evaluated, other, why in _PREFERENCES if evaluated in own and other in others), "")


def _are_equal(networks: tuple[StoredNetwork, ...]) -> bool:
    """Whether networks have the same weights by the same names, as where a module was registered twice."""
    first, *rest = (network.tensors for network in networks)
    have_names = all(first.keys() == other.keys() for other in rest)
    return have_names and all(torch.equal(tensor, other[name]) for other in rest for name, tensor in first.items())


def _open_choice(what: str, networks: tuple[StoredNetwork, ...], where: str) -> CheckpointError:
    lines = [
        f"{network.key or '(the file itself)'}: {format_count(len(network.tensors), 'tensor')}, "
        f"{format_count(network.values, 'value')}"
        for network in networks
    ]
    listed = list_first(lines, _MAX_SHOWN, "\n  ")
    return CheckpointError(f"{what}:\n  {listed}", where=where, hint="Choose one by name: --checkpoint-key NAME.")


def stated_epoch(content: Mapping[str, object]) -> int | None:
    """Return the epoch that a file states, None without one."""
    epoch = content.get("epoch")
    if isinstance(epoch, str) and re.fullmatch(r"\d{1,9}", epoch):
        return int(epoch)
    return epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None
