"""Checkpoint: a network with its weights in place, their hashes, and where they came from."""

import hashlib
import importlib
import inspect
import logging
import math
import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.hf_folder import check_hub_name, open_hub
from msn_eval.checkpoints.load import load_weights
from msn_eval.checkpoints.msn_release import MSN_RELEASES, fetch_msn, find_release
from msn_eval.checkpoints.run_folder import evaluated_file, is_run_folder
from msn_eval.checkpoints.sanity_checks import describe_values, find_alarms
from msn_eval.checkpoints.stored import StoredCheckpoint, check_stored, choose_stored, read_contents
from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.errors import CheckpointError, printable
from msn_eval.models.architectures import Architecture, name_architecture
from msn_eval.models.build import build_network, check_architecture_name
from msn_eval.models.vit import native_pixels

SCHEMES = {
    "FILE": ".pth, .pth.tar, .pt, .ckpt, .bin, .safetensors of MSN, DINO, iBOT, DINOv2, MAE, MoCo, I-JEPA, BEiT, SimSiam, SwAV, "
    "Barlow Twins, VICReg, lightly, solo-learn, Lightning, timm, torchvision, Hugging Face",
    "FOLDER": "a folder in Hugging Face layout: config.json with model.safetensors or pytorch_model.bin",
    "RUN": "a folder that msn-pretrain trains in: its newest whole snapshot",
    "msn:NAME": f"the released MSN weights, downloaded once: {', '.join(MSN_RELEASES)}",
    "hf:REPO[@REVISION]": "from the Hugging Face hub or its local cache; hf:FOLDER is FOLDER",
    "timm:NAME": "timm's pretrained weights, from its cache or its hub",
    "random:ARCH": "untrained, e.g. random:vit_tiny_patch16_224 or 'random:vit_tiny_patch16_224?img_size=32&patch_size=4'",
    "random:FILE": "untrained, with the architecture of that checkpoint",
    "py:package.module:factory": "your own nn.Module; the one scheme that runs your code",
    "pixels": "no network: 32 x 32 pixels as they are",
    "demo": "ships with the package: MSN pre-trained on the digits, 16 pixels",
}
_DEMO = Path(__file__).parents[1] / "demo.safetensors"
_log = logging.getLogger(__name__)
_PIXELS = 32
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One network to evaluate, on the CPU, in eval mode, in float32.

    name:           as reports show it
    path:           as the user wrote it
    sha256:         of the file's bytes, None where there is no file
    weights_sha256: of names, dtypes, shapes and bytes of the tensors used
    format:         the family of the file, or the scheme
    key:            the entry of the file that was used, None where the file is the state dict
    arch:           architecture, timm's name where it has one
    matched:        share of the network's weights that came from the file, in (0, 1]
    image_pixels:   native size: what its authors evaluate at
    mean, std:      a value a channel, on the [0, 1] scale
    code_sha256:    of the user's own source that the network runs, None where it runs none
    """

    name: str
    path: str
    sha256: str | None
    weights_sha256: str
    format: str
    key: str | None
    arch: str
    network: nn.Module
    matched: float
    epoch: int | None
    image_pixels: int
    mean: Triple
    std: Triple
    code_sha256: str | None = None

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())


def read_checkpoint(
    name: str,
    *,
    arch: str | None = None,
    key: str | None = None,
    allow_missing: tuple[str, ...] = (),
    seed: int = 0,
) -> Checkpoint:
    """Read the checkpoint called `name`, a file or one of SCHEMES.

    arch:          timm's name of the architecture where the file leaves it open
    key:           which of several networks in a file
    allow_missing: patterns of weights that may stay at their initial values
    seed:          of untrained weights
    Raises CheckpointError where anything is missing, unknown, or does not fit in full.
    """
    scheme, colon, rest = name.partition(":")
    if name == "pixels":
        return _pixels()
    if colon and scheme == "random":
        return _untrained(name, rest, arch=arch, key=key, seed=seed)
    if colon and scheme == "timm":
        return _timm_pretrained(name, rest)
    if colon and scheme == "py":
        return _own_module(name, rest)
    return _from_file(name, arch=arch, key=key, allow_missing=allow_missing, seed=seed)


def locate_weights(name: str) -> tuple[Path, str]:
    """Give the file or folder that a checkpoint's name stands for, fetched first where it must be, and its full name: with
    the commit of a hub's repository.

    Raises CheckpointError where it cannot be had, or where no file stands behind the name.
    """
    scheme, colon, rest = name.partition(":")
    if name == "demo":
        return _DEMO, name
    if colon and scheme == "msn":
        return fetch_msn(rest), name
    if colon and scheme == "hf":
        hub = open_hub(rest)
        return hub.folder, f"hf:{hub.repo}@{hub.revision}" if hub.repo else name
    if colon and scheme == "timm" and (repository := _timm_repository(rest)) is not None:
        return open_hub(repository).folder, name
    if not _is_stored(name):
        if name == "pixels" or (colon and scheme in ("timm", "random", "py")):
            raise CheckpointError("stands for no file", where=name, hint="Give a file, a folder, msn: or hf:.")
        raise CheckpointError("no such checkpoint file or scheme", where=name, hint=_known_schemes())
    return stored_weights(name), name


def stored_weights(name: str) -> Path:
    """Give the file or folder of weights at a path that is there: of a folder that msn-pretrain trains in, the newest whole
    snapshot's. Raises CheckpointError where such a folder has none."""
    path = _DEMO if name == "demo" else Path(name)
    return evaluated_file(path) if is_run_folder(path) else path


