"""Checkpoint: a network with its weights, their hashes, and where they came from."""

import hashlib
import inspect
import logging
import os
import re
import site
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from msn_eval.checkpoints import find_scheme, split_label
from msn_eval.checkpoints.hf_folder import check_hub_name, open_hub
from msn_eval.checkpoints.msn_release import fetch_msn, find_release
from msn_eval.checkpoints.normalisation import (
    ASSUMED,
    IMAGENET,
    Normalisation,
    Triple,
    choose_normalisation,
    read_normalisation,
    set_by_hand,
)
from msn_eval.checkpoints.own_code import guard_own_code
from msn_eval.checkpoints.run_folder import evaluated_file, is_run_folder
from msn_eval.checkpoints.sanity_checks import describe_values
from msn_eval.checkpoints.stored import (
    StoredCheckpoint,
    check_stored,
    choose_stored,
    list_alarms,
    load_weights,
    read_contents,
)
from msn_eval.errors import CheckpointError, UsageError, printable
from msn_eval.models.architectures import Architecture, name_architecture
from msn_eval.models.build import build_network, check_architecture_name
from msn_eval.models.readout import Readout
from msn_eval.models.structure import structure_sha256
from msn_eval.models.vit import native_pixels
from msn_eval.registry import Entry

_DEMO = Path(__file__).parents[1] / "demo.safetensors"
_log = logging.getLogger(__name__)
_PIXELS = 32


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network to evaluate, on the CPU, in eval mode, in float32.

    Attributes:
        name: As reports show it.
        path: As the user wrote it, for a hub's repository with the commit.
        sha256: Of the file's bytes, None where there is no file.
        weights_sha256: Of names, dtypes, shapes and bytes of the tensors used.
        format: The family of the file, or the scheme; `plugin` for a scheme that a plug-in adds.
        key: The entry of the file that was used, None where the file is the state dict.
        arch: The architecture, by timm's name where it has one.
        matched: Share of the network's weights that came from the file, in (0, 1].
        image_pixels: Native size: what its authors evaluate at.
        normalisation: Mean and std of its images, and what states them.
        structure_sha256: Of its modules and their settings, None where the user's code builds it. It is equal for two
            spellings of one architecture.
        code_sha256: Of the user's source code that the network runs, None where it runs none.
        distribution: Name and version of the distribution whose plug-in made the network, None without one.
        positions: Whose interpolation of position embeddings applies, as `families.Backbone` has it.
        readout: Of a network of transformers, found while it was read.
    """

    name: str
    path: str
    sha256: str | None = None
    weights_sha256: str
    format: str
    key: str | None = None
    arch: str
    network: nn.Module
    matched: float = 1.0
    epoch: int | None = None
    image_pixels: int
    normalisation: Normalisation
    structure_sha256: str | None = None
    code_sha256: str | None = None
    distribution: str | None = None
    positions: str | None = None
    readout: Readout | None = None

    @property
    def mean(self) -> Triple:
        """A value per channel, on the [0, 1] scale."""
        return self.normalisation.mean

    @property
    def std(self) -> Triple:
        """A value per channel, on the [0, 1] scale."""
        return self.normalisation.std

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def runs_own_code(self) -> bool:
        """Whether the network's forward is code of the user or of a plug-in, so that its output is the only tap."""
        return self.format in ("py", "plugin")


