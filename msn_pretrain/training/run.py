"""A run: its folder and lock, its training images, and the model and optimiser that it trains."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from msn_eval.checkpoints.checkpoint import weights_sha256
from msn_eval.checkpoints.run_folder import CHECKPOINTS, CONFIG, newest_snapshot, read_manifest
from msn_eval.config.request import EvaluationConfig
from msn_eval.data import describe_datasets, read_training_images
from msn_eval.data.images import ImageSet
from msn_eval.distributed.collective import GradientAverager, is_sharded, world_size
from msn_eval.distributed.group import Group as Group
from msn_eval.distributed.group import broadcast_from_rank0
from msn_eval.errors import DistributedError, UsageError, format_count
from msn_eval.evaluation.plan import cache_folder
from msn_eval.files.atomic import prepare_folder, write_atomically
from msn_eval.version import __version__
from msn_pretrain.config.load import read_recipe, recipe_as_yaml
from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe, architecture_of
from msn_pretrain.data.views import ViewKind
from msn_pretrain.methods.msn import MSN, build_msn
from msn_pretrain.methods.simsiam import build_simsiam
from msn_pretrain.training import snapshot as snapshots
from msn_pretrain.training.gradients import Model
from msn_pretrain.training.optimizer import build_optimizer
from msn_pretrain.training.snapshot import EvaluatedEncoder, Snapshot, read_snapshot

_log = logging.getLogger(__name__)
Recipe = MSNRecipe | SimSiamRecipe
# Keys on which no trained number depends.
_FREE = (
    *(
        "run.dir",
        "run.device",
        "run.activation_checkpointing",
        "run.log_every",
        "run.snapshot_minutes",
        "run.keep_every",
        "run.compare_every",
    ),
    *("data.workers", "data.pin_memory"),
    *("watch.probe_every", "watch.probe_data", "watch.probes", "watch.subset", "watch.on_alarm"),
)
DATA = "data"  # the name of the training images for --allow-config-change


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """State dicts of a learner, complete on every rank, and of the network that is evaluated."""

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    encoder: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Model and optimiser on a device, and the averager of gradients that are not sharded."""

    model: Model
    optimizer: torch.optim.Optimizer
    averager: GradientAverager

    def state(self, *, keep: bool = True) -> LearnerState:
        """Return the complete state. If it is sharded, every rank must call this; without `keep` such tensors are dropped."""
        parts = (self.model.state_dict(), self.optimizer.state_dict(), self.model.exported().state_dict())
        model, optimizer, encoder = (_gather_shards(part, keep=keep) for part in parts)
        return LearnerState(model=model, optimizer=optimizer, encoder=encoder)

    def restore(self, snapshot: Snapshot) -> None:
        """Load the state of a snapshot."""
        own = self.model.state_dict()
        self.model.load_state_dict({name: _shard_like(value, own.get(name)) for name, value in snapshot.model.items()})
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {name: _shard_like(value, parameters[number]) for name, value in moments.items()}
            for number, moments in snapshot.optimizer["state"].items()
        }
        self.optimizer.load_state_dict({**snapshot.optimizer, "state": moments})


def _gather_shards(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """Replace the sharded tensors inside of nested mappings by complete ones in host memory, or by None without `keep`."""
    gathered: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            gathered[name] = _gather_shards(value, keep=keep)
        elif is_sharded(value):
            complete = value.full_tensor()
            gathered[name] = complete.cpu() if keep else None
        else:
            gathered[name] = value
    return gathered


def _shard_like(value: Tensor, own: Any) -> Tensor:
    """Return this rank's part of a complete tensor if `own`, of the same shape, is sharded."""
    if not is_sharded(own) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def build_learner(recipe: Recipe, device: torch.device) -> Learner:
    """Build the model and optimiser of a recipe on a device, in training mode.

    Raises:
        UsageError: The encoder supports no activation checkpointing or sharding.
    """
    model: Model = build_msn(recipe) if isinstance(recipe, MSNRecipe) else build_simsiam(recipe)
    model.to(device)
    half_on_cpu = device.type == "cpu" and precision_of(recipe, device) == "bf16"
    if recipe.run.attention == "explicit" or (recipe.run.attention == "auto" and half_on_cpu):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
    encoders = (model.anchor.trunk, model.target.trunk) if isinstance(model, MSN) else (model.network,)
    networks = [getattr(encoder, "network", encoder) for encoder in encoders]
    for key in ("activation_checkpointing", "shard"):
        if getattr(recipe.run, key) and not hasattr(networks[0], "blocks"):
            what = f"run.{key}: {recipe.encoder.name} is not a Transformer"
            raise UsageError(what, hint=f"Use run.{key}=false, and run.micro_batch if memory is short.")
    if recipe.run.activation_checkpointing:
        for network in networks:
            network.set_grad_checkpointing()  # type: ignore[operator]
    if recipe.run.shard and world_size() > 1:
        _shard(encoders, networks, device)
    if recipe.run.compile:
        for encoder in encoders:
            encoder.compile(dynamic=False)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad and not is_sharded(parameter)]
    return Learner(model=model, optimizer=build_optimizer(model, recipe), averager=GradientAverager(own))


