"""Names of checkpoints in tables, legends and choices: short, and different for different networks."""

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TypeVar
from urllib.parse import parse_qsl

from msn_eval.results.record import CheckpointInfo

Network = TypeVar("Network", bound=Hashable)
_HASH_PREFIX = 8  # digits
_SIZES = {"embed_dim": "width", "depth": "depth"}  # in place of a size such as `tiny`


@dataclass(frozen=True, kw_only=True)
class RefusedCheckpoint:
    """A checkpoint that cannot be used, so that nothing else is known of it."""

    name: str
    path: str
    arch: str = ""
    key: str | None = None
    weights_sha256: str = ""


Named = CheckpointInfo | RefusedCheckpoint


def name_networks(checkpoints: Mapping[Network, Named]) -> dict[Network, str]:
    """Return a name for each network. Two of one name get what tells them apart: folders, architecture, key, or hash."""
    names = {
        # Of an untrained network, the name has its architecture.
        network: checkpoint.name.replace(checkpoint.arch, shorten_architecture(checkpoint.arch))
        for network, checkpoint in checkpoints.items()
    }
    for qualify in (_add_folders, _add_architecture, _add_key, _add_hashes):
        groups = defaultdict(list)
        for network, name in names.items():
            groups[name].append(network)
        for name, networks in groups.items():
            if len(networks) > 1:
                texts = qualify(name, [checkpoints[network] for network in networks])
                names.update(zip(networks, texts, strict=True))
    return names


def shorten_architecture(arch: str) -> str:
    """Return an architecture as one word, such as `vit_width128_depth2_patch4_16_heads4`, for a name with keywords."""
    name, mark, query = arch.partition("?")
    keywords = dict(parse_qsl(query))
    if not mark or not keywords:
        return arch
    if match := re.fullmatch(r"(?P<kind>.*?)_(?P<size>[^_]+)_patch(?P<patch>\d+)(?P<own>.*?)_(?P<image>\d+)", name):
        sizes = [f"{word}{keywords.pop(key)}" for key, word in _SIZES.items() if key in keywords]
        size = "_".join(sizes if len(sizes) == len(_SIZES) else [match["size"], *sizes])
        patch, image = (
            keywords.pop(key, match[word]) for key, word in (("patch_size", "patch"), ("img_size", "image"))
        )
        name = f"{match['kind']}_{size}_patch{patch}{match['own']}_{image}"
    texts = {key.removeprefix("num_"): value for key, value in keywords.items()}
    return name + "".join(f"_{key}{'' if value.isdecimal() else '_'}{value}" for key, value in texts.items())


def add_hash(name: str, checkpoint: Named) -> str:
    """Return the name with the start of the checkpoint's hash in brackets, where it is known and not there already."""
    digits = f" [{checkpoint.weights_sha256[:_HASH_PREFIX]}]" if checkpoint.weights_sha256 else ""
    return name if name.endswith(digits) else f"{name}{digits}"


def _add_folders(name: str, checkpoints: Sequence[Named]) -> list[str]:
    """Return `FOLDER/NAME` with as few folders as tell the files apart, as far as they do."""
    folders = [PurePath(checkpoint.path).parts[:-1] for checkpoint in checkpoints]
    differing = set(folders)
    if len(differing) == 1:
        return [name] * len(checkpoints)
    count = 1
    while len({parts[-count:] for parts in differing}) < len(differing):
        count += 1
    return [f"{PurePath(*parts[-count:])}/{name}" if parts else name for parts in folders]


def _add_architecture(name: str, checkpoints: Sequence[Named]) -> list[str]:
    return _add_differing(name, [shorten_architecture(checkpoint.arch) for checkpoint in checkpoints])


def _add_key(name: str, checkpoints: Sequence[Named]) -> list[str]:
    return _add_differing(name, [checkpoint.key or "" for checkpoint in checkpoints])


def _add_differing(name: str, texts: Sequence[str]) -> list[str]:
    """Return the name with each text in parentheses, if they differ."""
    return [f"{name} ({text})" if text and len(set(texts)) > 1 else name for text in texts]


def _add_hashes(name: str, checkpoints: Sequence[Named]) -> list[str]:
    return [add_hash(name, checkpoint) for checkpoint in checkpoints]