def read_checkpoint(
    name: str,
    *,
    arch: str | None = None,
    key: str | None = None,
    allow_missing: tuple[str, ...] = (),
    seed: int = 0,
    mean: Triple | None = None,
    std: Triple | None = None,
) -> Checkpoint:
    """Read the checkpoint called `name`, a path or one of the schemes in `checkpoints.ENCODERS`.

    Args:
        arch: timm's name of the architecture, where the file leaves it open.
        key: Which of several networks in a file.
        allow_missing: Patterns of weights that may keep their initial values.
        seed: Of untrained weights.
        mean: A value per channel that replaces the checkpoint's own, on the [0, 1] scale.
        std: The same.

    Raises:
        CheckpointError: Something is missing, unknown, or does not fit in full.
    """
    entry, rest = find_scheme(name)
    if entry.distribution is not None:
        checkpoint = _run_factory(entry, rest, path=name, name=name, file_format="plugin")
    else:
        read = cast(Callable[..., Checkpoint], entry.load())
        checkpoint = read(name, arch=arch, key=key, allow_missing=allow_missing, seed=seed)
    normalisation = set_by_hand(checkpoint.normalisation, mean, std)
    if normalisation.is_assumed:
        _log.warning("%s: mean and std are %s; --mean and --std set others", checkpoint.path, normalisation.source)
    return replace(checkpoint, normalisation=normalisation)


def read_stored(
    name: str, *, arch: str | None, key: str | None, allow_missing: tuple[str, ...], seed: int
) -> Checkpoint:
    """Read the weights of a file or folder: locate, read, choose the network, rename its keys, recognise the architecture,
    load."""
    path, full_name = locate_weights(name)
    stored = choose_stored(read_contents(path), arch=arch, key=key)
    named = {"name": shorten_name(name), "path": full_name, "format": stored.backbone.format}
    return _load_stored(stored, allow_missing, seed, **named)


def read_timm(name: str, **_: object) -> Checkpoint:
    """Read timm's weights from its repository on the hub, at one commit; the few that are kept elsewhere through timm."""
    rest = name.partition(":")[2]
    if _find_timm_repository(rest) is not None:
        stored = choose_stored(read_contents(locate_weights(name)[0]), arch=rest)
        return _load_stored(stored, name=rest, path=name, format="timm")
    import timm

    architecture = name_architecture(rest)
    try:
        network = timm.create_model(architecture.timm_name, pretrained=True, num_classes=0, **architecture.keywords)
    except Exception as error:
        what = f"timm's weights cannot be loaded: {printable(str(error)).partition(chr(10))[0][:200]}"
        hint = "Without a network they must be in the Hugging Face cache (HF_HOME); "
        hint += "or download them elsewhere and give the file with --arch."
        raise CheckpointError(what, where=name, hint=hint) from error
    config = network.pretrained_cfg
    tagged = replace(architecture, timm_name=f"{config['architecture']}.{config['tag']}".removesuffix("."))
    checkpoint = _describe_built(network.eval(), architecture, name=architecture.name, path=name, format="timm")
    return replace(checkpoint, normalisation=choose_normalisation(tagged))


def read_untrained(name: str, *, arch: str | None, key: str | None, seed: int, **_: object) -> Checkpoint:
    """Build an untrained network of a timm architecture, or of the architecture of a file."""
    rest, stored = name.partition(":")[2], None
    if _is_stored(rest):
        stored = choose_stored(read_contents(locate_weights(rest)[0]), arch=arch, key=key)
    architecture = name_architecture(rest) if stored is None else stored.architecture
    network = build_network(architecture, seed=seed)
    return _describe_built(network, architecture, stored, name=name, path=name, format="random")


def read_pixels(name: str, **_: object) -> Checkpoint:
    """Return the network that flattens its image."""
    return Checkpoint(
        name=name,
        path=name,
        weights_sha256=weights_sha256({}),
        format="pixels",
        arch="pixels",
        network=nn.Flatten(),
        image_pixels=_PIXELS,
        normalisation=IMAGENET,
    )


def read_factory(name: str, **_: object) -> Checkpoint:
    """Run the user's factory, `py:package.module:factory`."""
    target = _check_factory(name)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    entry = Entry(name="py", summary="the user's factory", target=target)
    return _run_factory(entry, path=name, name=target, file_format="py")