def _shard(encoders: Sequence[nn.Module], networks: Sequence[nn.Module], device: torch.device) -> None:
    """Divide the weights of encoders among the ranks; each block is gathered when it computes.

    The last block belongs to the encoder, which may compute it for the class token alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for encoder, network in zip(encoders, networks, strict=True):
        for block in cast(nn.Sequential, network.blocks)[:-1]:
            fully_shard(block, mesh=mesh)
        # The target has no backward pass after which its weights would be divided again.
        fully_shard(encoder, mesh=mesh, reshard_after_forward=True)


def evaluated_encoder(state: LearnerState, recipe: Recipe) -> EvaluatedEncoder:
    """Return the network of a learner that is evaluated."""
    return EvaluatedEncoder(
        weights=state.encoder,
        architecture=architecture_of(recipe.encoder),
        image_pixels=recipe.views.image_pixels,
    )


def precision_of(recipe: Recipe, device: torch.device) -> str:
    """Return bf16 or fp32: as the recipe says, else bf16 on a GPU."""
    if recipe.run.precision != "auto":
        return recipe.run.precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast_of(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return the autocast context of forward passes. It can be entered repeatedly."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of(recipe, device) == "bf16")


def view_kinds(recipe: Recipe) -> tuple[ViewKind, ...]:
    """Return the kinds of views of a recipe: full-size views, MSN's target first; then focal views."""
    views = recipe.views
    shared = {name: getattr(views, name) for name in ("flip", "jitter", "grey", "blur", "interpolation")}
    shared["amounts"] = (views.brightness, views.contrast, views.saturation, views.hue)
    shared["sigma"] = views.blur_sigma
    targets = 1 if isinstance(recipe, MSNRecipe) else 0
    kinds = [
        ViewKind(pixels=views.image_pixels, count=targets + views.random_views, scale=views.crop_scale, **shared),
        ViewKind(pixels=views.focal_pixels, count=views.focal_views, scale=views.focal_crop_scale, **shared),
    ]
    return tuple(kind for kind in kinds if kind.count)


def makes_views_on_device(recipe: Recipe, device: torch.device) -> bool:
    """Whether views are made on the training device instead of in the loader."""
    made = recipe.views.made
    return made == "device" or (made == "auto" and device.type == "cuda")


def training_images(recipe: Recipe) -> ImageSet:
    """Read the training images of a recipe. Raises UsageError if it names none, DataError if they cannot be read."""
    if not recipe.data.root:
        raise UsageError("data.root is missing", hint=f"Add data.root=X.\n{describe_datasets()}")
    cache_dir = cache_folder(EvaluationConfig())
    prepare_folder(cache_dir, option="cache")
    images = read_training_images(recipe.data.root, cache_dir=cache_dir)
    if not images.is_labelled:
        _log.info("%s: %s without classes", recipe.data.root, format_count(len(images), "image"))
        if recipe.watch.probe_every and not recipe.watch.probe_data:
            _log.warning(
                "the online probe is off: these images have no classes; watch.probe_data=X names a data set for it"
            )
    return images.first_of_each_class(recipe.data.limit) if recipe.data.limit else images


def data_sha256(images: ImageSet) -> str:
    """Return the SHA-256 of the image ids, one per line. It identifies the list of files, not their content."""
    lines = "".join(f"{image_id}\n" for image_id in images.ids)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def config_sha256(recipe: Recipe) -> str:
    """Return the SHA-256 of the keys of a recipe that shape its numbers."""
    values = {key: value for key, value in flatten(asdict(recipe)).items() if key not in _FREE}
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def collect_shared_facts(recipe: Recipe, images: ImageSet, learner: Learner) -> dict[str, str]:
    """Return what must be equal on all ranks."""
    return {
        "recipe": config_sha256(recipe),
        "images": data_sha256(images),
        "weights": weights_sha256(learner.state().model),
        "torch": torch.__version__,
        "package": __version__,
    }