def _timm_repository(name: str) -> str | None:
    """Give timm's repository on the hub for one of its networks, None for the few whose weights are kept elsewhere."""
    from timm.models import get_pretrained_cfg

    architecture = name_architecture(name)
    check_architecture_name(architecture)  # a name that timm does not know is another fault than one it cannot fetch
    config = get_pretrained_cfg(architecture.timm_name)
    repository = config.hf_hub_id if config is not None else None
    return repository if repository is not None and repository.startswith("timm/") else None


def _is_stored(name: str) -> bool:
    return os.path.exists(name)  # noqa: PTH110 - Path.exists raises on names too long for the disk


def check_checkpoint_names(names: tuple[str, ...]) -> None:
    """Raise CheckpointError for a file that is not there, or a scheme or architecture that does not exist, before any
    work is done."""
    for name in names:
        scheme, colon, rest = name.partition(":")
        if name in ("pixels", "demo"):
            continue
        if colon and scheme == "py":
            _own_module_parts(name)
            continue
        if colon and scheme == "msn":
            find_release(rest)
        elif colon and scheme == "hf":
            check_hub_name(rest)
        elif colon and scheme in ("timm", "random"):
            if not (scheme == "random" and (rest == "demo" or _is_stored(rest))):
                check_architecture_name(name_architecture(rest))
        elif not _is_stored(name):
            raise CheckpointError("no such checkpoint file or scheme", where=name, hint=_known_schemes())


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Give the SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name}\t{tensor.dtype}\t{tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _known_schemes() -> str:
    return f"A checkpoint is a file, or one of: {', '.join(scheme for scheme in SCHEMES if scheme != 'FILE')}."


def _pixels() -> Checkpoint:
    return Checkpoint(
        name="pixels",
        path="pixels",
        sha256=None,
        weights_sha256=weights_sha256({}),
        format="pixels",
        key=None,
        arch="pixels",
        network=nn.Flatten(),
        matched=1.0,
        epoch=None,
        image_pixels=_PIXELS,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _untrained(name: str, rest: str, *, arch: str | None, key: str | None, seed: int) -> Checkpoint:
    if rest != "demo" and not _is_stored(rest):
        architecture = name_architecture(rest)
        return _checkpoint(
            build_network(architecture, seed=seed), architecture, name=name, path=name, file_format="random"
        )
    stored = choose_stored(read_contents(stored_weights(rest)), arch=arch, key=key)
    network = build_network(stored.architecture, seed=seed)
    checkpoint = _checkpoint(network, stored.architecture, name=name, path=name, file_format="random")
    return _as_stored(checkpoint, stored)


def _timm_pretrained(name: str, rest: str) -> Checkpoint:
    """Read timm's weights from its repository on the hub, at one commit, as any other folder; the few that are kept elsewhere
    through timm itself."""
    if _timm_repository(rest) is None:
        return _timm_elsewhere(name, name_architecture(rest))
    stored = choose_stored(read_contents(locate_weights(name)[0]), arch=rest)
    return replace(_loaded(stored, name=rest, path=name, allow_missing=(), seed=0), format="timm")


def _timm_elsewhere(name: str, architecture: Architecture) -> Checkpoint:
    import timm

    try:
        network = timm.create_model(architecture.timm_name, pretrained=True, num_classes=0, **architecture.keywords)
    except Exception as error:
        raise CheckpointError(
            f"timm's weights could not be had: {printable(str(error)).partition(chr(10))[0][:200]}",
            where=name,
            hint="Without a network they must be in the Hugging Face cache (HF_HOME); or download them elsewhere and "
            "give the file with --arch.",
        ) from error
    return _checkpoint(network.eval(), architecture, name=architecture.name, path=name, file_format="timm")


def _own_module_parts(name: str) -> tuple[str, str]:
    """Give module and function of `py:package.module:factory`."""
    module_name, colon, factory_name = name.partition(":")[2].rpartition(":")
    if not (colon and module_name and factory_name):
        raise CheckpointError("is not of the form py:package.module:factory", where=name, hint="Name the function.")
    return module_name, factory_name


def _own_module(name: str, rest: str) -> Checkpoint:
    """Run the user's factory: the one scheme that executes code, and the user's own."""
    module_name, factory_name = _own_module_parts(name)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        network = factory()
    except Exception as error:
        raise CheckpointError(
            f"the factory failed: {type(error).__name__}: {error}", where=name, hint="Run it by itself to see why."
        ) from error
    if not isinstance(network, nn.Module):
        raise CheckpointError(
            f"the factory gave a {type(network).__name__}, not an nn.Module", where=name, hint="Return the module."
        )
    try:
        source = inspect.getsourcefile(inspect.unwrap(factory))
    except TypeError:  # a partial or another object that can be called: the module it was found in
        source = sys.modules[module_name].__file__
    code = own_code_sha256()
    ran = {"own code": torch.frombuffer(bytearray.fromhex(code), dtype=torch.uint8)}
    if source:
        ran["factory source"] = torch.frombuffer(bytearray(Path(source).read_bytes()), dtype=torch.uint8)
    network = network.float().eval()
    try:
        image_pixels = int(getattr(network, "image_pixels", 224))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"image_pixels is {network.image_pixels!r}", where=name, hint="Make it a whole number."
        ) from error
    return Checkpoint(
        name=rest,
        path=name,
        sha256=None,
        weights_sha256=weights_sha256(dict(network.state_dict()) | ran),
        format="py",
        key=None,
        arch=rest,
        network=network,
        matched=1.0,
        epoch=None,
        image_pixels=image_pixels,
        mean=_triple("mean", getattr(network, "mean", IMAGENET_MEAN), where=name),
        std=_triple("std", getattr(network, "std", IMAGENET_STD), where=name),
        code_sha256=code,
    )


def _from_file(
    name: str, *, arch: str | None, key: str | None, allow_missing: tuple[str, ...], seed: int
) -> Checkpoint:
    path, full_name = locate_weights(name)
    stored = choose_stored(read_contents(path), arch=arch, key=key)
    return _loaded(stored, name=_short_name(name), path=full_name, allow_missing=allow_missing, seed=seed)


def _loaded(stored: StoredCheckpoint, *, name: str, path: str, allow_missing: tuple[str, ...], seed: int) -> Checkpoint:
    check_stored(
        stored, allow_missing
    )  # before the network is built: a file's claims must not cost more memory than it
    architecture, trunk = stored.architecture, stored.trunk
    network = build_network(architecture, seed=seed)
    matched = load_weights(
        network, trunk.weights, arch=architecture.name, allow_missing=allow_missing, where=stored.where
    )
    facts = {one: describe_values([tensor]) for one, tensor in trunk.weights.items()}
    for alarm in find_alarms(stored.choice, facts):
        _log.warning("%s: %s", path, alarm)
    checkpoint = _checkpoint(network, architecture, name=name, path=path, file_format=trunk.format)
    checkpoint = replace(
        checkpoint,
        sha256=stored.contents.sha256,
        key=stored.choice.network.key,
        epoch=stored.contents.epoch,
        matched=matched,
    )
    return _as_stored(checkpoint, stored)


def _as_stored(checkpoint: Checkpoint, stored: StoredCheckpoint) -> Checkpoint:
    """Give native size, mean and std as the weights' file or folder states them; ImageNet's mean and std to weights that state
    none, unless the architecture was named with one of timm's tags (`NAME.TAG`), which stand for particular weights and their
    normalisation."""
    checkpoint = replace(checkpoint, image_pixels=stored.native_pixels(checkpoint.network))
    config = stored.contents.config
    if config is not None and config.statistics is not None:
        return replace(checkpoint, mean=config.statistics[0], std=config.statistics[1])
    if "." in (stored.architecture.timm_name or ""):
        return checkpoint
    return replace(checkpoint, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _checkpoint(
    network: nn.Module, architecture: Architecture, *, name: str, path: str, file_format: str
) -> Checkpoint:
    config: Mapping[str, object] = getattr(network, "pretrained_cfg", None) or {}
    return Checkpoint(
        name=name,
        path=path,
        sha256=None,
        weights_sha256=weights_sha256(network.state_dict()),
        format=file_format,
        key=None,
        arch=architecture.name,
        network=network,
        matched=1.0,
        epoch=None,
        image_pixels=native_pixels(network),
        mean=_triple("mean", config.get("mean") or IMAGENET_MEAN, where=path),
        std=_triple("std", config.get("std") or IMAGENET_STD, where=path),
    )


def _triple(what: str, values: object, *, where: str) -> Triple:
    three = values if isinstance(values, tuple | list) and len(values) == 3 else ()
    if not three or not all(isinstance(value, int | float) and math.isfinite(value) for value in three):
        raise CheckpointError(
            f"{what} is {values!r}, not three numbers", where=where, hint="Give one a channel, on the [0, 1] scale."
        )
    return float(three[0]), float(three[1]), float(three[2])


def _short_name(name: str) -> str:
    """Give a file's or folder's name without its suffixes; `msn_vits16` for a released one, the repository for a hub's."""
    scheme, colon, rest = name.partition(":")
    if colon and scheme == "msn":
        return f"msn_{rest}"
    plain = Path(rest if colon and scheme == "hf" else name).name
    short = plain
    for suffix in (".tar", ".pth", ".pt", ".bin", ".ckpt", ".safetensors"):
        short = short.removesuffix(suffix)
    return short or plain or name


def own_code_sha256() -> str:
    """Give the SHA-256 over name and source of every loaded module that is neither Python's, nor installed, nor ours.

    What a network imports only while it runs, and data that it reads, are not covered.
    """
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed += [*site.getsitepackages(), site.getusersitepackages()]
    foreign = {Path(place).resolve() for place in installed} | {Path(__file__).resolve().parents[1]}
    whole = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        if foreign.isdisjoint(path.parents) and path.is_file():
            whole.update(f"{name}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()