def locate_weights(name: str) -> tuple[Path, str]:
    """Return the file or folder of a checkpoint, downloaded first if it must be, and its name with the commit of a hub.

    Raises:
        CheckpointError: It cannot be located or downloaded, or the scheme has no file.
    """
    entry, rest = find_scheme(name)
    match entry.name:
        case "demo":
            return _DEMO, name
        case "msn":
            return fetch_msn(rest), name
        case "hf":
            return open_hub(rest)
        case "timm" if (repository := _find_timm_repository(rest)) is not None:
            return open_hub(repository)[0], name
        case "file":
            path = Path(name)
            return (evaluated_file(path) if is_run_folder(path) else path), name
    raise CheckpointError("This scheme has no file", where=name, hint="Use a file, a folder, msn: or hf:.")


def _find_timm_repository(name: str) -> str | None:
    """Return timm's repository on the hub of a network, None for the few whose weights are kept elsewhere."""
    from timm.models import get_pretrained_cfg

    architecture = name_architecture(name)
    check_architecture_name(architecture)
    config = get_pretrained_cfg(architecture.timm_name)
    repository = config.hf_hub_id if config is not None else None
    return repository if repository is not None and repository.startswith("timm/") else None


def _is_stored(name: str) -> bool:
    return name == "demo" or os.path.exists(name)  # noqa: PTH110 - Path.exists raises on names too long for the disk