def open_run(recipe: Recipe, images: ImageSet, *, allowed: Sequence[str] = ()) -> Path | None:
    """Fill the folder of a new run, or open that of an earlier one.

    Args:
        recipe: The recipe.
        images: The training images.
        allowed: Keys of the recipe whose values may differ from those of the folder; `data` for the images.

    Returns:
        Folder of the snapshot to continue from, None for a new run.

    Raises:
        UsageError: Other keys differ; the error lists them.
    """
    run = Path(recipe.run.dir)
    for name in (CHECKPOINTS, "eval"):
        (run / name).mkdir(exist_ok=True)
    snapshot = find_snapshot(recipe, images, allowed=allowed)
    write_atomically(run / CONFIG, recipe_as_yaml(recipe).encode())
    return snapshot


def find_snapshot(recipe: Recipe, images: ImageSet, *, allowed: Sequence[str]) -> Path | None:
    """Return the folder of the snapshot that a run would continue from, as `open_run` does, but write nothing."""
    run = Path(recipe.run.dir)
    config = run / CONFIG
    if config.exists():
        _check_unchanged(read_recipe(config), recipe, allowed, where=str(config))
    snapshot, skipped = newest_snapshot(run)
    for reason in skipped:
        _log.warning("incomplete snapshot is ignored: %s", reason)
    if snapshot is not None and snapshot.facts.get("data_sha256") != data_sha256(images) and DATA not in allowed:
        hint = f"Restore them, or continue with --allow-config-change {DATA}."
        what = "data: the training images are not those that this run began with"
        raise UsageError(what, where=str(run), hint=hint)
    return None if snapshot is None else snapshot.folder


def _check_unchanged(before: Recipe, now: Recipe, allowed: Sequence[str], *, where: str) -> None:
    old, new = flatten(asdict(before)), flatten(asdict(now))
    unknown = [key for key in allowed if key not in old.keys() | new.keys() | {DATA}]
    if unknown:
        raise UsageError(f"--allow-config-change {unknown[0]}: there is no such key", hint="Write it as section.key.")
    checked = [key for key in dict.fromkeys([*old, *new]) if key not in _FREE and key not in allowed]
    changed = [key for key in checked if old.get(key) != new.get(key)]
    if changed:
        lines = "".join(f"\n  {key}: folder {old.get(key)}, now {new.get(key)}" for key in changed)
        options = " ".join(f"--allow-config-change {key}" for key in changed)
        hint = f"Use another run.dir, or continue anyway with {options}"
        raise UsageError(f"the recipe differs from the one of this folder:{lines}", where=where, hint=hint)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings; keys are joined by dots."""
    flattened: dict[str, Any] = {}
    for key, value in content.items():
        flattened |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flattened


def resume(learner: Learner, folder: Path | None, ranks: Group) -> Snapshot | None:
    """Restore a learner and this rank's random generators from a snapshot."""
    if folder is None:
        return None
    snapshot = read_snapshot(read_manifest(folder))
    learner.restore(snapshot)
    if len(snapshot.rng) != ranks.world and ranks.first:
        _log.warning(
            "this run had %s and continues with %d: it will not be bit for bit the same run",
            format_count(len(snapshot.rng), "rank"), ranks.world,
        )  # fmt: skip
    if ranks.rank < len(snapshot.rng):
        snapshots.set_generators(snapshot.rng[ranks.rank], ranks.device)
    return snapshot


def roll_back(learner: Learner, run: Path, ranks: Group) -> int | None:
    """Restore weights and optimiser of the newest snapshot and return its step; None if there is no snapshot."""
    files = broadcast_from_rank0(ranks, "snapshot", lambda: newest_snapshot(run)[0])
    if files is None:
        return None
    learner.restore(read_snapshot(files))
    return files.step


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Create a run folder and hold its lock. The system releases it when this process ends.

    An fcntl lock belongs to this process alone: a loader worker that outlives it does not hold the lock. On file systems without
    locks this only logs a warning.

    Raises:
        DistributedError: Another process holds the lock; the error names host and process.
        UsageError: The folder cannot be written.
    """
    import fcntl  # not on Windows

    prepare_folder(run, option="run.dir")
    with (run / "run.lock").open("ab+", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                what = f"is in use by {_describe_holder(run / 'run.lock')}"
                hint = "Wait until it ends, or use another run.dir."
                raise DistributedError(what, where=str(run), hint=hint) from error
            _log.warning("%s: this file system has no locks (%s); do not start a second job there", run, error.strerror)
        file.seek(0)
        file.truncate()
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        with contextlib.suppress(OSError):  # a full disk, which the next file names
            file.write(json.dumps(facts).encode())
        yield


def _describe_holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        job = f" (job {facts['job']})" if facts["job"] else ""
        return f"process {facts['pid']} on {facts['host']}{job}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