def check_checkpoint_names(names: tuple[str, ...]) -> None:
    """Check names before any work is done.

    Raises:
        CheckpointError: There is no such file, scheme or architecture.
        UsageError: Two checkpoints have the same label.
    """
    labels = [label for label, _ in map(split_label, names) if label is not None]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        what = f"several checkpoints are called {', '.join(sorted(repeated))}"
        raise UsageError(what, hint="Give each a name of its own: --checkpoint NAME=X.")
    for name in names:
        entry, rest = find_scheme(name)
        match entry.name:
            case "py":
                _check_factory(name)
            case "msn":
                find_release(rest)
            case "hf":
                check_hub_name(rest)
            case "timm" | "random" if entry.name == "timm" or not _is_stored(rest):
                check_architecture_name(name_architecture(rest))


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\t{tensor.dtype}\t{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_factory(name: str) -> str:
    """Return the factory that `py:package.module:factory` names, as `package.module:factory`."""
    target = name.partition(":")[2]
    module_name, _, factory_name = target.rpartition(":")
    if not (module_name and factory_name):
        raise CheckpointError("is not of the form py:package.module:factory", where=name, hint="Name the function.")
    return target


def _run_factory(entry: Entry, *arguments: str, path: str, name: str, file_format: str) -> Checkpoint:
    """Run a factory of the user or of a plug-in: the only function that executes code that is not ours."""
    with guard_own_code("the factory", where=path):
        factory = cast(Callable[..., object], entry.load())
        network = factory(*arguments)
    if not isinstance(network, nn.Module):
        what = f"the factory returned a {type(network).__name__}, not an nn.Module"
        raise CheckpointError(what, where=path, hint="Return the module.")
    with guard_own_code("the module", where=path):  # which may override these
        network = network.float().eval()
    try:
        source = inspect.getsourcefile(inspect.unwrap(factory))
    except TypeError:  # a partial or another callable object: the module that it is in
        source = sys.modules[entry.target.partition(":")[0]].__file__
    hashed = {"factory source": Path(source).read_bytes()} if source else {}
    checkpoint = describe_own_network(network, path=path, name=name, file_format=file_format, hashed=hashed)
    return replace(checkpoint, distribution=entry.distribution)


def describe_own_network(
    network: nn.Module, *, path: str, name: str, file_format: str, hashed: Mapping[str, bytes]
) -> Checkpoint:
    """Describe a network of the user as a checkpoint, from its attributes `image_pixels`, `mean` and `std` where present.

    Args:
        network: Maps normalised images (n, 3, S, S) to features (n, d).
        path: How errors name it.
        name: As reports show it, and as its architecture.
        file_format: `py` or `plugin`.
        hashed: What belongs to the weights' hash beside tensors and the user's source code.
    """
    with guard_own_code("the module", where=path):
        tensors = dict(network.state_dict())
    try:
        image_pixels = int(cast(int, getattr(network, "image_pixels", 224)))
    except (TypeError, ValueError) as error:
        what = f"image_pixels is {network.image_pixels!r}"
        raise CheckpointError(what, where=path, hint="Make it an integer.") from error
    code = own_code_sha256()
    contents = {"own code": bytes.fromhex(code), **hashed}
    as_tensors = {part: torch.frombuffer(bytearray(content), dtype=torch.uint8) for part, content in contents.items()}
    return Checkpoint(
        name=name,
        path=path,
        weights_sha256=weights_sha256(tensors | as_tensors),
        format=file_format,
        arch=name,
        network=network,
        image_pixels=image_pixels,
        normalisation=_read_attributes(network, where=path),
        code_sha256=code,
    )


def _load_stored(
    stored: StoredCheckpoint, allow_missing: tuple[str, ...] = (), seed: int = 0, *, path: str, **fields: Any
) -> Checkpoint:
    # Before the network is built: what a file claims must not cost more memory than it has.
    matched = check_stored(stored, allow_missing) if stored.network is None else 1.0
    network = stored.network or build_network(stored.architecture, seed=seed)
    infos = {weight: describe_values(tensor) for weight, tensor in stored.backbone.weights.items()}
    load_weights(network, stored.backbone.weights, infos, where=stored.contents.where)
    for alarm in list_alarms(stored, infos):
        _log.warning("%s: %s", path, alarm)
    fields |= {"sha256": stored.contents.sha256, "key": stored.choice.network.key, "epoch": stored.contents.epoch}
    return _describe_built(network, stored.architecture, stored, path=path, matched=matched, **fields)


def _describe_built(
    network: nn.Module, architecture: Architecture, stored: StoredCheckpoint | None = None, *, path: str, **fields: Any
) -> Checkpoint:
    """Describe a network that was built here; `fields` are those of the checkpoint that its network does not show."""
    return Checkpoint(
        path=path,
        weights_sha256=weights_sha256(network.state_dict()),
        arch=architecture.name,
        network=network,
        image_pixels=native_pixels(network) if stored is None else stored.native_pixels(network),
        normalisation=choose_normalisation(architecture) if stored is None else stored.normalisation,
        structure_sha256=structure_sha256(network),
        positions=None if stored is None else stored.positions,
        readout=None if stored is None else stored.readout,
        **fields,
    )


def _read_attributes(network: nn.Module, *, where: str) -> Normalisation:
    """Return the normalisation of a module of the user, from its attributes `mean` and `std` where present."""
    stated = {name: values for name in ("mean", "std") if (values := getattr(network, name, None)) is not None}
    source = "the module's attributes"
    return read_normalisation({**vars(ASSUMED), **stated}, where=where, source=source) if stated else ASSUMED


def shorten_name(name: str) -> str:
    """Return a file's or folder's name without its suffixes; `msn_vits16` for a released one, the repository for a hub's."""
    scheme, colon, rest = name.partition(":")
    if colon and scheme == "msn":
        return f"msn_{rest}"
    plain = Path(rest if colon and scheme == "hf" else name).name
    short = re.sub(r"(\.safetensors)?(\.ckpt)?(\.bin)?(\.pt)?(\.pth)?(\.tar)?\Z", "", plain)
    return short or plain or name


def own_code_sha256() -> str:
    """Return the SHA-256 over name and source of all loaded modules that are neither Python's, nor installed, nor ours.

    What a network imports only while it runs, and data that it reads, are not covered.
    """
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed += [*site.getsitepackages(), site.getusersitepackages()]
    foreign = {Path(folder).resolve() for folder in installed} | {Path(__file__).resolve().parents[1]}
    digest = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        if foreign.isdisjoint(path.parents) and path.is_file():
            digest.update(f"{name}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
